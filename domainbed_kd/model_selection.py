"""Which of a search's checkpoints counts: DomainBed's rules, with its ways of breaking ties.

Gulrajani & Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021,
https://arxiv.org/abs/2007.01434, section 3. The test accuracy is always that on the test
domain's in-split, so that the oracle may look at the out-split.
"""

import functools
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from domainbed_kd import records as sweeps


class SelectionMethod:
    """A rule that picks a checkpoint of each run, then a run of each cell.

    `records` are those of one cell: one trial, dataset, algorithm and test env.
    """

    name: str
    #: True if runs that hold out two domains take part.
    uses_pairs = False

    @classmethod
    def run_acc(cls, run_records: list[dict]) -> dict[str, float] | None:
        """The `val_acc` and `test_acc` in [0, 1] of one draw of hparams; None if it lacks runs."""
        raise NotImplementedError(f"{cls.__name__} does not implement run_acc().")

    @classmethod
    def hparams_accs(cls, records: list[dict]) -> list[tuple[dict[str, float], list[dict]]]:
        """The (run_acc, records) of each draw of hparams, best validation accuracy first.

        Of equals, the larger hparams_seed comes first; NaN comes last.
        """
        cell = records if isinstance(records, sweeps.Cell) else sweeps.Cell(records)
        accs = [(cls.run_acc(run), run) for run in cell.by_seed.values()]
        accs = [(acc, run) for acc, run in accs if acc is not None]

        def val_acc(item):
            value = item[0]["val_acc"]
            return -math.inf if math.isnan(value) else value

        return sorted(accs, key=val_acc)[::-1]

    @classmethod
    def sweep_acc(cls, records: list[dict]) -> float | None:
        """The test accuracy in [0, 1] of the best draw of hparams; None if there is none."""
        accs = cls.hparams_accs(records)
        return accs[0][0]["test_acc"] if accs else None


@functools.cache
def _validation_keys(names: tuple[str, ...]) -> list[str]:
    keys = []
    while (key := f"env{len(keys)}_out_acc") in names:
        keys.append(key)
    return keys


@functools.cache
def _others(names: tuple[str, ...], env: int) -> tuple[list[int], list[str]]:
    """The environments but one, and the names of their out-splits' accuracies."""
    keys = _validation_keys(names)
    others = [i for i in range(len(keys)) if i != env]
    return others, [keys[i] for i in others]


def _mean(values: list[float]) -> float:
    """The mean, to the last bit of numpy's, in a tenth of its time."""
    if len(values) >= 8:  # from where numpy no longer adds one after the other
        return float(np.add.reduce(values)) / len(values)
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def _holding_out(n: int, run_records: list[dict]) -> list[dict]:
    """The records that hold out n domains and have their accuracies, as a second stage's do not."""
    found, args = [], None
    for record in run_records:
        if record["args"] is not args:  # they are shared by all records of a run
            args = record["args"]
            wanted = f"env{args['test_envs'][0]}_in_acc" if len(args["test_envs"]) == n else None
        if wanted in record:
            found.append(record)
    return found


def _only_last_counts(run_records: list[dict]) -> bool:
    """Whether the run's predictor is the one it ends with, as an average of weights is."""
    return any(record.get("selection") == "last" for record in run_records)


def _step(record: dict) -> int:
    return record["step"]


def _val_acc(acc: dict[str, float]) -> float:
    return acc["val_acc"]


class IIDAccuracySelectionMethod(SelectionMethod):
    """The best mean accuracy on the training domains' out-splits, early stopping included.

    Of equals, the earliest checkpoint. A record that says `"selection": "last"` (SWAD) makes its
    run's last record the only candidate.
    """

    name = "training-domain validation set"
    test_key = "env{}_in_acc"

    @classmethod
    def run_acc(cls, run_records):
        """See `SelectionMethod.run_acc`."""
        candidates = _holding_out(1, run_records)
        if candidates:
            test_env, = candidates[0]["args"]["test_envs"]
            test_key = cls.test_key.format(test_env)
            candidates = [record for record in candidates if test_key in record]
        if _only_last_counts(candidates):
            candidates = sorted(candidates, key=_step)[-1:]
        accs = []
        for record in candidates:
            _, keys = _others(tuple(record), test_env)
            accs.append({"val_acc": _mean([record[key] for key in keys]),
                         "test_acc": record[test_key]})
        return max(accs, key=_val_acc, default=None)


