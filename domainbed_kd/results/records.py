"""The records of a sweep's runs, and which of its runs are missing."""

import contextlib
import datetime
import functools
import itertools
import operator
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from domainbed_kd import console, tasks
from domainbed_kd.folder import composition, curves, files, manifest
from domainbed_kd.folder.args import SETTINGS
from domainbed_kd.folder.curves import Curve
from domainbed_kd.folder.foreign import parse_json

#: Notes when sealed test accuracies were read, and of which runs.
LOOKS = "looks.jsonl"
# What collect_results and report leave beside the runs.
_OURS = (manifest.NAME, "results.txt", "results.tex", "results.csv", "results.md", "report.html",
         "report", "alignment", LOOKS)
_MOST_WARNINGS = 10
# A line with more brackets may be nested deeper than `parse_json` allows.
_MOST_BRACKETS = 50


class Folder:
    """A sweep's folder as it is now: its runs, and the problems met while reading them."""

    def __init__(self, input_dir: str | Path):
        self.path = Path(input_dir)
        if not self.path.is_dir():
            raise FileNotFoundError(f"--input_dir {input_dir}: there is no such folder.")
        #: Names of its entries as the system lists them, which is the order DomainBed reads in.
        self.listing = [name for name in os.listdir(self.path)
                        if not name.startswith(".") and name not in _OURS]
        #: Names of the folders in which `curves` found no record.
        self.without_results: list[str] = []

    def curves(self, as_listed: bool = False, unseal: bool = False) -> list[Curve]:
        """The contents of `<input_dir>/*/results.jsonl`, sorted by name or `as_listed`.

        What cannot be read is named on stderr and skipped. Sealed runs are refused, unless with
        `unseal`: then their test accuracies are read too, and looks.jsonl notes it.
        """
        runs, skipped, sealed = {}, [], []
        for name in console.bar(sorted(self.listing), unit="run", leave=False):
            runs[name], problem = _read(f"{self.path}/{name}", unseal)
            if not unseal and problem.endswith(curves.SEALED):
                sealed.append(name)
            skipped += [problem] if problem else []
        if sealed:
            raise ValueError(
                f"{self.path}: the test accuracies of {len(sealed)} of its runs are sealed, for "
                f"example of {sealed[0]}. When all choices are made, `collect_results --unseal` "
                f"reads them, and notes in {LOOKS} that it did.")
        if unseal:
            self._note_look([name for name in runs
                             if os.path.exists(f"{self.path}/{name}/{files.SEALED}")])
        self.without_results = [name for name, found in runs.items() if not found]
        more = len(skipped) - _MOST_WARNINGS
        curves.say_skipped(skipped[:_MOST_WARNINGS] + [f"{more} more in {self.path}"] * (more > 0))
        return [curve for name in (self.listing if as_listed else runs) for curve in runs[name]]

    def _note_look(self, names: list[str]) -> None:
        """Notes in looks.jsonl and on stderr that the test accuracies of these runs are read."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        if names:
            files.append_record(self.path, {"time": now, "runs": names}, LOOKS)
            n = files.read_bytes(self.path / LOOKS).count(b"\n")
            print(f"Unsealed {len(names)} runs. This is look {n} at test accuracies of this "
                  f"sweep; {self.path / LOOKS} has them all.", file=sys.stderr)


def _read(folder: str, unseal: bool) -> tuple[list[Curve], str]:
    """The curves of a run, and what is wrong with its results.jsonl; "" if nothing is."""
    path = f"{folder}/{files.RESULTS}"
    try:
        content = files.read_bytes(path)
    except OSError as error:
        if not os.path.isdir(folder):
            return [], f"{folder}: not the folder of a run"
        if isinstance(error, FileNotFoundError):
            return [], f"{folder}: no results.jsonl yet"
        return [], f"{path}: {error.strerror}"
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    if lines and (curve := _one_curve(lines, content)):
        return [curve], ""
    broken = []
    records = map(_decode, lines)
    if unseal and (sealed := _sealed(folder)):
        records = (record | sealed.get(str(record.get("step")), {})
                   if isinstance(record, dict) else record for record in records)
    found = curves.of_records(records, broken)
    if not broken:
        return found, "" if found else f"{path}: empty"
    return found, curves.describe_broken(path, broken)


def _sealed(folder: str) -> dict:
    """{step as text: the sealed accuracies of a run's record}."""
    try:
        lines = files.read_bytes(f"{folder}/{files.SEALED}").splitlines()
    except OSError:
        return {}
    found = {}
    for record in map(_decode, lines):
        if isinstance(record, dict):
            found[str(record.get("step"))] = {
                name: value for name, value in record.items() if name.endswith("_acc")}
    return found


def _decode(line: bytes):
    """A line's content; None if it is not JSON."""
    if line.count(b"[") + line.count(b"{") <= _MOST_BRACKETS:
        with contextlib.suppress(ValueError):
            return msgspec.json.decode(line)
    with contextlib.suppress(ValueError):  # slow, and accepts NaN
        return parse_json(line)
    return None


def _one_curve(lines: list[bytes], content: bytes) -> Curve | None:
    """The curve of a file with only one, as most have, in half the time of `of_records`."""
    first = _decode(lines[0])
    if curves.problem(first):
        return None
    try:
        names, decoder, values, settings = _decoder(tuple(first))
        records = decoder.decode_lines(content)
    except (ValueError, msgspec.DecodeError):  # msgspec refuses names with quotes
        return None
    same = settings(records[0])
    if len(records) != len(lines) or any(settings(record) != same for record in records):
        return None
    steps, *accuracies = columns = list(zip(*map(values, records)))
    if min(steps) < 0 or max(steps) >= curves.MOST_STEPS or any(
            min(column) < 0 or max(column) > 1 for column in accuracies):
        return None  # `curves.problem` says which
    return Curve(first["args"], first["hparams"], first.get("selection"),
                 dict(zip(names, columns)), curves.teacher_problem(first), first.get("metric"))


@functools.cache
def _decoder(keys: tuple[str, ...]) -> tuple[tuple, msgspec.json.Decoder, Callable, Callable]:
    """For records with these keys: their columns, a decoder, and getters of columns and settings.

    The decoder reads steps and accuracies. All else stays text; settings are compared as such.
    """
    names = curves.columns(keys)  # at least the step and an accuracy
    fields = {key: f"field{i}" for i, key in enumerate(keys)}  # keys need not be identifiers
    types = {name: int | float for name in names} | {"step": int}
    record = msgspec.defstruct(
        "Record", [(field, types.get(key, msgspec.Raw)) for key, field in fields.items()],
        rename={field: key for key, field in fields.items()}, forbid_unknown_fields=True, gc=False)
    settings = (fields[key] for key in ("args", "hparams", "selection", "metric") if key in fields)
    return (names, msgspec.json.Decoder(record),
            operator.attrgetter(*map(fields.get, names)), operator.attrgetter(*settings))


class Run(NamedTuple):
    """A run's place in a sweep; `algorithm` is the table row (see `curves.row`)."""

    dataset: str
    algorithm: str
    test_envs: tuple[int, ...]
    trial_seed: int
    hparams_seed: int

    @classmethod
    def of(cls, args: dict) -> "Run":
        """The run with these arguments."""
        return cls(args["dataset"], curves.row(args), tuple(args["test_envs"]),
                   args["trial_seed"], args["hparams_seed"])


def _setting(args: dict, name: str):
    """A setting that a cell's runs must share; hparams without those that the row's name shows."""
    value = args.get(name)
    if name == "hparams" and args.get("recipe"):
        return f"those of {args['recipe']}"
    if name != "hparams" or not isinstance(value, str) or curves.row(args) == args["algorithm"]:
        return value
    return composition.without_own(value)


class Coverage(NamedTuple):
    """How many of a cell's runs have finished, out of how many, and their settings."""

    n_finished: int
    n_expected: int
    #: Values of `folder.args.SETTINGS`, as text.
    settings: frozenset[tuple]
    #: Problems of bad teachers from which runs learnt anyway.
    teacher_problems: frozenset[str] = frozenset()


class Grid:
    """The runs that a sweep has, and those that it would have if it were complete.

    A complete sweep has every combination of trial seed, hparams seed, algorithm and dataset that
    occur, with every environment held out, and every pair of them if any pair occurs. A run has
    finished when its last record is at step `args.steps - 1` or, without that argument, at the last
    step of the longest run on its dataset. `planned` are the args of runs without records.

    `trained` are (run, curve) pairs: several for a run in several folders or with several settings.
    `n_steps` is that of the longest run on each dataset.

    Raises:
        ValueError: if runs were measured by different metrics, or those of a column train on
            different domains.
    """

    def __init__(self, found: Iterable[Curve], planned: Iterable[dict] = ()):
        self.n_envs, self.n_steps = Counter(), Counter()
        self.trained: list[tuple[Run, Curve]] = []
        self.teacher_problems: dict[Run, set[str]] = defaultdict(set)
        last_step, longest, with_records = {}, Counter(), {}
        for curve in found:
            args = curve.args
            run = Run.of(args)
            self.n_envs[run.dataset] = max(
                self.n_envs[run.dataset], curves.n_envs(tuple(curve.columns)))
            with_records[run] = args
            self.trained.append((run, curve))
            if curve.teacher_problem:
                self.teacher_problems[run].add(curve.teacher_problem)
            settings = tuple(str(_setting(args, name)) for name in SETTINGS)
            steps = args.get("steps")
            step = max(curve.columns["step"])
            self.n_steps[run.dataset] = max(self.n_steps[run.dataset], step + 1)
            key = run, settings, steps
            last_step[key] = max(last_step.get(key, 0), step)
            longest[run.dataset, steps] = max(longest[run.dataset, steps], step)
        by_run = {Run.of(args): args for args in planned}
        #: {run: args} of the runs that have records, and of those that only have a folder.
        self.begun = by_run | with_records
        for run in by_run:
            if run.dataset not in self.n_steps:  # no record shows how many there are
                self.n_envs[run.dataset] = max(self.n_envs[run.dataset], max(run.test_envs) + 1)

        self.settings: dict[Run, set[tuple]] = defaultdict(set)
        self.finished: set[Run] = set()
        for (run, settings, steps), step in last_step.items():
            self.settings[run].add(settings)
            if step >= (steps - 1 if steps else longest[run.dataset, steps]):
                self.finished.add(run)
        self.datasets, self.algorithms, _, self.trial_seeds, self.hparams_seeds = (
            sorted(set(values)) for values in zip(*self.begun)) if self.begun else ([],) * 5
        self.metric = self._one_metric()
        self.has_pairs = any(len(run.test_envs) == 2 for run in self.begun)

    def _one_metric(self) -> str:
        """The metric of all runs, in words."""
        found = {}
        for run, curve in self.trained:
            found.setdefault(tasks.metric_name(curve.metric), run.dataset)
        if len(found) > 1:
            (one, here), (other, there), *_ = found.items()
            raise ValueError(f"Some runs on {here} were measured by {one}, some on {there} by "
                             f"{other}: these cannot share a table. Keep them in two folders.")
        return next(iter(found), tasks.CLASSIFICATION.metric)

    @functools.cached_property
    def env_sets(self) -> dict[str, list[tuple[int, ...]]]:
        """{dataset: the sets of test envs in a complete sweep, in DomainBed's order}."""
        sizes = (1, 2) if self.has_pairs else (1,)
        found = {dataset: sorted(
            envs for k in sizes for envs in itertools.combinations(range(n), k))
            for dataset, n in self.n_envs.items()}
        return found | self._together

    @functools.cached_property
    def _together(self) -> dict[str, list[tuple[int, ...]]]:
        """The same for datasets on which a run holds out more than two: those sets that occur."""
        found = {dataset: sorted({r.test_envs for r in self.begun if r.dataset == dataset})
                 for dataset in {run.dataset for run in self.begun if len(run.test_envs) > 2}}
        for dataset, sets in found.items():
            for one, other in itertools.combinations(sets, 2):
                if not set(one).isdisjoint(other):
                    words = (" ".join(map(str, envs)) for envs in (one, other))
                    raise ValueError("Some runs on {} hold out {}, some {}: these cannot share a "
                                     "column. Keep them in two folders.".format(dataset, *words))
        return found

    @property
    def held_out(self) -> dict[str, list[int]]:
        """{dataset: the domains held out in a complete sweep, alone or with others}."""
        return {dataset: sorted({env for envs in sets for env in envs})
                for dataset, sets in self.env_sets.items()}

    def runs(self, dataset: str, algorithm: str) -> list[Run]:
        """All runs of an algorithm on a dataset in a complete sweep."""
        return [Run(dataset, algorithm, *rest) for rest in itertools.product(
            self.env_sets[dataset], self.trial_seeds, self.hparams_seeds)]

    def coverage(self, dataset: str, algorithm: str, env: int, pairs: bool) -> Coverage:
        """Of the runs that hold out `env` alone and, with `pairs`, those together with another."""
        sets = [envs for envs in self.env_sets[dataset]
                if env in envs and (pairs or len(envs) != 2)]
        n_finished, settings, problems = 0, set(), set()
        for envs in sets:
            found = self._found.get((dataset, algorithm, envs), [])
            n_finished += sum(run in self.finished for run in found)
            settings.update(*(self.settings[run] for run in found))
            problems.update(*(self.teacher_problems.get(run, ()) for run in found))
        return Coverage(n_finished, len(sets) * len(self.trial_seeds) * len(self.hparams_seeds),
                        frozenset(settings), frozenset(problems))

    @functools.cached_property
    def _found(self) -> dict[tuple[str, str, tuple[int, ...]], list[Run]]:
        """The runs that have records, by (dataset, algorithm, test envs)."""
        found = defaultdict(list)
        for run in self.settings:
            found[run[:3]].append(run)
        return found

    @functools.cached_property
    def n_runs(self) -> int:
        """How many runs the complete sweep has."""
        return sum(map(len, self.env_sets.values())) * len(self.algorithms) * len(
            self.trial_seeds) * len(self.hparams_seeds)

    def absent(self) -> list[Run]:
        """The runs that do not exist or have not finished."""
        return [run for dataset in self.datasets for algorithm in self.algorithms
                for run in self.runs(dataset, algorithm) if run not in self.finished]

    def unfinished(self) -> dict[Run, str]:
        """{run: its folder's name} of the runs that have begun and not finished."""
        names = {run: os.path.basename(str(args.get("output_dir") or ""))
                 for run, args in self.begun.items() if run not in self.finished}
        return {run: name for run, name in names.items() if name}


def whole_grid(folder: Folder, found: list[Curve]) -> Grid:
    """The grid of a sweep's curves, and of its runs without results."""
    planned = files.without_results(folder.path, folder.without_results)
    if not found and not planned and not any(
            files.has_begun(folder.path / name) for name in folder.without_results):
        raise ValueError(f"--input_dir {folder.path}: it holds no runs.")
    return Grid(found, planned)
