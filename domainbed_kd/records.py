"""A sweep's folder read back: the records of its runs, and the runs that it lacks."""

import contextlib
import functools
import gc
import itertools
import json
import operator
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

from domainbed_kd import record_cache

#: Arguments in which runs of one cell must agree for their accuracies to be compared.
PROTOCOL = ("steps", "hparams", "task", "fast")
# What collect_results and report leave beside the runs.
_OURS = ("results.txt", "results.tex", "results.csv", "results.md", "report.html", "report")
_MOST_WARNINGS = 10
_STEP = operator.itemgetter("step")
# Arguments by which runs are compared or named.
_ONE_VALUE = (*PROTOCOL, "data_dir", "output_dir", "holdout_fraction", "uda_holdout_fraction",
              "checkpoint_freq", "skip_model_save")


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
        #: One line for each run that `records` could not read, or not all of it.
        self.skipped: list[str] = []
        self.is_large = len(self.stamps) >= record_cache.LEAST_RUNS

    @staticmethod
    def _stamp(entry: os.DirEntry) -> tuple[int, int] | None:
        try:
            found = os.stat(f"{entry.path}/results.jsonl")
        except OSError:  # `records` names it
            return None
        return found.st_size, found.st_mtime_ns

    @_no_garbage()
    def records(self) -> list[dict]:
        """What `load` returns."""
        cache_path = self.path / ".records.npz"
        cached = record_cache.load(cache_path) if self.is_large else {}
        runs, self.skipped, n_parsed = {}, [], 0
        stamps = self.stamps.items()
        if sys.stderr.isatty():
            from tqdm import tqdm  # which takes as long as to read a thousand runs

            stamps = tqdm(stamps, unit="run", leave=False)
        for name, stamp in stamps:
            known = cached.get(name)
            if known and known[0] == stamp:
                runs[name] = known
                continue
            found, problem = self._parse(str(self.path / name))
            n_parsed += 1
            if problem:  # said each time, so read each time
                self.skipped.append(problem)
            runs[name] = (None if problem else stamp), found
        for line in self.skipped[:_MOST_WARNINGS]:
            print(f"skipped {line}", file=sys.stderr)
        if len(self.skipped) > _MOST_WARNINGS:
            print(f"skipped {len(self.skipped) - _MOST_WARNINGS} more in {self.path}",
                  file=sys.stderr)
        # To write it takes as long as to parse a twentieth of the runs.
        if self.is_large and 20 * (n_parsed - len(self.skipped)) > len(runs):
            record_cache.save(cache_path, {name: run for name, run in runs.items() if run[0]})
        return [record for _, found in runs.values() for record in found]

    @staticmethod
    def _parse(path: str) -> tuple[list[dict], str]:
        try:
            return _read(f"{path}/results.jsonl")
        except OSError as error:
            if not os.path.isdir(path):
                return [], f"{path}: not the folder of a run"
            if isinstance(error, FileNotFoundError):
                return [], f"{path}: no results.jsonl yet"
            return [], f"{path}/results.jsonl: {error.strerror}"

    def answer(self, *question: str, make: Callable[[], list[str]]) -> list[str]:
        """What `make` returns, kept beside a large sweep for as long as nothing changes.

        A sweep with something to skip is read each time, so that each time it is said.
        """
        if not self.is_large:
            return make()
        path = record_cache.answer_path(self.path, *question)
        of = record_cache.fingerprint(self.stamps)
        answer = record_cache.load_answer(path, of)
        if answer is None:
            answer = make()
            if not self.skipped:
                record_cache.save_answer(path, of, answer)
        return answer


