"""Records of runs as columns: what the tables are made of, at a fraction of the memory."""

import functools
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from domainbed_kd.folder import files
from domainbed_kd.folder.args import are_args


class Curve(NamedTuple):
    """Records of a run, one after the other, that differ in their step and accuracies only."""

    args: dict
    hparams: dict
    #: What the records say of how to choose among them: "last" (SWAD), or None.
    selection: str | None
    #: {"step": of each record, "env0_in_acc": in [0, 1] of each record, ...}.
    columns: dict[str, tuple]
    #: What was wrong with the teacher that the run learnt from all the same; None if nothing was.
    teacher_problem: str | None = None

    def records(self) -> Iterator[dict]:
        """The records; losses, times and teachers are not kept of them."""
        same = {"args": self.args, "hparams": self.hparams}
        if self.selection is not None:
            same["selection"] = self.selection
        for row in zip(*self.columns.values()):
            yield {**same, **dict(zip(self.columns, row))}


def n_records(curves: Iterable[Curve]) -> int:
    """How many records are in curves."""
    return sum(len(curve.columns["step"]) for curve in curves)


def of_records(records: Iterable[dict], broken: list[int] | None = None) -> list[Curve]:
    """The curves of records, which come one run after the other, in their order.

    Args:
        records: as results.jsonl holds them.
        broken: receives the numbers, from 1, of those that are left out as none of DomainBed's;
            without it none is looked at.
    """
    found = []
    last = None
    for number, record in enumerate(records, 1):
        if broken is not None and not is_record(record):
            broken.append(number)
            continue
        names = columns(tuple(record))
        of_curve = record["args"], record["hparams"], record.get("selection"), names
        if of_curve != last:
            last, rows = of_curve, []
            found.append((*of_curve, rows, teacher_problem(record)))
        rows.append([record[name] for name in names])
    return [Curve(*settings, dict(zip(names, zip(*rows))), problem)
            for *settings, names, rows, problem in found]


def teacher_problem(record: dict) -> str | None:
    """The problem in a run's first record, as "near chance"; see `teachers.audit`."""
    teacher = record.get("teacher")
    problem = teacher.get("problem") if isinstance(teacher, dict) else None
    if not isinstance(problem, str):
        return None
    return problem.partition(":")[0].removeprefix("is ").removeprefix("has ")


@functools.cache
def columns(keys: tuple[str, ...]) -> tuple[str, ...]:
    """What is kept of records with these keys."""
    return "step", *(key for key in keys if key.endswith("_acc"))


def describe_broken(path: str | Path, numbers: list[int]) -> str:
    """That the lines of a results.jsonl with these numbers are no records."""
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return f"{path}: line {numbers[0]}{more}, no record of DomainBed's"


def is_record(record) -> bool:
    """Whether model selection can read it; ERM++'s second stage only has `fd_` accuracies."""
    try:
        args = record["args"]
        if not are_args(args):
            return False
        splits = ("out",) if args.get("fast") else ("in", "out")
        accuracies = _accuracies(tuple(record), tuple(args["test_envs"]), splits)
        if not accuracies or any(type(record[name]) not in (float, int) for name in accuracies):
            return False
        return (isinstance(record["step"], int) and isinstance(record["hparams"], dict)
                and isinstance(record.get("selection"), (str, type(None))))
    except (TypeError, KeyError):
        return False


@functools.cache
def _accuracies(names: tuple[str, ...], test_envs: tuple[int, ...],
                splits: tuple[str, ...]) -> list[str]:
    """The accuracies among the names; none if some that these test envs call for are not there.

    Both splits of a test domain must be there, and these `splits` of every domain.
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
    """How many environments the accuracies with these names are of."""
    return len({name.split("_")[0] for name in names
                if name.startswith("env") and name.endswith(("_in_acc", "_out_acc"))})


class Cell(list):
    """The curves of one trial, dataset, algorithm and test env."""

    @functools.cached_property
    def by_seed(self) -> dict[int, list[Curve]]:
        """The curves of each draw of hparams, in the order of hparams_seed."""
        found = defaultdict(list)
        for curve in self:
            found[curve.args["hparams_seed"]].append(curve)
        return dict(sorted(found.items()))


def by_cell(curves: Iterable[Curve]) -> dict[tuple[int, str, str, int], Cell]:
    """Curves by (trial_seed, dataset, algorithm, test env), in the order of these keys.

    A run with two test envs belongs to two cells.
    """
    cells = defaultdict(Cell)
    for curve in curves:
        args = curve.args
        for env in args["test_envs"]:
            cells[args["trial_seed"], args["dataset"], args["algorithm"], env].append(curve)
    return dict(sorted(cells.items()))


# Records as they stand in results.jsonl, and which of a run's counts.


def read_records(run: str | Path, skipped: list[str] | None = None) -> list[dict]:
    """A run's records with every value; `skipped` is as for `to_frame`."""
    path, found, broken = Path(run, files.RESULTS), [], []
    for number, line in enumerate(files.read_bytes(path).splitlines(), 1):
        try:
            record = files.parse_json(line)
        except ValueError:
            record = None
        if is_record(record):
            found.append(record)
        else:
            broken.append(number)
    left_out = [describe_broken(path, broken)] if broken else []
    if skipped is None:
        say_skipped(left_out)
    else:
        skipped += left_out
    return found


def say_skipped(left_out: list[str]) -> None:
    """Names on stderr what was left out, a line each."""
    for line in left_out:
        print(f"skipped {line}", file=sys.stderr)


def selected(records: list[dict]) -> dict | None:
    """Which of a run's records training-domain validation selects.

    The first of the best or, if they say `"selection": "last"` (SWAD), the last; None if no
    validation accuracy is a number.
    """
    candidates = [record for record in records if not math.isnan(validation_accuracy(record))]
    if any(record.get("selection") == "last" for record in candidates):
        candidates = sorted(candidates, key=lambda record: record["step"])[-1:]
    return max(candidates, key=validation_accuracy, default=None)


def validation_accuracy(record: dict) -> float:
    """Mean accuracy on the training domains' out-splits; NaN if the record has none."""
    tested = {f"env{i}_out_acc" for i in record["args"]["test_envs"]}
    return _mean(record, (n for n in record if re.fullmatch(r"env\d+_out_acc", n)
                          and n not in tested))


def test_accuracy(record: dict) -> float:
    """Mean accuracy on the test domains' in-splits; NaN if the record lacks one."""
    return _mean(record, (f"env{i}_in_acc" for i in record["args"]["test_envs"]))


def _mean(record: dict, names: Iterable[str]) -> float:
    import numpy as np

    values = [record.get(name, math.nan) for name in names]
    return float(np.mean(values)) if values else math.nan
