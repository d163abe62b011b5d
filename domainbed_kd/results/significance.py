"""Whether differences between methods are more than noise.

Pairs are (data set, test env, trial): there both methods see the same split. Their differences get
a bootstrap interval (Efron, 1979) and Wilcoxon's signed-rank test, whose p values are corrected by
Holm's method for the number of comparisons. Ranks, Friedman's test and the Nemenyi critical
difference follow Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR
2006: a block is a domain, and the trials on it, which share its images, are averaged first.
"""

from typing import NamedTuple

import numpy as np

LEVEL = 0.05
_N_RESAMPLES = 9999


class Difference(NamedTuple):
    """A method against the reference, over the pairs that both have; accuracies in [0, 1]."""

    algorithm: str
    n_pairs: int
    #: Mean of the method's accuracy less the reference's.
    mean: float
    #: The 95 % bootstrap interval of that mean; NaN for a single pair.
    low: float
    high: float
    #: Of Wilcoxon's signed-rank test, two-sided.
    p: float
    #: The same, corrected by Holm's method for all differences in the list.
    p_corrected: float

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p value is below 0.05."""
        return self.p_corrected < LEVEL

    @property
    def least_p(self) -> float:
        """The least that p can be: that of one of the 2^n equally likely signs of n pairs."""
        return min(1.0, 2.0 ** (1 - self.n_pairs))


class Ranking(NamedTuple):
    """Methods by their mean rank over blocks, the best first."""

    algorithms: list[str]
    #: Mean ranks, 1 for a method that is best everywhere; equals share theirs.
    ranks: list[float]
    n_blocks: int
    #: Of Friedman's test that all are alike.
    p: float
    #: Ranks that differ by no more do not differ significantly (Nemenyi, level 0.05).
    critical_difference: float

    def groups(self) -> list[tuple[int, int]]:
        """First and last place of each longest stretch within the critical difference."""
        found = []
        for first, rank in enumerate(self.ranks):
            last = sum(other - rank <= self.critical_difference for other in self.ranks) - 1
            if last > first and (not found or last > found[-1][1]):
                found.append((first, last))
        return found


def by_pair(outcomes: dict) -> dict[str, dict[tuple, float]]:
    """{algorithm: {(data set, test env, trial): accuracy}} of `model_selection.outcomes`."""
    found = {}
    for (dataset, algorithm, env), outcome in outcomes.items():
        for trial, accuracy in outcome.accs.items():
            found.setdefault(algorithm, {})[dataset, env, trial] = accuracy
    return found


def differences(scores: dict[str, dict[tuple, float]], reference: str) -> list[Difference]:
    """Every other method against the reference; none for a method without a common pair.

    Args:
        scores: of `by_pair`.
        reference: one of the algorithms.

    Raises:
        ValueError: if the reference has no scores, or a library is missing.
    """
    multitest = _library("statsmodels.stats.multitest")
    stats = _library("scipy.stats")
    if reference not in scores:
        raise ValueError(f"--compare {reference}: there are no results of it, but of "
                         f"{', '.join(scores) or 'nothing'}.")
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
        # Without a difference there is nothing to rank, and nothing that speaks against chance.
        p = stats.wilcoxon(gains).pvalue if gains.any() else 1.0
        found.append((algorithm, len(gains), float(gains.mean()), float(low), float(high),
                      float(p)))
    if not found:
        return []
    corrected = multitest.multipletests([row[-1] for row in found], method="holm")[1]
    return [Difference(*row, float(p)) for row, p in zip(found, corrected)]


def ranking(scores: dict[str, dict[tuple, float]]) -> Ranking | None:
    """Mean ranks over the domains that all methods have; None without two of these or 3 methods.

    Args:
        scores: of `by_pair`.

    Raises:
        ValueError: if a library is missing.
    """
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


def _library(name: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"Comparing methods needs {name.split('.')[0]}: "
                         "pip install 'domainbed_kd[report]'") from None
