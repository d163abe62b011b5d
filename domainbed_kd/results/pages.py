"""The report: a sweep's tables, comparisons and plots as one HTML page.

Its first screen says which method is best, by how much, and whether that is certain.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from domainbed_kd import __version__
from domainbed_kd.algorithms import display_name
from domainbed_kd.console import count
from domainbed_kd.folder.curves import Curve, n_records, searches
from domainbed_kd.results import (
    logits,
    pictures,
    plots,
    selection,
    significance,
    summaries,
    tables,
)
from domainbed_kd.results.records import Grid
from domainbed_kd.results.significance import Comparison, Difference

TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
#: The selection method behind the answer and all plots.
SELECTION = selection.IIDAccuracySelectionMethod


class Section(NamedTuple):
    """A part of the page: a heading, a paragraph, plots, and a table between two sentences."""

    id: str
    title: str
    text: str
    plots: list
    rows: list[list[str]] = []
    lead: str = ""
    remark: str = ""


class Answer(NamedTuple):
    """The best method, its lead, and whether that is significant."""

    best: str
    sure: str
    #: "yes", "no" or "open", for the colour.
    verdict: str
    #: The header, then the methods, best first.
    rows: list[list[str]]


def answer(made: list[tables.Table], grid: Grid, comparison: Comparison | None) -> Answer | None:
    """The first screen, from the tables of `SELECTION`; None if these have no number."""
    with_data = [table for table in made if table.dataset and table.has_data]
    table = with_data[0] if len(with_data) == 1 else made[-1]
    cells = {name: row[-1] for name, row in table.rows.items() if row[-1].mean is not None}
    if not cells:
        return None
    fair = {name: cell for name, cell in cells.items() if not (cell.incomplete or cell.differs)}
    ranked = sorted(cells, key=lambda name: -cells[name].mean)
    best = next((name for name in ranked if name in fair), ranked[0])
    where = " and ".join(t.dataset for t in with_data) if len(with_data) < 3 else (
        f"{len(with_data)} datasets")
    said = (f"{display_name(best)} has the best average {table.metric} on held-out domains of "
            f"{where}: {cells[best].mean:.1f} %")
    by_name = {d.algorithm: d for d in comparison.differences} if comparison else {}
    if len(cells) == 1 or not by_name:
        sure, verdict = "There is no other method to compare it with.", "open"
    else:
        reference = comparison.reference
        rival = by_name.get(best) or next(by_name[n] for n in ranked if n in by_name)
        if best in by_name:
            said += f", {100 * rival.mean:+.1f} points against {display_name(reference)}"
        else:
            said += (f"; {display_name(rival.algorithm)} comes next among those compared with it, "
                     f"{100 * rival.mean:+.1f} points")
        sure, verdict = _is_sure(rival, comparison.differences)
    if best not in fair or len(fair) < len(cells) or grid.absent():
        sure += " Preliminary: runs are missing, or were trained by different protocols."
    header = ["Method", "average, %", "points", "95 % interval", "sure?"]
    # Only the table of averages has standard errors for means over domains.
    column = made[-1].columns.index(table.dataset) if len(with_data) == 1 else -1
    return Answer(f"{said}.", sure, verdict, [header, *(
        [display_name(name), _average(cells[name], made[-1].rows[name][column]),
         *_against(by_name.get(name), name, comparison)] for name in ranked)])


def _average(cell: tables.Cell, with_error: tables.Cell) -> str:
    """A mean over domains, with the standard error over trials from the other cell."""
    if with_error.has_error and not cell.incomplete:
        return f"{cell.mean:.1f} ± {with_error.stderr:.1f}"
    return f"{cell.mean:.1f}"


def _is_sure(rival: Difference, differences: list[Difference]) -> tuple[str, str]:
    if limit := significance.limits(differences):
        return f"Not sure. {limit} Add trials or datasets.", "no"
    test = significance.shown(rival.p_corrected) + (
        f" after Holm's correction for {len(differences)} comparisons"
        if len(differences) > 1 else "")
    interval = f"95 % interval {rival.interval} points, {rival.n_pairs} pairs"
    if rival.is_significant:
        return f"Sure, at the 5 % level: {test}; {interval}.", "yes"
    return f"Not sure: the difference may be chance. {test}; {interval}.", "no"


def _against(difference: Difference | None, name: str, comparison: Comparison | None
             ) -> list[str]:
    if difference is None:
        if not comparison or not comparison.differences:
            return ["", "", ""]
        return ["", "", "the reference" if name == comparison.reference else "not compared"]
    if difference.is_significant:
        said = "better" if difference.mean > 0 else "worse"
    else:
        said = "too few pairs" if significance.limits(comparison.differences) else "not shown"
    return [f"{100 * difference.mean:+.1f}", difference.interval, said]


def facts(grid: Grid, found: list[Curve], n_failed: int) -> str:
    """What the sweep consists of, in two sentences."""
    names = ", ".join(map(display_name, tables.row_order(grid.algorithms)))
    return (f"{count(len(grid.algorithms), 'algorithm')} ({names}), "
            f"{count(len(grid.trial_seeds), 'trial')}, "
            f"{count(len(grid.hparams_seeds), 'draw')} of hparams each. "
            f"{grid.n_runs - len(grid.absent())} of {count(grid.n_runs, 'run')} finished, "
            + (f"{n_failed} failed, " if n_failed else "")
            + f"with {count(n_records(found), 'record')}.")


def groups(made: dict, grid: Grid) -> Iterator[dict]:
    """The tables of each selection method, or why it has none.

    With a single dataset the table of averages is left out: it would repeat that dataset's.
    """
    for method, group in made.items():
        shown = group[:-1] if len(group) == 2 else group
        why = tables.needs_pairs(method, grid)
        yield {"name": method.name, "why": why, "tables": [] if why else shown}


def marks(made: dict) -> dict[str, bool | str]:
    """Which marks the tables have, and what they mean where that varies."""
    cells = [cell for group in made.values() for table in group if table.has_data
             for row in table.rows.values() for cell in row]
    return {"incomplete": any(cell.incomplete for cell in cells),
            "differs": any(cell.differs for cell in cells),
            "teachers": tables.teacher_problems(cells),
            "absent": any(cell.number("") == "X" for cell in cells),
            "metric": _capital(next(iter(made.values()))[-1].metric)}


def _capital(metric: str) -> str:
    """The metric as the first word of a sentence: "Accuracy", "mIoU"."""
    return metric.capitalize() if metric.islower() else metric


def sections(input_dir: str, found: list[Curve], made: list[tables.Table],
             comparison: Comparison | None) -> Iterator[Section]:
    """The sections that have numbers to show; `made` are the tables of `SELECTION`."""
    looks = plots.Looks(made[0].rows)
    if comparison and comparison.differences:
        ranking = comparison.ranking
        yield Section(
            "significance", "Are the differences real?",
            f"Each algorithm against {display_name(comparison.reference)}, selected by the "
            f"{SELECTION.name}: difference in points over the (dataset, domain, trial) that both "
            "have, its 95 % bootstrap interval, Wilcoxon's signed-rank test, and its p value after "
            "Holm's correction; * is below 0.05. Trials of one domain share images, so few domains "
            "prove little, however many trials there are.",
            [plots.critical_difference(ranking, looks)] if ranking else [],
            significance.rows(comparison.differences),
            significance.limits(comparison.differences), significance.describe(ranking))
    # What is skipped was named when `found` was read.
    frame = summaries.by_test_env(logits.to_frame(input_dir, skipped=[]))
    if not frame.empty:
        yield from _with_plots(input_dir, frame, found, made, looks)


def _pictures(input_dir: str, chosen, of: dict[str, tables.Table], looks: plots.Looks
              ) -> Iterator[plots.Plot]:
    """A plot for each dataset and test env whose `chosen` runs left pictures."""
    runs = chosen.sort_values("args.trial_seed").drop_duplicates(
        ["args.dataset", "args.algorithm", "test_env"])
    for (dataset, env), rows in runs.groupby(["args.dataset", "test_env"]):
        found = {row["args.algorithm"]: arrays for _, row in rows.iterrows()
                 if (arrays := pictures.read(Path(input_dir, row["run"]), env))}
        if found and dataset in of:
            yield pictures.draw(dataset, tables.environments(dataset, env + 1)[env], found, looks)


def _with_plots(input_dir: str, frame, found: list[Curve], made: list[tables.Table],
                looks: plots.Looks) -> Iterator[Section]:
    chosen = summaries.chosen(frame, searches(found), SELECTION)
    of = {table.dataset: table for table in made if table.dataset and table.has_data}
    chose = f"Runs: the {SELECTION.name} selects one per search"

    def each(data, column: str, draw: Callable) -> list:
        drawn = (draw(name, data[data[column] == name]) for name in of
                 if (data[column] == name).any())
        return [plot for plot in drawn if plot]

    metric = made[-1].metric
    yield Section("domains", f"{_capital(metric)} by domain",
                  f"Selected by the {SELECTION.name}; error bars are standard errors over trials.",
                  [plots.domains(table, looks) for table in of.values()])
    yield Section("curves", "Training curves", f"{chose}; means over domains and trials.",
                  each(summaries.curves(chosen), "args.dataset",
                       lambda name, points: plots.curves(name, points, metric, looks)))

    def draw_costs(name, data):
        seconds = data.set_index("args.algorithm")["seconds"].dropna().to_dict()
        return plots.costs(name, seconds, of[name], looks)

    if "step_time" in chosen and (drawn := each(
            summaries.costs(chosen), "args.dataset", draw_costs)):
        yield Section("cost", f"{_capital(metric)} against training cost",
                      f"{chose}. The time is that of a run's updates, without evaluations and "
                      "without training a teacher that is a run of its own.", drawn)
    if drawn := list(_pictures(input_dir, chosen, of, looks)):
        yield Section("pictures", "What the predictions look like",
                      f"{chose}; the first trial's, after its last step. The images are the "
                      "first of the held-out domain's in-split.", drawn)
    effects = summaries.hparam_effects(frame)
    if len(effects):
        n_draws = effects["n_draws"].min()
        yield Section(
            "hparams", "What hparams mattered",
            f"Spearman's rank correlation of each drawn hparam with the {metric} on the training "
            f"domains' validation images, over {n_draws} draws or more: +1 if more is always "
            "better, -1 if less is. One in twenty hparams without any effect exceeds "
            f"±{summaries.chance_correlation(n_draws):.2f} by chance.",
            each(effects, "dataset",
                 lambda name, data: plots.hparams(name, data, metric, looks)))
    pairs = summaries.teachers(chosen, frame)
    if len(pairs):
        yield Section(
            "teachers", "Teacher and student",
            f"{chose}; means over trials. On the images of --diagnostics or, without it and with "
            "a teacher that is a run of this sweep, on the in-split.",
            each(pairs, "dataset", lambda name, data: plots.teachers(
                name, data, of[name], looks)))
    measured = summaries.diagnostics(chosen)
    if measured.shape[1] > 3:
        yield Section("diagnostics", "Diagnostics",
                      f"{chose}; means over domains and trials. docs/analysis.md defines them.",
                      each(measured, "args.dataset",
                           lambda name, data: plots.diagnostics(name, data, looks)))


def _whole_flags(text: str) -> str:
    """The text as HTML, escaped, whose flags no line end divides at their hyphens."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"--\w+", r"<span class=flag>\g<0></span>",
                                    str(markupsafe.escape(text))))


def render(title: str, **content) -> str:
    """The page's HTML; `content` has the other values that the template uses."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    environment.filters["whole_flags"] = _whole_flags
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, display_name=display_name, version=__version__, **content)