def load(input_dir: str | Path) -> list[dict]:
    """The records in `<input_dir>/*/results.jsonl`, in order of folder, then of line.

    A record keeps `args`, `hparams`, `step`, `selection` and its accuracies; losses and times
    are dropped, and `args` and `hparams` are shared by the records of a run. What cannot be read
    is named on stderr and skipped. A large sweep is read from `record_cache` where nothing
    changed.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    return Folder(input_dir).records()


def _decode(content: bytes) -> list:
    """What json.loads makes of each line, NaN included; None where it is not JSON."""
    lines = content.removesuffix(b"\n")
    try:  # all at once, in half the time
        found = orjson.loads(b"[%b]" % lines.replace(b"\n", b","))
        if len(found) == lines.count(b"\n") + 1:
            return found
    except orjson.JSONDecodeError:
        pass
    return [_decode_line(line) for line in lines.split(b"\n")] if content else []


def _decode_line(line: bytes):
    try:
        return json.loads(line)
    except ValueError:
        return None


def _read(path: str) -> tuple[list[dict], str]:
    """A file's records, and what is wrong with it ("" if nothing)."""
    records, broken = [], []
    args = hparams = names = types = pick = None
    with open(path, "rb", buffering=0) as file:  # read whole, which needs no buffer
        content = file.readall()
    for number, record in enumerate(_decode(content), 1):
        # Most records are as the last one but for their numbers, and need no closer look.
        if not (type(record) is dict and tuple(record) == names
                and [*map(type, values := pick(record))] == types
                and record["args"] == args and record["hparams"] == hparams):
            if not _is_record(record):
                broken.append(number)
                continue
            names = tuple(record)
            kept_names, pick = _kept(names)
            types = [*map(type, values := pick(record))]
            # One object for all of a run's records: they are most of its memory.
            if record["args"] != args:
                args = record["args"]
            if record["hparams"] != hparams:
                hparams = record["hparams"]
            like = {**dict.fromkeys(kept_names), "args": args, "hparams": hparams}
        kept = like.copy()  # in half the time of a new one
        kept.update(zip(kept_names, values))
        records.append(kept)
    if not broken:
        return records, "" if records else f"{path}: empty"
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return records, f"{path}: line {broken[0]}{more}, no record of DomainBed's"


@functools.cache
def _kept(names: tuple[str, ...]) -> tuple[list[str], Callable]:
    """Which of a record's values are kept, and what takes them out of it."""
    kept = [n for n in names if n in ("step", "selection") or n.endswith("_acc")]
    return kept, operator.itemgetter(*kept)  # at least the step and an accuracy


def _is_record(record) -> bool:
    """Whether model selection can read it; ERM++'s second stage only has `fd_` accuracies."""
    try:
        args = record["args"]
        if not all(isinstance(i, int) for i in args["test_envs"]):
            return False
        splits = ("out",) if args.get("fast") else ("in", "out")
        accuracies = _accuracies(tuple(record), tuple(args["test_envs"]), splits)
        if not accuracies or any(type(record[name]) is not float for name in accuracies):
            return False
        if not {list, dict}.isdisjoint(map(type, map(args.get, _ONE_VALUE))):
            return False
        if not isinstance(args.get("steps"), (int, type(None))):
            return False
        return (isinstance(args["dataset"], str) and isinstance(args["algorithm"], str)
                and isinstance(args["trial_seed"], int) and isinstance(args["hparams_seed"], int)
                and isinstance(record["step"], int) and isinstance(record["hparams"], dict)
                and len(set(args["test_envs"])) == len(args["test_envs"]) > 0)
    except (TypeError, KeyError):
        return False


@functools.cache
def _accuracies(names: tuple[str, ...], test_envs: tuple[int, ...],
                splits: tuple[str, ...]) -> list[str]:
    """The accuracies among the names; none if some that these test envs call for are not there.

    Both splits of a test domain must be there, and these `splits` of every domain.
    """
    n_envs = _n_envs(names)
    wanted = {f"env{i}_{split}_acc" for i in range(n_envs) for split in splits}
    for i in test_envs:
        own = {f"env{i}_in_acc", f"env{i}_out_acc"}
        wanted |= own if f"env{i}_in_acc" in names else {f"fd_env{i}_in_acc"}
    if wanted - set(names) or (n_envs and not set(test_envs) < set(range(n_envs))):
        return []
    return [name for name in names if name.endswith("_acc")]


