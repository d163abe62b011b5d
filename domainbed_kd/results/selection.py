"""Model selection: DomainBed's rules, ties included.

Gulrajani & Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021,
https://arxiv.org/abs/2007.01434, section 3. The test accuracy is always that on the test
domain's in-split, as the oracle selects by the out-split.
"""

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from domainbed_kd.folder import curves
from domainbed_kd.folder.curves import Curve, Search
from domainbed_kd.results.records import Coverage, Grid

#: A checkpoint's step, validation accuracy and test accuracy.
Candidate = tuple[int, float, float]


class SelectionMethod:
    """A rule that picks a checkpoint of each run, then a run for each cell of a table."""

    name: str
    #: True if runs that hold out two domains take part.
    uses_pairs = False

    @classmethod
    def select(cls, draw: list[Curve]) -> dict[str, float] | None:
        """The `val_acc` and `test_acc` in [0, 1] of one draw of hparams; None if runs are missing.

        A draw is the curves of one trial, dataset, algorithm, test env and hparams seed.
        """
        raise NotImplementedError(f"{cls.__name__} does not implement select().")

    @classmethod
    def run_acc(cls, run_records: list[dict[str, Any]]) -> dict[str, float] | None:
        """As `select`, for records as in results.jsonl."""
        return cls.select(curves.of_records(run_records))

    @classmethod
    def hparams_accs(cls, search: Search) -> list[tuple[dict[str, float], list[Curve]]]:
        """The accuracies and curves of each draw of hparams, best validation accuracy first.

        Of equal ones, the larger hparams_seed comes first; NaN comes last.
        """
        accs = [(acc, draw) for draw in search.by_seed.values()
                if (acc := cls.select(draw)) is not None]

        def val_acc(item: tuple[dict[str, float], list[Curve]]) -> float:
            value = item[0]["val_acc"]
            return -math.inf if math.isnan(value) else value

        return sorted(accs, key=val_acc)[::-1]

    @classmethod
    def sweep_acc(cls, search: Search) -> float | None:
        """The test accuracy in [0, 1] of the best draw of hparams; None if there is none."""
        accs = cls.hparams_accs(search)
        return accs[0][0]["test_acc"] if accs else None


def _alone(draw: Iterable[Curve]) -> Iterator[tuple[Any, Curve]]:
    """The test env and curve of each run that selects by itself: no pair, no second stage.

    For a run that holds out more than two domains, it is the one that the draw is about.
    """
    for curve in draw:
        env, *more = curve.args["test_envs"]
        env = env if not more else curve.env
        if f"env{env}_in_acc" in curve.columns:
            yield env, curve


def _accuracies(chosen: Candidate | None) -> dict[str, float] | None:
    return chosen and {"val_acc": chosen[1], "test_acc": chosen[2]}


class IIDAccuracySelectionMethod(SelectionMethod):
    """The best mean accuracy on the training domains' out-splits, early stopping included.

    Of equal ones, the earliest checkpoint counts. A record with `"selection": "last"` (SWAD) makes
    its run's last record the only candidate.
    """

    name = "training-domain validation set"
    test_key = "env{}_in_acc"

    @classmethod
    def select(cls, draw: list[Curve]) -> dict[str, float] | None:
        """See `SelectionMethod.select`."""
        candidates: list[Candidate] = []
        only_last = False
        for test_env, curve in _alone(draw):
            columns, test_key = curve.columns, cls.test_key.format(test_env)
            if test_key in columns:
                held_out = tuple(curve.args["test_envs"])
                names = curves.validation_columns(tuple(columns), held_out).values()
                validation = zip(*map(columns.get, names))
                candidates += zip(columns["step"], map(curves.mean, validation), columns[test_key])
                only_last = only_last or curve.selection == "last"
        return _accuracies(curves.choose(candidates, only_last))


