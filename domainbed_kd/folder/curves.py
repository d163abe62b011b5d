"""A run's records: which lines are valid, their columns, and which one is selected.

Tables use columns (`Curve`), which take a fraction of the memory of whole records.
"""

import functools
import itertools
import math
import operator
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from domainbed_kd.console import parse_hparams
from domainbed_kd.folder import composition, files
from domainbed_kd.folder.args import are_args
from domainbed_kd.folder.foreign import parse_json

#: Marks rows whose runs fix a defect of DomainBed's.
MENDED = " (mended)"
#: Marks rows whose runs repeat a published experiment.
AUTHORS = " (authors' protocol)"
#: The problem of a record whose test accuracies are in sealed.jsonl, by `train --seal`.
SEALED = "its test accuracies are sealed"
# A record with a larger step is damaged.
MOST_STEPS = 2 ** 53


class Curve(NamedTuple):
    """Consecutive records of a run that differ only in step and accuracies."""

    args: dict
    hparams: dict
    #: How to choose among the records: "last" (SWAD), or None.
    selection: str | None
    #: {"step": one value for each record, "env0_in_acc": values in [0, 1], ...}.
    columns: dict[str, tuple]
    #: The problem of a bad teacher that was accepted; None if there was none.
    teacher_problem: str | None = None
    #: The recorded metric, see `tasks.Task.on_record`; None for accuracy.
    metric: str | None = None
    #: The search's test domain, if the run holds out three or more.
    env: int | None = None

    def records(self) -> Iterator[dict]:
        """The records, without losses, times and teachers."""
        same = {"args": self.args, "hparams": self.hparams}
        if self.selection is not None:
            same["selection"] = self.selection
        if self.metric is not None:
            same["metric"] = self.metric
        for row in zip(*self.columns.values()):
            yield {**same, **dict(zip(self.columns, row))}


def n_records(curves: Iterable[Curve]) -> int:
    """How many records the curves hold."""
    return sum(len(curve.columns["step"]) for curve in curves)


def of_records(records: Iterable[dict], broken: list[tuple[int, str]] | None = None
               ) -> list[Curve]:
    """The curves of records, in the order given.

    Args:
        records: from results.jsonl, run after run.
        broken: receives (number from 1, problem) of each record that `problem` refuses and that
            is therefore left out; without it, records are not checked.
    """
    found = []
    last = None
    for number, record in enumerate(records, 1):
        if broken is not None and (what := problem(record)):
            broken.append((number, what))
            continue
        names = columns(tuple(record))
        of_curve = (record["args"], record["hparams"], record.get("selection"), names,
                    record.get("metric"))
        if of_curve != last:
            last, rows = of_curve, []
            found.append((of_curve, rows, teacher_problem(record)))
        rows.append([record[name] for name in names])
    return [Curve(*settings, dict(zip(names, zip(*rows))), teacher, metric)
            for (*settings, names, metric), rows, teacher in found]


def teacher_problem(record: dict) -> str | None:
    """The problem in a run's first record, such as "near chance"; see `teachers.audit`."""
    teacher = record.get("teacher")
    found = teacher.get("problem") if isinstance(teacher, dict) else None
    if not isinstance(found, str):
        return None
    return found.partition(":")[0].removeprefix("is ").removeprefix("has ")


@functools.cache
def columns(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of a record that a curve keeps as columns."""
    return "step", *(key for key in keys if key.endswith("_acc"))


def describe_broken(path: str | Path, broken: list[tuple[int, str]]) -> str:
    """Describes the skipped lines of a results.jsonl: the first, its problem, and how many more."""
    number, what = broken[0]
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return f"{path}: line {number}{more}: {what}"


def problem(record, may_be_sealed: bool = False) -> str:
    """Why model selection cannot read a record; empty if it can.

    Accuracies must be finite numbers in [0, 1]. ERM++'s second stage has only `fd_` accuracies.

    Args:
        record: the content of a line, of any type.
        may_be_sealed: accept a record of `train --seal`, which lacks its test domains.
    """
    unlike = "not a record like DomainBed's"
    try:
        args = record["args"]
        if not are_args(args):
            return unlike
        splits = ("out",) if args.get("fast") else ("in", "out")
        names, test_envs = tuple(record), tuple(args["test_envs"])
        if args.get("seal") and not any(f"env{i}_out_acc" in names for i in test_envs):
            if not may_be_sealed:
                return SEALED
            names += tuple(f"env{i}_{split}_acc" for i in test_envs for split in ("in", "out"))
        accuracies = _accuracies(names, test_envs, splits)
        step = record["step"]
        if not (accuracies and type(step) is int and 0 <= step < MOST_STEPS
                and isinstance(record["hparams"], dict)
                and isinstance(record.get("selection"), (str, type(None)))
                and isinstance(record.get("metric"), (str, type(None)))):
            return unlike
    except (TypeError, KeyError):
        return unlike
    for name in filter(record.__contains__, accuracies):
        value = record[name]
        if type(value) not in (float, int) or not 0 <= value <= 1:
            return f"{name[:40]} is {str(value)[:20]}; an accuracy is a number in [0, 1]"
    return ""


@functools.cache
def _accuracies(names: tuple[str, ...], test_envs: tuple[int, ...],
                splits: tuple[str, ...]) -> list[str]:
    """The accuracies among the names; empty if required ones are missing.

    A test domain needs both splits, and every domain needs these `splits`.
    """
    envs = range(n_envs(names))
    wanted = {f"env{i}_{split}_acc" for i in envs for split in splits}
    for i in test_envs:
        own = {f"env{i}_in_acc", f"env{i}_out_acc"}
        wanted |= own if f"env{i}_in_acc" in names else {f"fd_env{i}_in_acc"}
    if wanted - set(names) or (envs and not set(test_envs) < set(envs)):
        return []
    return [name for name in names if name.endswith("_acc")]


@functools.cache
def n_envs(names: tuple[str, ...]) -> int:
    """How many environments have accuracies among these names."""
    return len({name.split("_")[0] for name in names
                if name.startswith("env") and name.endswith(("_in_acc", "_out_acc"))})


def row(args: dict) -> str:
    """The table row of a run with these args, such as "ERM" or "CORAL + KD(SWAD) + SMA".

    It shows what hparams add to the algorithm (see `composition.row`), " (mended)" if they fix a
    defect of DomainBed's, and " (authors' protocol)" for a recipe.
    """
    name, text = args["algorithm"], args.get("hparams")
    if isinstance(text, str):
        name += _on_top(text)
    return name + AUTHORS if args.get("recipe") else name


@functools.lru_cache(maxsize=10000)
def _on_top(text: str) -> str:
    """What hparams, as JSON, add to the algorithm's name in a row."""
    if not any(word in text for word in ("mended", "upstream_exact", "teacher", "averaging")):
        return ""
    try:
        hparams = parse_hparams(text)
    except ValueError:
        return ""
    return composition.row("", hparams) + (MENDED if hparams.get("mended") else "")


