"""Tests of differences between methods.

A pair is a (dataset, test env, trial): both methods see the same split there. Differences get a
bootstrap interval (Efron, 1979) and Wilcoxon's signed-rank test, whose p values are corrected by
Holm's method for the number of comparisons. Ranks, Friedman's test and the Nemenyi critical
difference follow Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR
2006: a block is a domain, and the trials on it, which share its images, are averaged first.
"""

import importlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from domainbed_kd.algorithms import display_name
from domainbed_kd.console import count
from domainbed_kd.folder import curves
from domainbed_kd.folder.curves import Curve
from domainbed_kd.results import selection, tables
from domainbed_kd.results.formats import Strings
from domainbed_kd.results.records import Grid
from domainbed_kd.results.selection import SelectionMethod

LEVEL = 0.05
_N_RESAMPLES = 9999


class Difference(NamedTuple):
    """A method against the reference, over the pairs that both have; accuracies in [0, 1]."""

    algorithm: str
    n_pairs: int
    #: Mean of the method's accuracy minus the reference's.
    mean: float
    #: The 95 % bootstrap interval of that mean; NaN for a single pair.
    low: float
    high: float
    #: Of Wilcoxon's signed-rank test, two-sided.
    p: float
    #: The same, corrected by Holm's method for all differences in the list.
    p_corrected: float

    @property
    def interval(self) -> str:
        """The interval in points."""
        low, high = 100 * self.low, 100 * self.high
        return f"{low:+.1f} to {high:+.1f}" if self.n_pairs > 1 else "-"

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p value is below 0.05."""
        return self.p_corrected < LEVEL

    @property
    def least_p(self) -> float:
        """The smallest p that n pairs can give, as all 2^n signs are equally likely."""
        return min(1.0, 2.0 ** (1 - self.n_pairs))


class Ranking(NamedTuple):
    """Methods by their mean rank over blocks, best first."""

    algorithms: list[str]
    #: Mean ranks, 1 for a method that is best everywhere; equal methods share a rank.
    ranks: list[float]
    n_blocks: int
    #: Of Friedman's test that all are alike.
    p: float
    #: Ranks that differ by at most this do not differ significantly (Nemenyi, level 0.05).
    critical_difference: float

    def groups(self) -> list[tuple[int, int]]:
        """First and last place of each longest stretch within the critical difference."""
        found = []
        for first, rank in enumerate(self.ranks):
            last = sum(other - rank <= self.critical_difference for other in self.ranks) - 1
            if last > first and (not found or last > found[-1][1]):
                found.append((first, last))
        return found


class Comparison(NamedTuple):
    """All other algorithms against one, the reference."""

    reference: str
    differences: list[Difference]
    ranking: Ranking | None


def by_pair(outcomes: dict) -> dict[str, dict[tuple, float]]:
    """{algorithm: {(dataset, test env, trial): accuracy}} of `selection.outcomes`."""
    found = {}
    for (dataset, algorithm, env), outcome in outcomes.items():
        for trial, accuracy in outcome.accs.items():
            found.setdefault(algorithm, {})[dataset, env, trial] = accuracy
    return found


def differences(scores: dict[str, dict[tuple, float]], reference: str) -> list[Difference]:
    """The reference against each method that shares a pair; scores are from `by_pair`."""
    multitest = _library("statsmodels.stats.multitest")
    stats = _library("scipy.stats")
    if reference not in scores:
        others = f", but of {', '.join(scores)}" if scores else ""
        raise ValueError(f"--compare {reference}: there are no results of it{others}.")
    found = []
    for algorithm, theirs in scores.items():
        pairs = [pair for pair in theirs if pair in scores[reference]]
        if algorithm == reference or not pairs:
            continue
        gains = np.array([theirs[pair] - scores[reference][pair] for pair in pairs])
        low = high = np.nan
        if len(gains) > 1:
            low, high = stats.bootstrap(
                (gains,), np.mean, confidence_level=1 - LEVEL, n_resamples=_N_RESAMPLES,
                method="percentile", rng=np.random.default_rng(0)).confidence_interval
        # Without any difference there is nothing to rank.
        p = stats.wilcoxon(gains).pvalue if gains.any() else 1.0
        found.append((algorithm, len(gains), float(gains.mean()), float(low), float(high),
                      float(p)))
    if not found:
        return []
    corrected = multitest.multipletests([row[-1] for row in found], method="holm")[1]
    return [Difference(*row, float(p)) for row, p in zip(found, corrected)]


def ranking(scores: dict[str, dict[tuple, float]]) -> Ranking | None:
    """Mean ranks over the domains that all methods have; None for under 2 domains or 3 methods."""
    stats = _library("scipy.stats")
    names = list(scores)
    pairs = [pair for pair in next(iter(scores.values()), ())
             if all(pair in scores[name] for name in names)]
    blocks = {}
    for pair in pairs:
        blocks.setdefault(pair[:2], []).append([scores[name][pair] for name in names])
    k, n = len(names), len(blocks)
    if k < 3 or n < 2:
        return None
    means = np.array([np.mean(trials, axis=0) for trials in blocks.values()])  # (n, k)
    ranks = stats.rankdata(-means, axis=1).mean(axis=0)
    p = stats.friedmanchisquare(*means.T).pvalue if np.ptp(ranks) else 1.0
    q = stats.studentized_range.ppf(1 - LEVEL, k, np.inf) / np.sqrt(2)
    order = np.argsort(ranks, kind="stable")
    return Ranking([names[i] for i in order], ranks[order].tolist(), n, float(p),
                   float(q * np.sqrt(k * (k + 1) / (6 * n))))


def compare(searches: dict, grid: Grid, method: type[SelectionMethod],
            reference: str | None = None) -> Comparison | None:
    """All other algorithms against one, in the order of tables; None if none has scores.

    The reference is named as in tables; by default it is ERM, or the first that has scores.
    """
    scores = by_pair(selection.outcomes(searches, grid, method))
    scores = {name: scores[name] for name in tables.row_order(scores)}
    if not reference:
        reference = next((name for name in ("ERM", *scores) if name in scores), None)
        if reference is None:
            return None
    reference = {display_name(name): name for name in scores}.get(reference, reference)
    return Comparison(reference, differences(scores, reference), ranking(scores))


def of_sweep(found: list[Curve], grid: Grid, methods: Iterable[type[SelectionMethod]],
             reference: str) -> dict[type[SelectionMethod], Strings]:
    """{selection method: the table that compares others with `reference`}, where possible."""
    searches = curves.searches(found)
    compared = {}
    for method in methods:
        if not tables.needs_pairs(method, grid):
            made = compare(searches, grid, method, reference)
            compared[method] = Strings(
                f"Differences to {display_name(made.reference)}, model selection method: "
                f"{method.name}", limits(made.differences), rows(made.differences),
                describe(made.ranking))
    return compared


def rows(found: list[Difference]) -> list[list[str]]:
    """Differences as a table of strings, the header first; * marks significant ones."""
    return [["Algorithm", "pairs", "points", "95 % interval", "p", "p (Holm)"],
            *([display_name(d.algorithm), str(d.n_pairs), f"{100 * d.mean:+.1f}", d.interval,
               f"{d.p:.3f}", f"{d.p_corrected:.3f}{' *' if d.is_significant else ''}"]
              for d in found)]


def limits(found: list[Difference]) -> str:
    """A sentence if there are too few pairs for any significant difference; else empty.

    The smallest corrected p is at least the smallest possible p times the number of comparisons.
    """
    if not found:
        return ""
    n, m = max(d.n_pairs for d in found), len(found)
    least = min(1.0, m * min(d.least_p for d in found))
    if least < LEVEL:
        return ""
    return (f"With {count(n, 'pair')}{f' and {m} comparisons' if m > 1 else ''} no "
            f"difference can be significant: p{' (Holm)' if m > 1 else ''} cannot be below "
            f"{least:.3f}.")


def shown(p: float) -> str:
    """A p value in words; one that rounds to 0 is "p < 0.001"."""
    return "p < 0.001" if p < 0.0005 else f"p = {p:.3f}"


def describe(ranks: Ranking | None) -> str:
    """Mean ranks and their test in sentences."""
    if ranks is None:
        return "Ranks need three algorithms on two common domains."
    each = ", ".join(f"{display_name(name)} {rank:.2f}"
                     for name, rank in zip(ranks.algorithms, ranks.ranks))
    return (f"Mean ranks over {ranks.n_blocks} domains: {each}. Friedman's test: "
            f"{shown(ranks.p)}. Critical difference (Nemenyi, 0.05): "
            f"{ranks.critical_difference:.2f}.")


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"Comparing methods needs {name.split('.')[0]}: "
                         "pip install 'domainbed_kd[report]'") from None
