"""Writes what a sweep found as one HTML page that needs no network, and its plots as files."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import domainbed_kd
from domainbed_kd import console
from domainbed_kd.console import Parser, run_main
from domainbed_kd.folder.curves import Curve, by_cell, n_records
from domainbed_kd.results import logits, selection, significance, summaries, tables
from domainbed_kd.results import records as sweeps
from domainbed_kd.scripts import collect_results

TEMPLATE = Path(domainbed_kd.__file__).parent / "assets" / "report.html"
#: By which method the runs behind all pictures were selected.
SELECTION = selection.IIDAccuracySelectionMethod


class Section(NamedTuple):
    """A part of the page: a heading, a paragraph, pictures, and a table with its remark."""

    id: str
    title: str
    text: str
    plots: list
    rows: list[list[str]] = []
    remark: str = ""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="python -m domainbed_kd.scripts.report", description=__doc__)
    parser.add_argument("--input_dir", required=True, help="folder of the sweep")
    parser.add_argument("--output", help="the page (INPUT_DIR/report.html); plots go to a folder "
                                         "of its name beside it, as PNG and PDF")
    parser.add_argument("--compare", metavar="ALGORITHM",
                        help="with which every other is compared (ERM; without it the first row)")
    parser.add_argument("--published", action="store_true",
                        help="also show published results in the tables, marked where their "
                             "protocol differs or is not stated")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Reads, draws, writes, and prints where."""
    args = build_parser().parse_args(argv)
    try:
        import jinja2
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ValueError(f"The report needs {error.name}: pip install 'domainbed_kd[report]'"
                         ) from None
    folder = sweeps.Folder(args.input_dir)
    page = Path(args.output or Path(args.input_dir, "report.html"))
    if page.suffix != ".html":
        raise ValueError(f"--output {page}: name a file that ends in .html.")
    images = page.with_suffix("")
    if images.resolve() == Path(args.input_dir).resolve():
        raise ValueError(f"--output {page}: its plots would lie among the runs; name another.")
    curves = folder.curves()
    grid = collect_results.whole_grid(folder, curves)
    if not curves:
        raise ValueError(f"--input_dir {args.input_dir}: it holds no results yet; collect_results "
                         "tells what is known of its runs.")
    failures = collect_results.why_failed(folder, collect_results.unfinished_names(grid))
    made = collect_results.make_tables(
        curves, grid, selection.METHODS, keep_unregistered=True)
    sections = [*compare(curves, grid, args.compare, list(made[SELECTION][0].rows)),
                *make_sections(args.input_dir, curves, made[SELECTION])]

    merged, sources = made, []
    if args.published:
        merged, sources = collect_results.with_published(made, grid)
    images.mkdir(parents=True, exist_ok=True)
    plots = [plot for section in sections for plot in section.plots]
    for plot in console.bar(plots, desc="writing plots", unit="plot"):
        plot.save(images)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page.write_text(environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"Results on {', '.join(grid.datasets)}",
        facts=facts(grid, n_records(curves), len(failures)), groups=groups(merged, grid),
        marks=marks(merged), sections=sections,
        notes="\n".join([*collect_results.notes(grid, made, args.input_dir, failures),
                         *sources]).strip(),
        display_name=tables.display_name, version=domainbed_kd.__version__,
        command=shlex.join(["domainbed-kd", "report", *(argv or sys.argv[1:])])), encoding="utf-8")
    print(f"{page}\n{len(plots)} plots in {images}, each as PNG and PDF")
    return 0


def facts(grid: sweeps.Grid, n_records: int, n_failed: int) -> str:
    """The sweep in a sentence."""
    n_runs = sum(len(grid.runs(d, a)) for d in grid.datasets for a in grid.algorithms)
    names = ", ".join(map(tables.display_name, tables.row_order(grid.algorithms)))

    def count(n, what):
        return f"{n} {what}{'' if n == 1 else 's'}"

    return (f"{count(len(grid.algorithms), 'algorithm')} ({names}), "
            f"{count(len(grid.trial_seeds), 'trial')}, "
            f"{count(len(grid.hparams_seeds), 'draw')} of hparams each. "
            f"{n_runs - len(grid.absent())} of {count(n_runs, 'run')} finished, "
            + (f"{n_failed} failed, " if n_failed else "") + f"with {count(n_records, 'record')}.")


def groups(made: dict, grid: sweeps.Grid) -> Iterator[dict]:
    """The tables of each selection method, or why there are none."""
    for method, group in made.items():
        why = collect_results.needs_pairs(method, grid)
        yield {"name": method.name, "why": why, "tables": [] if why else group}


def marks(made: dict) -> dict[str, bool | str]:
    """Which marks the tables have and, where it varies, what they mean."""
    cells = [cell for group in made.values() for table in group if table.has_data
             for row in table.rows.values() for cell in row]
    return {"incomplete": any(cell.incomplete for cell in cells),
            "differs": any(cell.differs for cell in cells),
            "teachers": tables.teacher_problems(cells),
            "absent": any(cell.number("") == "X" for cell in cells)}