class Search(list):
    """One random search: the curves of one trial, dataset, algorithm and test env."""

    @functools.cached_property
    def by_seed(self) -> dict[int, list[Curve]]:
        """The curves of each draw of hparams, in the order of hparams_seed."""
        found = defaultdict(list)
        for curve in self:
            found[curve.args["hparams_seed"]].append(curve)
        return dict(sorted(found.items()))


def searches(curves: Iterable[Curve]) -> dict[tuple[int, str, str, int], Search]:
    """The curves by (trial_seed, dataset, algorithm, test env), in order of first appearance.

    A run with two test envs belongs to two searches.
    """
    found = defaultdict(Search)
    for curve in curves:
        args = curve.args
        for env in args["test_envs"]:
            if len(args["test_envs"]) > 2:
                curve = curve._replace(env=env)
            found[args["trial_seed"], args["dataset"], row(args), env].append(curve)
    return dict(found)


def read_records(run: str | Path, skipped: list[str] | None = None) -> list[dict]:
    """A run's records with all values; `skipped` is as for `results.to_frame`.

    Sealed records lack the accuracies on their test domains.
    """
    path, found, broken = Path(run, files.RESULTS), [], []
    for number, line in enumerate(files.read_bytes(path).splitlines(), 1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if what := problem(record, may_be_sealed=True):
            broken.append((number, what))
        else:
            found.append(record)
    left_out = [describe_broken(path, broken)] if broken else []
    if skipped is None:
        say_skipped(left_out)
    else:
        skipped += left_out
    return found


def say_skipped(left_out: list[str]) -> None:
    """Lists on stderr what was left out, one line each."""
    for line in left_out:
        print(f"skipped {line}", file=sys.stderr)


def choose(candidates: Iterable[tuple[int, float, Any]], only_last: bool
           ) -> tuple[int, float, Any] | None:
    """DomainBed's rule: the first of (step, validation accuracy, ...) with the best accuracy.

    With `only_last`, for records with `"selection": "last"` (SWAD), the one with the highest step,
    ties to the last. None if there are none.
    """
    if only_last:
        candidates = sorted(candidates, key=operator.itemgetter(0))[-1:]
    return max(candidates, key=operator.itemgetter(1), default=None)


@functools.cache
def validation_columns(names: tuple[str, ...], test_envs: tuple[int, ...]) -> dict[int, str]:
    """{training domain: name of its out-split's accuracy} in a record with these names."""
    every = itertools.takewhile(  # a sealed record has none of its test domains
        lambda i: f"env{i}_out_acc" in names or i in test_envs, itertools.count())
    return {i: f"env{i}_out_acc" for i in every if i not in test_envs}


def mean(values: Sequence[float]) -> float:
    """NumPy's mean, to the last bit, in a tenth of the time."""
    if len(values) >= 8:  # from here on NumPy does not add sequentially
        import numpy as np

        return float(np.add.reduce(values)) / len(values)
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def selected(records: list[dict]) -> dict | None:
    """The record of a run that training-domain validation selects.

    None if all validation accuracies are NaN.
    """
    candidates = [(record["step"], accuracy, record) for record in records
                  if not math.isnan(accuracy := validation_accuracy(record))]
    chosen = choose(candidates, any(r.get("selection") == "last" for *_, r in candidates))
    return chosen and chosen[-1]


def validation_accuracy(record: dict) -> float:
    """Mean accuracy on the training domains' out-splits; NaN if the record has none."""
    names = validation_columns(tuple(record), tuple(record["args"]["test_envs"])).values()
    return mean([record[name] for name in names]) if names else math.nan


def test_accuracy(record: dict) -> float:
    """Mean accuracy on the test domains' in-splits; NaN if the record lacks one."""
    return mean([record.get(f"env{i}_in_acc", math.nan) for i in record["args"]["test_envs"]])
