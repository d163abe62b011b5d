"""A sweep's folder read back: the records of its runs, and the runs that it lacks."""

import contextlib
import functools
import gc
import itertools
import operator
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from domainbed_kd.folder import curves, files
from domainbed_kd.folder.args import PROTOCOL
from domainbed_kd.folder.curves import Curve
from domainbed_kd.results import record_cache

# What collect_results and report leave beside the runs.
_OURS = ("results.txt", "results.tex", "results.csv", "results.md", "report.html", "report")
_MOST_WARNINGS = 10


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Inside, nothing looks for cycles: among 100,000 records it takes as long as parsing them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Folder:
    """A sweep's folder as it is now: its runs, and what became of reading them.

    Raises:
        FileNotFoundError: if there is no such folder.
    """

    def __init__(self, input_dir: str | Path):
        self.path = Path(input_dir)
        if not self.path.is_dir():
            raise FileNotFoundError(f"--input_dir {input_dir}: there is no such folder.")
        with os.scandir(self.path) as entries:
            entries = sorted(
                (e for e in entries if not e.name.startswith(".") and e.name not in _OURS),
                key=lambda entry: entry.name)
        #: {name: (size in bytes, mtime in ns) of the run's results.jsonl, or None}.
        self.stamps = {entry.name: self._stamp(entry) for entry in entries}
        #: One line for each run that `curves` could not read, or not all of it.
        self.skipped: list[str] = []
        #: Names of the folders in which `curves` found no record.
        self.without_results: list[str] = []
        self.is_large = len(self.stamps) >= record_cache.LEAST_RUNS

    @staticmethod
    def _stamp(entry: os.DirEntry) -> tuple[int, int] | None:
        try:
            found = os.stat(f"{entry.path}/results.jsonl")
        except OSError:  # `curves` names it
            return None
        return found.st_size, found.st_mtime_ns

    @_no_garbage()
    def curves(self) -> list[Curve]:
        """What `<input_dir>/*/results.jsonl` hold, in order of folder, then of line.

        What cannot be read is named on stderr and skipped. A large sweep is read from
        `record_cache` where nothing changed.
        """
        cache_path = self.path / ".records.npz"
        cached = record_cache.load(cache_path) if self.is_large else {}
        runs, self.skipped, n_parsed = {}, [], 0
        stamps, folder = self.stamps.items(), str(self.path)
        if sys.stderr.isatty():
            from tqdm import tqdm  # which takes as long as to read a thousand runs

            stamps = tqdm(stamps, unit="run", leave=False)
        for name, stamp in stamps:
            known = cached.get(name)
            if known and known[0] == stamp:
                runs[name] = known
                continue
            found, problem = self._parse(f"{folder}/{name}", stamp)
            n_parsed += 1
            if problem:  # said each time, so read each time
                self.skipped.append(problem)
            runs[name] = (None if problem else stamp), found
        self.without_results = [name for name, (_, found) in runs.items() if not found]
        for line in self.skipped[:_MOST_WARNINGS]:
            print(f"skipped {line}", file=sys.stderr)
        if len(self.skipped) > _MOST_WARNINGS:
            print(f"skipped {len(self.skipped) - _MOST_WARNINGS} more in {self.path}",
                  file=sys.stderr)
        # To write it takes as long as to parse a twentieth of the runs.
        if self.is_large and 20 * (n_parsed - len(self.skipped)) > len(runs):
            record_cache.save(cache_path, {name: run for name, run in runs.items() if run[0]})
        return [curve for _, found in runs.values() for curve in found]

    @staticmethod
    def _parse(path: str, stamp: tuple[int, int] | None) -> tuple[list[Curve], str]:
        try:
            return _read(f"{path}/results.jsonl", stamp[0] if stamp else -1)
        except OSError as error:
            if not os.path.isdir(path):
                return [], f"{path}: not the folder of a run"
            if isinstance(error, FileNotFoundError):
                return [], f"{path}: no results.jsonl yet"
            return [], f"{path}/results.jsonl: {error.strerror}"

    @_no_garbage()
    def answer(self, *question: str, make: Callable[[], list[str]],
               holds: Callable[[list[str]], bool] = lambda answer: True) -> list[str]:
        """What `make` returns, kept beside a large sweep for as long as nothing changes.

        A sweep with something to skip is read each time, so that each time it is said. `holds`
        tells of an answer that was kept whether it is still true of what is not in results.jsonl.
        """
        if not self.is_large:
            return make()
        path = record_cache.answer_path(self.path, *question)
        of = record_cache.fingerprint(self.stamps)
        answer = record_cache.load_answer(path, of)
        if answer is None or not holds(answer):
            answer = make()
            if not self.skipped:
                record_cache.save_answer(path, of, answer)
        return answer