class Cell(list):
    """The records of one trial, dataset, algorithm and test env."""

    @functools.cached_property
    def by_seed(self) -> dict[int, list[dict]]:
        """The records of each draw of hparams, in the order of hparams_seed."""
        found = defaultdict(list)
        for record in self:
            found[record["args"]["hparams_seed"]].append(record)
        return dict(sorted(found.items()))


def by_cell(records: Iterable[dict]) -> dict[tuple[int, str, str, int], Cell]:
    """Records by (trial_seed, dataset, algorithm, test env), in the order of these keys.

    A run with two test envs belongs to two cells.
    """
    cells = defaultdict(Cell)
    for record in records:
        args = record["args"]
        for env in args["test_envs"]:
            cells[args["trial_seed"], args["dataset"], args["algorithm"], env].append(record)
    return dict(sorted(cells.items()))


@functools.cache
def _n_envs(names: tuple[str, ...]) -> int:
    return len({name.split("_")[0] for name in names
                if name.startswith("env") and name.endswith(("_in_acc", "_out_acc"))})


class Run(NamedTuple):
    """What tells the runs of a sweep apart."""

    dataset: str
    algorithm: str
    test_envs: tuple[int, ...]
    trial_seed: int
    hparams_seed: int


class Coverage(NamedTuple):
    """How many of a cell's runs have finished, of how many, and by which protocols they ran."""

    n_finished: int
    n_expected: int
    protocols: frozenset[tuple]


class Grid:
    """The runs that a sweep has, and those that it would have if it were whole.

    Whole means every trial seed x hparams seed x algorithm x dataset that occurs anywhere, on
    every environment, and on every pair of them if any pair occurs. A run has finished when its
    last record is at step `args.steps - 1` or, without that argument, where the longest of its
    dataset's runs ends. `args` and `hparams` are those of each run that is there; `n_steps`
    is how many the longest run on each dataset made.
    """

    def __init__(self, records: Iterable[dict]):
        self.n_envs, self.args, self.hparams, self.n_steps = Counter(), {}, {}, Counter()
        last_step, longest = {}, Counter()
        for _, group in itertools.groupby(records, key=lambda record: id(record["args"])):
            group = list(group)
            args = group[0]["args"]
            run = Run(args["dataset"], args["algorithm"], tuple(args["test_envs"]),
                      args["trial_seed"], args["hparams_seed"])
            self.n_envs[run.dataset] = max(self.n_envs[run.dataset], _n_envs(tuple(group[0])))
            self.args[run], self.hparams[run] = args, group[0]["hparams"]
            protocol, steps = tuple(str(args.get(name)) for name in PROTOCOL), args.get("steps")
            step = max(map(_STEP, group))
            self.n_steps[run.dataset] = max(self.n_steps[run.dataset], step + 1)
            key = run, protocol, steps
            last_step[key] = max(last_step.get(key, 0), step)
            longest[run.dataset, steps] = max(longest[run.dataset, steps], step)

        self.protocols: dict[Run, set[tuple]] = defaultdict(set)
        self.finished: set[Run] = set()
        for (run, protocol, steps), step in last_step.items():
            self.protocols[run].add(protocol)
            if step >= (steps - 1 if steps else longest[run.dataset, steps]):
                self.finished.add(run)
        self.datasets, self.algorithms, _, self.trial_seeds, self.hparams_seeds = (
            sorted(set(values)) for values in zip(*self.protocols)
        ) if self.protocols else ([],) * 5
        self.has_pairs = any(len(run.test_envs) == 2 for run in self.protocols)

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
        n_finished, protocols = 0, set()
        for envs in sets:
            found = self._found.get((dataset, algorithm, envs), [])
            n_finished += sum(run in self.finished for run in found)
            protocols.update(*(self.protocols[run] for run in found))
        return Coverage(n_finished, len(sets) * len(self.trial_seeds) * len(self.hparams_seeds),
                        frozenset(protocols))

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