def compare(curves: list[Curve], grid: sweeps.Grid, reference: str | None, rows: list[str]
            ) -> Iterator[Section]:
    """The section on significance, if there are two algorithms to compare.

    Args:
        curves: of the sweep.
        grid: of the same.
        reference: with which to compare; None for ERM or, without it, the first that has scores.
        rows: the algorithms in order.
    """
    from domainbed_kd.results import plots

    scores = significance.by_pair(
        selection.outcomes(by_cell(curves), grid, SELECTION))
    scores = {name: scores[name] for name in rows if name in scores}
    if not reference:
        reference = next((name for name in ("ERM", *scores) if name in scores), None)
    reference = {tables.display_name(name): name for name in scores}.get(reference, reference)
    if reference is None:
        return
    differences = significance.differences(scores, reference)
    if not differences:
        return
    ranking = significance.ranking(scores)
    drawn = [plots.critical_difference(ranking, plots.Looks(rows))] if ranking else []
    yield Section(
        "significance", "Are the differences real?",
        f"Each algorithm against {tables.display_name(reference)}, selected by the "
        f"{SELECTION.name}: difference in points over the (data set, domain, trial) that both "
        "have, its 95 % bootstrap interval, Wilcoxon's signed-rank test, and its p value after "
        "Holm's correction; * is below 0.05. Trials of one domain share images, so few domains "
        "prove little, however many trials there are.", drawn,
        collect_results.difference_rows(differences),
        collect_results.describe_comparison(differences, ranking))


def make_sections(input_dir: str, curves: list[Curve], made: list[tables.Table]
                  ) -> Iterator[Section]:
    """The sections with pictures for which there are numbers.

    Args:
        input_dir: of the sweep.
        curves: of its runs, for model selection.
        made: the tables of `SELECTION`.
    """
    from domainbed_kd.results import plots

    frame = summaries.single(logits.to_frame(input_dir, skipped=[]))  # `curves` named them
    if frame.empty:
        return
    chosen = summaries.chosen(frame, by_cell(curves), SELECTION)
    of = {table.dataset: table for table in made if table.dataset and table.has_data}
    looks = plots.Looks(made[0].rows)
    chose = f"Of each cell the run that the {SELECTION.name} selects"

    def each(data, column: str, draw: Callable) -> list:
        drawn = (draw(name, data[data[column] == name]) for name in of
                 if (data[column] == name).any())
        return [plot for plot in drawn if plot]

    yield Section("domains", "Accuracy by domain",
                  f"Selected by the {SELECTION.name}; error bars are standard errors over trials.",
                  [plots.domains(table, looks) for table in of.values()])
    yield Section("curves", "Training curves", f"{chose}; means over domains and trials.",
                  each(summaries.curves(chosen), "args.dataset",
                       lambda name, points: plots.curves(name, points, looks)))

    def draw_costs(name, data):
        seconds = data.set_index("args.algorithm")["seconds"].dropna().to_dict()
        return plots.costs(name, seconds, of[name], looks)

    if "step_time" in chosen:
        yield Section("cost", "Accuracy against training cost",
                      f"{chose}. The time is that of a run's updates: evaluations and the training "
                      "of a teacher that is a run itself come on top.",
                      each(summaries.costs(chosen), "args.dataset", draw_costs))
    effects = summaries.hparam_effects(frame)
    if len(effects):
        n_draws = effects["n_draws"].min()
        yield Section(
            "hparams", "What hparams mattered",
            "Spearman's rank correlation of each hparam that was drawn with the accuracy on the "
            f"training domains' validation images, over {n_draws} draws or more: +1 where more is "
            "better throughout, -1 where less is. Of hparams without effect, one in twenty is "
            f"beyond ±{summaries.chance_correlation(n_draws):.2f} by chance.",
            each(effects, "dataset", lambda name, data: plots.hparams(name, data, looks)))
    pairs = summaries.teachers(chosen, frame)
    if len(pairs):
        yield Section(
            "teachers", "Teacher and student",
            f"{chose}; means over trials. On the images that --diagnostics looked at or, without "
            "it and with a teacher that is a run of this sweep, on the in-split.",
            each(pairs, "dataset", lambda name, data: plots.teachers(
                name, data, of[name].columns, looks)))
    measured = summaries.diagnostics(chosen)
    if measured.shape[1] > 3:
        yield Section("diagnostics", "Diagnostics",
                      f"{chose}; means over domains and trials. docs/analysis.md defines them.",
                      each(measured, "args.dataset",
                           lambda name, data: plots.diagnostics(name, data, looks)))


if __name__ == "__main__":
    run_main(main)