class LeaveOneOutSelectionMethod(SelectionMethod):
    """The best mean accuracy on each other domain when it was held out too, at the same step.

    A step counts if it has exactly one record that holds out the test env alone, and one for each
    pair of the test env and another. Of equal ones, the earliest step counts; `"selection": "last"`
    acts as above.
    """

    name = "leave-one-domain-out cross-validation"
    uses_pairs = True

    @classmethod
    def select(cls, draw: list[Curve]) -> dict[str, float] | None:
        """See `SelectionMethod.select`."""
        # {step: (test accuracy, the other domains), or None if there are several}
        alone: dict[int, Any] = {}
        test_env = None
        for test_env, curve in _alone(curve for curve in draw if curve.env is None):
            columns = curve.columns
            others = curves.validation_columns(tuple(columns), (test_env,))
            for step, test_acc in zip(columns["step"], columns[f"env{test_env}_in_acc"]):
                alone[step] = None if step in alone else (test_acc, others)
        # {other domain: {step: accuracy when it was held out too}}
        validation: dict[int, dict[int, float]] = defaultdict(dict)
        for curve in draw if alone else ():
            if len(envs := curve.args["test_envs"]) == 2:
                other = envs[envs[0] == test_env]
                accs = curve.columns.get(f"env{other}_in_acc", ())
                validation[other].update(zip(curve.columns["step"], accs))

        candidates: list[Candidate] = []
        for step, (test_acc, others) in sorted(filter(operator.itemgetter(1), alone.items())):
            known = [validation[i][step] for i in others if step in validation[i]]
            if known and len(known) == len(others):
                candidates.append((step, curves.mean(known), test_acc))
        if any(curve.selection == "last" for curve in draw):
            last = max(step for curve in draw for step in curve.columns["step"])
            candidates = [candidate for candidate in candidates if candidate[0] == last]
        return _accuracies(curves.choose(candidates, only_last=False))


class OracleSelectionMethod(SelectionMethod):
    """The test domain's own out-split, at the last step: what no honest method may look at."""

    name = "test-domain validation set (oracle)"

    @classmethod
    def select(cls, draw: list[Curve]) -> dict[str, float] | None:
        """See `SelectionMethod.select`."""
        candidates: list[Candidate] = []
        for test_env, curve in _alone(draw):
            names = "step", f"env{test_env}_out_acc", f"env{test_env}_in_acc"
            candidates += zip(*map(curve.columns.get, names))
        return _accuracies(curves.choose(candidates, only_last=True))


class IIDAutoLRAccuracySelectionMethod(IIDAccuracySelectionMethod):
    """The rule for ERM++'s two stages: the second trains on all data, and its test accuracy counts.

    Records whose args differ only in `holdout_fraction` are merged; later values replace earlier.
    """

    name = "auto lr training-domain validation set"
    test_key = "fd_env{}_in_acc"

    @classmethod
    def select(cls, draw: list[Curve]) -> dict[str, float] | None:
        """See `SelectionMethod.select`."""
        merged: list[dict[str, Any]] = []
        for record in itertools.chain.from_iterable(curve.records() for curve in draw):
            same = (other for other in merged if _stage(other) == _stage(record))
            if (found := next(same, None)) is None:
                merged.append(record)
            else:
                found.update(record)
        return super().select(curves.of_records(merged))


def _stage(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record["args"].items() if k != "holdout_fraction"}


METHODS = (IIDAccuracySelectionMethod, LeaveOneOutSelectionMethod, OracleSelectionMethod)


class Outcome(NamedTuple):
    """What a method selects for one algorithm on one test env, and from how many runs."""

    #: {trial_seed: accuracy in [0, 1]}, of the trials that have one.
    accs: dict[int, float]
    coverage: Coverage
    #: {trial_seed: place among all searches}, the order in which DomainBed adds accuracies up.
    places: dict[int, int] = {}


def outcomes(searches: dict[tuple[int, str, str, int], Search], grid: Grid,
             method: type[SelectionMethod]) -> dict[tuple[str, str, int], Outcome]:
    """{(dataset, algorithm, test env): Outcome} of `curves.searches` and their `records.Grid`.

    They cover the whole grid; where nothing can be selected, `accs` is empty.
    """
    accs: dict[Any, dict[int, float]] = {
        (dataset, algorithm, env): {} for dataset in grid.datasets
        for algorithm in grid.algorithms for env in range(grid.n_envs[dataset])}
    places: dict[Any, dict[int, int]] = {where: {} for where in accs}
    for place, ((trial_seed, *where), search) in enumerate(searches.items()):
        if (acc := method.sweep_acc(search)) is not None:
            accs.setdefault(tuple(where), {})[trial_seed] = acc
            places.setdefault(tuple(where), {})[trial_seed] = place
    return {(dataset, algorithm, env): Outcome(
                by_trial, grid.coverage(dataset, algorithm, env, method.uses_pairs),
                places[dataset, algorithm, env])
            for (dataset, algorithm, env), by_trial in accs.items()}
