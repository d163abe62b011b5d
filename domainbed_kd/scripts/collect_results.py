"""Prints the tables of a sweep, and writes them beside its runs."""

import argparse
import os
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from domainbed_kd import datasets
from domainbed_kd.console import Parser, run_main
from domainbed_kd.folder import claims, curves, files
from domainbed_kd.folder.args import OF_SWEEP, PROTOCOL
from domainbed_kd.folder.curves import Curve
from domainbed_kd.results import protocols, published, selection, significance, tables
from domainbed_kd.results import records as sweeps
from domainbed_kd.sweep import jobs

EXTENSIONS = {"text": "txt", "latex": "tex", "csv": "csv", "markdown": "md"}
# Of runs that failed, how many lines say why.
MOST_FAILURES = 10


def build_parser() -> argparse.ArgumentParser:
    """DomainBed's flags, then ours."""
    parser = Parser(prog="python -m domainbed_kd.scripts.collect_results", description=__doc__)
    parser.add_argument("--input_dir", required=True, help="folder of the sweep")
    parser.add_argument("--latex", action="store_true", help="the same as --format latex")
    parser.add_argument("--auto_lr", action="store_true",
                        help="select by the rule for ERM++'s two stages only")
    ours = parser.add_argument_group("beyond DomainBed")
    ours.add_argument("--format", choices=EXTENSIONS,
                      help="text (the default), latex, csv or markdown; also written to "
                           "INPUT_DIR/results.{txt,tex,csv,md}")
    ours.add_argument("--upstream", action="store_true",
                      help="exactly what DomainBed prints: no marks, no notes, cells cut to width")
    ours.add_argument("--published", action="store_true",
                      help="also show published results on the same data sets, marked where "
                           "their protocol differs or is not stated (docs/report.md)")
    ours.add_argument("--compare", metavar="ALGORITHM",
                      help="also compare every other algorithm with this one: paired differences "
                           "in points with 95 percent intervals and corrected tests, mean ranks "
                           "(docs/report.md)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Loads, selects, prints and writes."""
    args = build_parser().parse_args(argv)
    style = args.format or ("latex" if args.latex else "text")
    if args.latex and style != "latex":
        raise ValueError(f"--latex and --format {style} contradict each other; give one.")
    if args.upstream and style not in ("text", "latex"):
        raise ValueError(f"--upstream: DomainBed prints text or latex, not {style}.")

    if args.published and args.upstream:
        raise ValueError("--published goes without --upstream, which prints what DomainBed does.")
    if args.compare and (args.upstream or style == "csv"):
        raise ValueError("--compare goes with text, latex or markdown, and without --upstream.")

    folder = sweeps.Folder(args.input_dir)
    output, remarks, failed, *unfinished = folder.answer(
        "collect_results", repr(args), make=lambda: answer(folder, args, style),
        holds=lambda kept: kept[2] == repr(why_failed(folder, kept[3:])))
    sys.stderr.write(remarks)
    sys.stdout.write(output)
    path = Path(args.input_dir, f"results.{EXTENSIONS[style]}")
    try:
        path.write_text(output, encoding="utf-8")
    except OSError as error:
        print(f"Not written to {path}: {error.strerror}.", file=sys.stderr)
    if remark := at_work(folder, unfinished):
        print(remark, file=sys.stderr)
    return 0


def at_work(folder: sweeps.Folder, unfinished: list[str]) -> str:
    """That runs are being trained in a sweep's folder right now; empty if none are.

    Args:
        folder: of the sweep.
        unfinished: the names of runs with results; those without are known.
    """
    names = {*unfinished, *(name for name, stamp in folder.stamps.items() if not stamp)}
    paths = [f"{folder.path}/{name}" for name in names]
    n_running = sum(claims.holder(path) is not None for path in paths
                    if os.path.exists(f"{path}/out.txt"))
    if not n_running:
        return ""
    n_waiting = sum(map(files.is_waiting, paths))
    return (f"The sweep is at work: {n_running} of its runs are in training and {n_waiting} more "
            "wait for their turn. What is absent may come by itself; `sweep status` tells.")


def answer(folder: sweeps.Folder, args: argparse.Namespace, style: str) -> list[str]:
    """What goes to stdout and to stderr, why runs failed, and the names of unfinished ones.

    Raises:
        ValueError: if the folder holds no run, which DomainBed would print as tables.
    """
    found = folder.curves()
    if args.upstream:  # DomainBed does not know that an average of weights ends a run
        found, grid = [curve._replace(selection=None) for curve in found], sweeps.Grid(found)
    else:
        grid = whole_grid(folder, found)
    unfinished = unfinished_names(grid)
    failures = why_failed(folder, unfinished)
    n_records = curves.n_records(found)
    methods = selection.METHODS
    if args.auto_lr:
        methods = (selection.IIDAutoLRAccuracySelectionMethod,)
    made = make_tables(found, grid, methods, keep_unregistered=not args.upstream)

    merged, sources = with_published(made, grid) if args.published else (made, [])
    remarks = [] if found else [f"{args.input_dir} holds no results yet."]
    if args.upstream:
        output = render_upstream(made, n_records, style)
    elif style == "csv":
        output = tables.as_csv(table for method, group in merged.items() for table in group
                               if not needs_pairs(method, grid))
        remarks += [*notes(grid, made, args.input_dir, failures), *sources]
    else:
        compared = compare(found, grid, made, args.compare, style) if args.compare else {}
        output = RENDER[style](merged, compared, grid, n_records,
                               [*notes(grid, made, args.input_dir, failures), *sources])
    return [output, "".join(f"{line}\n" for line in remarks), repr(failures), *unfinished]


def whole_grid(folder: sweeps.Folder, found: list[Curve]) -> sweeps.Grid:
    """The grid of a sweep's curves and of its runs that have no results.

    Raises:
        ValueError: if there are neither, nor any run that does not tell what it trains.
    """
    planned = files.without_results(folder.path, folder.without_results)
    if not found and not planned and not any(
            files.has_begun(folder.path / name) for name in folder.without_results):
        raise ValueError(f"--input_dir {folder.path}: it holds no runs.")
    return sweeps.Grid(found, planned)


def unfinished_names(grid: sweeps.Grid) -> list[str]:
    """The names of the folders of runs that have begun and not finished."""
    names = (folder_name(grid, run) for run in grid.begun if run not in grid.finished)
    return list(filter(None, names))


def why_failed(folder: sweeps.Folder, names: Iterable[str]) -> dict[str, str]:
    """{name of a run's folder: why it failed} of those that have."""
    reasons = ((name, files.failure(f"{folder.path}/{name}")) for name in names)
    return {name: " ".join(reason.split()).removeprefix("error: ")
            for name, reason in reasons if reason}


def make_tables(found: list[Curve], grid: sweeps.Grid, methods: Iterable[type],
                keep_unregistered: bool) -> dict[type, list[tables.Table]]:
    """{selection method: its tables}."""
    rows = tables.row_order(
        [*(curve.args["algorithm"] for curve in found), *grid.algorithms])
    columns = tables.ordered(
        [*(curve.args["dataset"] for curve in found), *grid.datasets], datasets.DATASETS)
    if not keep_unregistered:
        columns = [name for name in columns if name in datasets.DATASETS]
    cells = curves.by_cell(found)
    made = {method: tables.build(method, selection.outcomes(cells, grid, method),
                                 rows, columns, grid.n_envs)
            for method in methods}
    known = protocols.of_runs(grid)
    for table in (table for group in made.values() for table in group if table.has_data):
        table.protocol = protocols.line(known, grid, table.dataset, table.method)
    return made


def with_published(made: dict[type, list[tables.Table]], grid: sweeps.Grid
                   ) -> tuple[dict[type, list[tables.Table]], list[str]]:
    """The tables with published rows, and lines on where these come from, an empty one first."""
    known = protocols.of_runs(grid)
    searched = published.search(len(grid.hparams_seeds), len(grid.trial_seeds))
    merged = {method: [published.merge(table, known, searched) for table in group]
              for method, group in made.items()}
    rows = [row for group in made.values() for table in group if table.dataset and table.has_data
            for row in published.of_table(table)]
    if not rows:
        return made, ["", f"No published results are known on {', '.join(grid.datasets)}."]
    return merged, ["", "Published rows, marked ! where a protocol differs or is not stated:",
                    *(f"    {line}" for line in published.describe(
                        list(dict.fromkeys(rows)), known, searched))]


def compare(found: list[Curve], grid: sweeps.Grid, methods: Iterable[type], reference: str,
            style: str) -> dict[type, list[str]]:
    """{selection method: the table that compares with `reference`}, where there is one.

    Raises:
        ValueError: if there are no results of the reference, or a library is missing.
    """
    names = {tables.display_name(name): name for name in grid.algorithms}
    reference = names.get(reference, reference)
    cells = curves.by_cell(found)
    compared = {}
    for method in methods:
        if needs_pairs(method, grid):
            continue
        scores = significance.by_pair(selection.outcomes(cells, grid, method))
        scores = {name: scores[name] for name in tables.row_order(scores)}
        title = f"Differences to {tables.display_name(reference)}, model selection method: "
        differences = significance.differences(scores, reference)
        compared[method] = [tables.grid(
            style, title + method.name, difference_rows(differences),
            describe_comparison(differences, significance.ranking(scores)))]
    return compared


def difference_rows(differences: list[significance.Difference]) -> list[list[str]]:
    """As cells of a table, the header first; an asterisk where a difference is significant."""
    return [["Algorithm", "pairs", "points", "95 % interval", "p", "p (Holm)"],
            *([tables.display_name(d.algorithm), str(d.n_pairs), f"{100 * d.mean:+.1f}",
               f"{100 * d.low:+.1f} to {100 * d.high:+.1f}" if d.n_pairs > 1 else "-",
               f"{d.p:.3f}", f"{d.p_corrected:.3f}{' *' if d.is_significant else ''}"]
              for d in differences)]


def describe_comparison(differences: list[significance.Difference],
                        ranking: significance.Ranking | None) -> str:
    """What the pairs are too few to show, if anything, and mean ranks with their test."""
    few = {d.n_pairs: d.least_p for d in differences if d.least_p >= significance.LEVEL}
    limits = "".join(f"With {n} pair{'' if n == 1 else 's'} p cannot be below {p:.3f}. "
                     for n, p in sorted(few.items()))
    if ranking is None:
        return f"{limits}Ranks need three algorithms on two common domains."
    ranks = ", ".join(f"{tables.display_name(name)} {rank:.2f}"
                      for name, rank in zip(ranking.algorithms, ranking.ranks))
    return (f"{limits}Mean ranks over {ranking.n_blocks} domains: {ranks}. Friedman's test: "
            f"p = {ranking.p:.3f}. Critical difference (Nemenyi, 0.05): "
            f"{ranking.critical_difference:.2f}.")


def render_upstream(made: dict, n_records: int, style: str) -> str:
    """DomainBed's own output, byte for byte."""
    if style == "text":
        return f"Total records: {n_records}\n" + "".join(
            tables.upstream_text(table) for group in made.values() for table in group)
    return tables.latex_document(
        (part for method, group in made.items()
         for part in (tables.latex_section(method.name), *map(tables.upstream_latex, group))),
        n_records)


def needs_pairs(method: type, grid: sweeps.Grid) -> str | None:
    """Why a method has no table, if the sweep has runs but none of the kind that it needs."""
    if not method.uses_pairs or grid.has_pairs or not grid.begun:
        return None
    return (f"{method.name}: needs runs with two test envs "
            "(launch the sweep without --single_test_envs).")


def render_text(made: dict, compared: dict, grid: sweeps.Grid, n_records: int,
                remarks: list[str]) -> str:
    """The tables, then the remarks."""
    parts = [f"Total records: {n_records}\n"]
    for method, group in made.items():
        why = needs_pairs(method, grid)
        parts += [f"\n{why}\n"] if why else map(tables.text, group)
        parts += compared.get(method, [])
    return "".join(parts) + "".join(f"{line}\n" for line in remarks)


def render_latex(made: dict, compared: dict, grid: sweeps.Grid, n_records: int,
                 remarks: list[str]) -> str:
    """A whole document; the remarks are comments at its end."""
    parts = []
    for method, group in made.items():
        why = needs_pairs(method, grid)
        parts.append(tables.latex_section(method.name))
        parts += ["\n" + tables.escape_latex(why)] if why else map(tables.latex, group)
        parts += compared.get(method, [])
    return tables.latex_document([*parts, *(f"% {line}".rstrip() for line in remarks)], n_records)


def render_markdown(made: dict, compared: dict, grid: sweeps.Grid, n_records: int,
                    remarks: list[str]) -> str:
    """The tables, then the remarks as they stand."""
    parts = [f"Total records: {n_records}\n"]
    for method, group in made.items():
        why = needs_pairs(method, grid)
        parts += [f"\n{why}\n"] if why else map(tables.markdown, group)
        parts += compared.get(method, [])
    if remarks:
        parts += ["\n```text", *(f"\n{line}" for line in remarks[1:]), "\n```\n"]
    return "".join(parts)


RENDER = {"text": render_text, "latex": render_latex, "markdown": render_markdown}


def notes(grid: sweeps.Grid, made: dict, input_dir: str, failures: dict[str, str]) -> list[str]:
    """Lines on what the tables' marks mean, which runs are absent, and what completes them.

    No line for a whole sweep; else an empty one first. `failures` are those of `why_failed`.
    """
    cells = [cell for group in made.values() for table in group
             for row in table.rows.values() for cell in row if cell.mean is not None]
    lines = []
    if any(cell.incomplete for cell in cells):
        lines.append("* n/m: n of the m runs behind the number have finished.")
    if any(cell.differs for cell in cells):
        lines.append("! trained by another protocol than most of the column:")
        lines += [f"    {line}" for line in describe_protocols(grid)]
    if problems := tables.teacher_problems(cells):
        lines.append(f"? {problems}")
    if absent := grid.absent():
        n_runs = sum(len(grid.runs(d, a)) for d in grid.datasets for a in grid.algorithms)
        reasons = {run: failures[name] for run in absent
                   if (name := folder_name(grid, run)) in failures}
        n_unfinished = len(set(absent) & grid.begun.keys()) - len(reasons)
        n_absent = len(absent) - n_unfinished - len(reasons)
        lines.append(
            f"Of {n_runs} runs, {n_absent} are absent and {n_unfinished} unfinished:"
            if not reasons else f"Of {n_runs} runs, {n_absent} are absent, {n_unfinished} "
            f"unfinished and {len(reasons)} failed:")
        others = [run for run in absent if run not in reasons]
        lines += [f"    {line}" for line in describe_absent(grid, others)]
        lines += [f"    {line}" for line in describe_failed(grid, reasons)]
        lines.append("To complete them:")
        lines += [f"    {line}" for line in completing_commands(grid, absent, input_dir)]
    return ["", *lines] if lines else []


def folder_name(grid: sweeps.Grid, run: sweeps.Run) -> str:
    """The name of a run's folder; empty if there is none."""
    return os.path.basename(grid.begun.get(run, {}).get("output_dir") or "")


def describe_failed(grid: sweeps.Grid, reasons: dict[sweeps.Run, str]) -> list[str]:
    """Which runs failed and why, a line for each reason; what is too much is summed up."""
    alike = defaultdict(list)
    for run, reason in reasons.items():
        alike[reason].append(run)
    lines = [f"{line}: failed: {reason}" for reason, runs in alike.items()
             for line in describe_absent(grid, runs)]
    more = len(lines) - MOST_FAILURES
    return lines if more <= 0 else [
        *lines[:MOST_FAILURES], f"and {more} more such lines; `sweep status` has them all"]


def describe_protocols(grid: sweeps.Grid) -> list[str]:
    """A line per algorithm on each dataset whose runs were trained by several protocols."""
    counts = defaultdict(Counter)
    for run, found in grid.protocols.items():
        for protocol in found:
            counts[run.dataset, run.algorithm][protocol] += 1
    lines = []
    for dataset in grid.datasets:
        rows = {algorithm: counts[dataset, algorithm] for algorithm in grid.algorithms}
        values = list(zip(*(protocol for row in rows.values() for protocol in row)))
        told = [i for i, column in enumerate(values) if len(set(column)) > 1]
        if not told:
            continue
        for algorithm, row in rows.items():
            kinds = "; ".join(
                ", ".join(protocols.in_words(PROTOCOL[i], p[i]) for i in told)
                + f" ({n} run{'s' if n > 1 else ''})"
                for p, n in sorted(row.items()))
            if kinds:
                lines.append(f"{dataset}, {tables.display_name(algorithm)}: {kinds}")
    return lines


def describe_absent(grid: sweeps.Grid, absent: list[sweeps.Run]) -> list[str]:
    """The runs in as few lines as their regularity allows."""
    lacking = defaultdict(lambda: defaultdict(set))  # {(dataset, algorithm): {test envs: seeds}}
    for run in absent:
        lacking[run.dataset, run.algorithm][run.test_envs].add((run.trial_seed, run.hparams_seed))
    alike = defaultdict(list)  # {(dataset, what it lacks): algorithms}
    for (dataset, algorithm), by_envs in lacking.items():
        env_sets = defaultdict(list)
        for envs, seeds in by_envs.items():
            env_sets[frozenset(seeds)].append(envs)
        everything = len(grid.test_env_sets(dataset))
        parts = []
        for seeds, sets in env_sets.items():
            where = "all test envs" if len(sets) == everything else (
                "test envs " + " ".join("+".join(map(str, envs)) for envs in sets))
            parts.append(f"{where}: {_describe_seeds(seeds)}")
        alike[dataset, tuple(parts)].append(tables.display_name(algorithm))
    return [f"{dataset}, {' '.join(names)}, {part}"
            for (dataset, parts), names in alike.items() for part in parts]


def _describe_seeds(seeds: Iterable[tuple[int, int]]) -> str:
    """Pairs of trial and hparams seed, as "trials 0-2, hparams 0-19; trial 3, hparams 1"."""
    by_trial = defaultdict(set)
    for trial, hparams in seeds:
        by_trial[trial].add(hparams)
    trials = defaultdict(list)
    for trial in sorted(by_trial):
        trials[tuple(sorted(by_trial[trial]))].append(trial)
    return "; ".join(f"trial{'s' if len(same) > 1 else ''} {_ranges(same)}, "
                     f"hparams {_ranges(hparams)}" for hparams, same in trials.items())


def _ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as "0-2 5"."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def completing_commands(grid: sweeps.Grid, absent: list[sweeps.Run], input_dir: str) -> list[str]:
    """The `sweep launch` commands that run what is absent, with the arguments of the others.

    The arguments are those of most runs of the same algorithm and dataset, else of the dataset;
    the plug-ins are those that a launch left word of.
    """
    used = defaultdict(Counter)
    for run, args in grid.begun.items():
        settings = tuple(args.get(name, value) for name, value in OF_SWEEP.items())
        used[run.dataset, run.algorithm][settings] += 1
        used[run.dataset, None][settings] += 1
    # {(settings, plug-ins): {dataset: algorithms}}
    needed = defaultdict(lambda: defaultdict(list))
    for dataset, algorithm in dict.fromkeys((run.dataset, run.algorithm) for run in absent):
        counts = used.get((dataset, algorithm)) or used[dataset, None]
        plugins = tuple(jobs.plugins_of(input_dir, dataset, algorithm))
        needed[counts.most_common(1)[0][0], plugins][dataset].append(algorithm)

    commands = []
    for (settings, plugins), by_dataset in needed.items():
        alike = defaultdict(list)
        for dataset, names in by_dataset.items():
            alike[tuple(names)].append(dataset)
        for names, on in alike.items():
            words = ["python", "-m", "domainbed_kd.scripts.sweep", "launch",
                     "--datasets", *on, "--algorithms", *names,
                     "--n_trials", max(grid.trial_seeds) + 1,
                     "--n_hparams", max(grid.hparams_seeds) + 1]
            if min(grid.hparams_seeds):
                words += ["--n_hparams_from", min(grid.hparams_seeds)]
            for (name, default), value in zip(OF_SWEEP.items(), settings):
                if value != default:
                    words += [f"--{name}"] if value is True else [f"--{name}", value]
            for plugin in plugins:
                words += ["--fork" if os.path.isdir(plugin) else "--plugin", _from_here(plugin)]
            words += [] if grid.has_pairs else ["--single_test_envs"]
            words += ["--output_dir", input_dir, "--command_launcher", "local"]
            commands.append(shlex.join(map(str, words)))
    return commands


def _from_here(plugin: str) -> str:
    """A plug-in's path, relative if it lies in the working directory; a module's name as it is."""
    path = os.path.relpath(plugin)
    return path if os.path.isabs(plugin) and not path.startswith(os.pardir) else plugin


if __name__ == "__main__":
    run_main(main)
