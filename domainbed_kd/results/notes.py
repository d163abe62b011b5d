"""The remarks below a sweep's tables: what marks mean, which runs are absent, why some failed."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable

from domainbed_kd.algorithms import display_name
from domainbed_kd.console import count
from domainbed_kd.folder import claims, files, manifest
from domainbed_kd.folder.args import SETTINGS
from domainbed_kd.results import protocols, tables
from domainbed_kd.results.records import Folder, Grid, Run

# At most so many lines say why runs failed.
_MOST_FAILURES = 10


def lines(grid: Grid, made: dict, input_dir: str, failures: dict[Run, str]) -> list[str]:
    """What marks in {method: tables} mean, which runs are absent, and the command to complete them.

    Empty for a complete sweep; else the first line is empty. `failures` are from `why_failed`.
    """
    cells = [cell for group in made.values() for table in group
             for row in table.rows.values() for cell in row if cell.mean is not None]
    found = []
    if any(cell.incomplete for cell in cells):
        found.append("* n/m: n of the m runs behind the number have finished.")
    if any(cell.differs for cell in cells):
        found.append("! trained by another protocol than most of the column:")
        found += [f"    {line}" for line in _describe_settings(grid)]
    if problems := tables.teacher_problems(cells):
        found.append(f"? {problems}")
    if absent := grid.absent():
        reasons = {run: failures[run] for run in absent if run in failures}
        n_unfinished = len(set(absent) & grid.begun.keys()) - len(reasons)
        n_absent = len(absent) - n_unfinished - len(reasons)
        failed = f", {n_unfinished} unfinished and {len(reasons)} failed:"
        found.append(f"Of {grid.n_runs} runs, {n_absent} are absent"
                     + (failed if reasons else f" and {n_unfinished} unfinished:"))
        others = [run for run in absent if run not in reasons]
        found += [f"    {line}" for line in _describe_absent(grid, others)]
        found += [f"    {line}" for line in _describe_failed(grid, reasons)]
        if command := manifest.completing_command(input_dir):
            found += ["To complete them:", f"    {command}"]
    return ["", *found] if found else []


def why_failed(folder: Folder, grid: Grid) -> dict[Run, str]:
    """{run: why it failed}, of the runs that failed."""
    reasons = {run: files.failure(f"{folder.path}/{name}")
               for run, name in grid.unfinished().items()}
    return {run: reason.removeprefix("error: ") for run, reason in reasons.items() if reason}


def at_work(folder: Folder, grid: Grid) -> str:
    """A remark if runs of the sweep are in training now; else empty."""
    names = {*grid.unfinished().values(), *folder.without_results}
    paths = [f"{folder.path}/{name}" for name in names]
    n_running = sum(claims.holder(path) is not None for path in paths
                    if os.path.exists(f"{path}/{files.OUT}"))
    if not n_running:
        return ""
    n_waiting = sum(map(files.is_waiting, paths))
    return (f"The sweep is at work: {n_running} of its runs are in training and {n_waiting} more "
            "wait for their turn. Missing results may still come; see `sweep status`.")


def _describe_settings(grid: Grid) -> list[str]:
    """One line per algorithm on each dataset whose runs were trained with several settings."""
    counts = defaultdict(Counter)
    for run, found in grid.settings.items():
        for settings in found:
            counts[run.dataset, run.algorithm][settings] += 1
    described = []
    for dataset in grid.datasets:
        rows = {algorithm: counts[dataset, algorithm] for algorithm in grid.algorithms}
        values = list(zip(*(settings for row in rows.values() for settings in row)))
        told = [i for i, column in enumerate(values) if len(set(column)) > 1]
        if not told:
            continue
        for algorithm, row in rows.items():
            kinds = "; ".join(
                ", ".join(protocols.in_words(SETTINGS[i], settings[i]) for i in told)
                + f" ({count(n, 'run')})"
                for settings, n in sorted(row.items()))
            if kinds:
                described.append(f"{dataset}, {display_name(algorithm)}: {kinds}")
    return described


def _describe_failed(grid: Grid, reasons: dict[Run, str]) -> list[str]:
    """The failed runs, grouped by reason; a long list is cut."""
    alike = defaultdict(list)
    for run, reason in reasons.items():
        alike[reason].append(run)
    described = [f"{line}: failed: {reason}" for reason, runs in alike.items()
                 for line in _describe_absent(grid, runs)]
    more = len(described) - _MOST_FAILURES
    return described if more <= 0 else [
        *described[:_MOST_FAILURES], f"and {more} more such lines; `sweep status` has them all"]


def _describe_absent(grid: Grid, absent: list[Run]) -> list[str]:
    """The absent runs, in few lines where they form a regular pattern."""
    lacking = defaultdict(lambda: defaultdict(set))  # {(dataset, algorithm): {test envs: seeds}}
    for run in absent:
        lacking[run.dataset, run.algorithm][run.test_envs].add((run.trial_seed, run.hparams_seed))
    alike = defaultdict(list)  # {(dataset, what it lacks): algorithms}
    for (dataset, algorithm), by_envs in lacking.items():
        env_sets = defaultdict(list)
        for envs, seeds in by_envs.items():
            env_sets[frozenset(seeds)].append(envs)
        everything = len(grid.env_sets[dataset])
        parts = []
        for seeds, sets in env_sets.items():
            where = "all test envs" if len(sets) == everything else (
                "test envs " + " ".join("+".join(map(str, envs)) for envs in sets))
            parts.append(f"{where}: {_describe_seeds(seeds)}")
        alike[dataset, tuple(parts)].append(display_name(algorithm))
    return [f"{dataset}, {' '.join(names)}, {part}"
            for (dataset, parts), names in alike.items() for part in parts]


def _describe_seeds(seeds: Iterable[tuple[int, int]]) -> str:
    """Pairs of trial and hparams seed as "trials 0-2, hparams 0-19; trial 3, hparams 1"."""
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