def _read(path: str, size: int) -> tuple[list[Curve], str]:
    """The curves in a file of `size` bytes (-1: all of it), and what is wrong with it, or ""."""
    with files.open_regular(path) as file:
        content = file.read(size)
        if len(content) < size:  # as some network file systems have it
            content += file.readall()
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    if lines and (curve := _one_curve(lines, content)):
        return [curve], ""
    broken = []
    found = curves.of_records(map(_decode, lines), broken)
    if not broken:
        return found, "" if found else f"{path}: empty"
    return found, curves.describe_broken(path, broken)


def _decode(line: bytes):
    """What a line says; None where it is not JSON."""
    for decode in (msgspec.json.decode, files.parse_json):  # the second is slow and knows NaN
        with contextlib.suppress(ValueError, RecursionError):
            return decode(line)
    return None


def _one_curve(lines: list[bytes], content: bytes) -> Curve | None:
    """The curve of a file that has one, as most do, in half the time of looking at each record."""
    first = _decode(lines[0])
    if not curves.is_record(first):
        return None
    names, decoder, values, settings = _decoder(tuple(first))
    try:
        records = decoder.decode_lines(content)
    except msgspec.DecodeError:
        return None
    same = settings(records[0])
    if len(records) != len(lines) or any(settings(record) != same for record in records):
        return None
    return Curve(first["args"], first["hparams"], first.get("selection"),
                 dict(zip(names, zip(*map(values, records)))), curves.teacher_problem(first))


@functools.cache
def _decoder(keys: tuple[str, ...]) -> tuple[tuple, msgspec.json.Decoder, Callable, Callable]:
    """For records with these keys: their columns, a decoder, and what takes from what it decodes.

    It decodes steps and accuracies; the rest stays text, of which settings must be equal.
    """
    names = curves.columns(keys)  # at least the step and an accuracy
    fields = {key: f"field{i}" for i, key in enumerate(keys)}  # a key need be no identifier
    types = {name: float for name in names} | {"step": int}
    record = msgspec.defstruct(
        "Record", [(field, types.get(key, msgspec.Raw)) for key, field in fields.items()],
        rename={field: key for key, field in fields.items()}, forbid_unknown_fields=True, gc=False)
    settings = (fields[key] for key in ("args", "hparams", "selection") if key in fields)
    return (names, msgspec.json.Decoder(record),
            operator.attrgetter(*map(fields.get, names)), operator.attrgetter(*settings))


class Run(NamedTuple):
    """What tells the runs of a sweep apart."""

    dataset: str
    algorithm: str
    test_envs: tuple[int, ...]
    trial_seed: int
    hparams_seed: int

    @classmethod
    def of(cls, args: dict) -> "Run":
        """The run with these arguments."""
        return cls(args["dataset"], args["algorithm"], tuple(args["test_envs"]),
                   args["trial_seed"], args["hparams_seed"])


class Coverage(NamedTuple):
    """How many of a cell's runs have finished, of how many, and by which protocols they ran."""

    n_finished: int
    n_expected: int
    protocols: frozenset[tuple]
    #: What was wrong with teachers that runs learnt from all the same.
    teacher_problems: frozenset[str] = frozenset()