class LeaveOneOutSelectionMethod(SelectionMethod):
    """The best mean accuracy on each other domain when it was held out too, at the same step.

    A step counts if it has exactly one record that holds out the test env alone, and one for each
    pair of the test env and another. Of equals, the earliest step; `"selection": "last"` as above.
    """

    name = "leave-one-domain-out cross-validation"
    uses_pairs = True

    @classmethod
    def run_acc(cls, run_records):
        """See `SelectionMethod.run_acc`."""
        if all(len(record["args"]["test_envs"]) == 1 for record in run_records):
            return None
        steps = {}  # {step: (records that hold out the test env, those that hold out a pair)}
        args = None
        for record in run_records:
            if record["args"] is not args:
                args = record["args"]
                n = len(args["test_envs"])
                wanted = f"env{args['test_envs'][0]}_in_acc" if n <= 2 else None
            if (found := steps.get(record["step"])) is None:
                found = steps[record["step"]] = [], []
            if wanted in record:
                found[n - 1].append(record)
        candidates = sorted(steps)
        if _only_last_counts(run_records):
            candidates = candidates[-1:]
        accs = [cls._step_acc(*steps[step]) for step in candidates]
        return max((acc for acc in accs if acc is not None), key=_val_acc, default=None)

    @classmethod
    def _step_acc(cls, alone, pairs):
        if len(alone) != 1:
            return None
        test_env, = alone[0]["args"]["test_envs"]
        validation = {}
        for record in pairs:
            first, second = record["args"]["test_envs"]
            other = second if first == test_env else first
            validation[other] = record[f"env{other}_in_acc"]
        others, _ = _others(tuple(alone[0]), test_env)
        if not others or not all(i in validation for i in others):
            return None
        return {"val_acc": _mean([validation[i] for i in others]),
                "test_acc": alone[0][f"env{test_env}_in_acc"]}


class OracleSelectionMethod(SelectionMethod):
    """The test domain's own out-split, at the last step: what no honest method may look at."""

    name = "test-domain validation set (oracle)"

    @classmethod
    def run_acc(cls, run_records):
        """See `SelectionMethod.run_acc`."""
        candidates = sorted(_holding_out(1, run_records), key=_step)
        if not candidates:
            return None
        test_env, = candidates[-1]["args"]["test_envs"]
        return {"val_acc": candidates[-1][f"env{test_env}_out_acc"],
                "test_acc": candidates[-1][f"env{test_env}_in_acc"]}


class IIDAutoLRAccuracySelectionMethod(IIDAccuracySelectionMethod):
    """The rule for ERM++'s two stages: the second trains on all data, and its test accuracy counts.

    Records whose args differ in `holdout_fraction` only are one: later values replace earlier.
    """

    name = "auto lr training-domain validation set"
    test_key = "fd_env{}_in_acc"

    @classmethod
    def run_acc(cls, run_records):
        """See `SelectionMethod.run_acc`."""
        merged = []
        for record in run_records:
            same = (other for other in merged if _stage(other) == _stage(record))
            if (found := next(same, None)) is None:
                merged.append(dict(record))
            else:
                found.update(record)
        return super().run_acc(merged)


def _stage(record: dict) -> dict:
    return {k: v for k, v in record["args"].items() if k != "holdout_fraction"}


METHODS = (IIDAccuracySelectionMethod, LeaveOneOutSelectionMethod, OracleSelectionMethod)


class Outcome(NamedTuple):
    """What a method selects for one algorithm on one test env, and from how many runs."""

    #: {trial_seed: accuracy in [0, 1]}, for the trials that have one.
    accs: dict[int, float]
    coverage: sweeps.Coverage


def outcomes(cells: dict, grid: sweeps.Grid, method: type[SelectionMethod]) -> dict:
    """{(dataset, algorithm, test env): Outcome} of `records.by_cell` and its `records.Grid`."""
    accs = defaultdict(dict)
    for (trial_seed, *cell), records in cells.items():
        if (acc := method.sweep_acc(records)) is not None:
            accs[tuple(cell)][trial_seed] = acc
    return {cell: Outcome(by_trial, grid.coverage(*cell, method.uses_pairs))
            for cell, by_trial in accs.items()}