class Grid:
    """The runs that a sweep has, and those that it would have if it were whole.

    Whole means every trial seed x hparams seed x algorithm x dataset that occurs anywhere, on
    every environment, and on every pair of them if any pair occurs. A run has finished when its
    last record is at step `args.steps - 1` or, without that argument, where the longest of its
    dataset's runs ends. `args` are those of each run that has records; `trained` has them with
    their curves, of which a run in several folders, or of several protocols, has several;
    `n_steps` is how many the longest run on each dataset made.

    Args:
        found: the curves of all runs.
        planned: the args of runs without records; they occur like the others.
    """

    def __init__(self, found: Iterable[Curve], planned: Iterable[dict] = ()):
        self.n_envs, self.args, self.n_steps = Counter(), {}, Counter()
        self.trained: list[tuple[Run, Curve]] = []
        self.teacher_problems: dict[Run, set[str]] = defaultdict(set)
        last_step, longest = {}, Counter()
        for curve in found:
            args = curve.args
            run = Run.of(args)
            self.n_envs[run.dataset] = max(
                self.n_envs[run.dataset], curves.n_envs(tuple(curve.columns)))
            self.args[run] = args
            self.trained.append((run, curve))
            if curve.teacher_problem:
                self.teacher_problems[run].add(curve.teacher_problem)
            protocol, steps = tuple(map(str, map(args.get, PROTOCOL))), args.get("steps")
            step = max(curve.columns["step"])
            self.n_steps[run.dataset] = max(self.n_steps[run.dataset], step + 1)
            key = run, protocol, steps
            last_step[key] = max(last_step.get(key, 0), step)
            longest[run.dataset, steps] = max(longest[run.dataset, steps], step)
        by_run = {Run.of(args): args for args in planned}
        #: {run: args} of the runs that have records, and of those that only have a folder.
        self.begun = by_run | self.args
        for run in by_run:
            if run.dataset not in self.n_steps:  # no record tells how many there are
                self.n_envs[run.dataset] = max(self.n_envs[run.dataset], max(run.test_envs) + 1)

        self.protocols: dict[Run, set[tuple]] = defaultdict(set)
        self.finished: set[Run] = set()
        for (run, protocol, steps), step in last_step.items():
            self.protocols[run].add(protocol)
            if step >= (steps - 1 if steps else longest[run.dataset, steps]):
                self.finished.add(run)
        self.datasets, self.algorithms, _, self.trial_seeds, self.hparams_seeds = (
            sorted(set(values)) for values in zip(*self.begun)) if self.begun else ([],) * 5
        self.has_pairs = any(len(run.test_envs) == 2 for run in self.begun)

    def test_env_sets(self, dataset: str) -> list[tuple[int, ...]]:
        """The sets of test envs that the dataset's runs would hold out, in DomainBed's order."""
        envs = range(self.n_envs[dataset])
        return sorted([(i,) for i in envs]
                      + (list(itertools.combinations(envs, 2)) if self.has_pairs else []))

    def runs(self, dataset: str, algorithm: str) -> list[Run]:
        """All runs that the sweep would have of an algorithm on a dataset."""
        return [Run(dataset, algorithm, *rest) for rest in itertools.product(
            self.test_env_sets(dataset), self.trial_seeds, self.hparams_seeds)]

    def coverage(self, dataset: str, algorithm: str, env: int, pairs: bool) -> Coverage:
        """Of the runs that hold out `env` alone and, with `pairs`, together with another."""
        sets = [envs for envs in self.test_env_sets(dataset)
                if env in envs and (pairs or len(envs) == 1)]
        n_finished, protocols, problems = 0, set(), set()
        for envs in sets:
            found = self._found.get((dataset, algorithm, envs), [])
            n_finished += sum(run in self.finished for run in found)
            protocols.update(*(self.protocols[run] for run in found))
            problems.update(*(self.teacher_problems.get(run, ()) for run in found))
        return Coverage(n_finished, len(sets) * len(self.trial_seeds) * len(self.hparams_seeds),
                        frozenset(protocols), frozenset(problems))

    @functools.cached_property
    def _found(self) -> dict[tuple[str, str, tuple[int, ...]], list[Run]]:
        """The runs that are there, by (dataset, algorithm, test envs)."""
        found = defaultdict(list)
        for run in self.protocols:
            found[run[:3]].append(run)
        return found

    def absent(self) -> list[Run]:
        """The runs that are not there or have not finished."""
        return [run for dataset in self.datasets for algorithm in self.algorithms
                for run in self.runs(dataset, algorithm) if run not in self.finished]
