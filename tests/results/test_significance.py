import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from domainbed_kd.results import significance
from domainbed_kd.results.records import Coverage
from domainbed_kd.results.selection import Outcome

WHOLE = Coverage(1, 1, frozenset())


def made_up(seed=0, names="ABCDE", n_envs=6, n_trials=3):
    """Outcomes in which later names tend to be better."""
    r = np.random.RandomState(seed)
    return {("Set", name, env): Outcome(
        {t: .5 + .05 * i + .1 * r.rand() for t in range(n_trials)}, WHOLE)
        for (i, name), env in itertools.product(enumerate(names), range(n_envs))}


def frame(outcomes):
    """Accuracies with a row for each (dataset, test env, trial), a column for each algorithm."""
    return pd.DataFrame([{"set": d, "env": e, "trial": t, "name": n, "acc": acc}
                         for (d, n, e), o in outcomes.items() for t, acc in o.accs.items()]
                        ).pivot(index=["set", "env", "trial"], columns="name", values="acc")


def test_differences_and_p_values_are_scipys_and_their_correction_is_statsmodels():
    outcomes = made_up()
    accs = frame(outcomes)
    found = significance.differences(significance.by_pair(outcomes), "A")
    assert [d.algorithm for d in found] == list("BCDE") and {d.n_pairs for d in found} == {18}
    raw = [stats.wilcoxon(accs[d.algorithm], accs["A"]).pvalue for d in found]
    assert [d.p for d in found] == pytest.approx(raw)
    assert [d.p_corrected for d in found] == pytest.approx(multipletests(raw, method="holm")[1])
    for d in found:
        assert d.mean == pytest.approx((accs[d.algorithm] - accs["A"]).mean())


def test_holms_correction_counts_all_comparisons():
    # Holm by hand, on five comparisons: times 5, 4, ... in order of p, never decreasing.
    found = significance.differences(significance.by_pair(made_up(3, "ABCDEF", 4, 2)), "F")
    expected, largest = {}, 0
    for i, d in enumerate(sorted(found, key=lambda d: d.p)):
        largest = max(largest, min(1, d.p * (len(found) - i)))
        expected[d.algorithm] = largest
    assert {d.algorithm: d.p_corrected for d in found} == pytest.approx(expected)


def test_the_interval_agrees_with_a_bootstrap_made_another_way():
    outcomes = made_up(names="AB")
    found, = significance.differences(significance.by_pair(outcomes), "A")
    accs = frame(outcomes)
    gains = (accs["B"] - accs["A"]).to_numpy()
    means = np.random.RandomState(1).choice(gains, (20000, len(gains))).mean(axis=1)
    expected = np.percentile(means, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.003)
    assert found.low < found.mean < found.high


def test_only_pairs_that_both_have_are_compared():
    outcomes = made_up(names="AB")
    outcomes["Set", "B", 0].accs.clear()
    outcomes["Other", "B", 0] = Outcome({0: .1}, WHOLE)
    found, = significance.differences(significance.by_pair(outcomes), "A")
    assert found.n_pairs == 15


@pytest.mark.parametrize("gain, n_envs, p", [(0, 6, 1), (.1, 1, 1)])
def test_little_or_no_evidence_is_no_evidence(gain, n_envs, p):
    outcomes = {("Set", name, env): Outcome({0: .5 + gain * (name == "B")}, WHOLE)
                for name, env in itertools.product("AB", range(n_envs))}
    found, = significance.differences(significance.by_pair(outcomes), "A")
    assert found.p == found.p_corrected == p and not found.is_significant
    assert found.mean == pytest.approx(gain)


@pytest.mark.parametrize("n_envs", range(1, 9))
def test_the_least_p_is_that_of_a_method_which_is_better_everywhere(n_envs):
    outcomes = {("Set", name, env): Outcome({0: .5 + (name == "B") * .01 * (env + 1)}, WHOLE)
                for name, env in itertools.product("AB", range(n_envs))}
    found, = significance.differences(significance.by_pair(outcomes), "A")
    assert found.least_p == pytest.approx(found.p)


def test_an_unknown_reference_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match="--compare X: there are no results of it, but of A, B."):
        significance.differences(significance.by_pair(made_up(names="AB")), "X")


@pytest.mark.parametrize("seed", range(3))
def test_ranks_and_critical_difference_are_autoranks(seed):
    autorank = pytest.importorskip("autorank")
    outcomes = made_up(seed)
    # A block is a domain, of which autorank has to be given the mean over trials.
    blocks = frame(outcomes).groupby(["set", "env"]).mean()
    expected = autorank.autorank(blocks, force_mode="nonparametric", order="descending")
    found = significance.ranking(significance.by_pair(outcomes))
    assert dict(zip(found.algorithms, found.ranks)) == pytest.approx(
        expected.rankdf["meanrank"].to_dict())
    assert found.ranks == sorted(found.ranks) and found.n_blocks == 6
    assert found.critical_difference == pytest.approx(expected.cd, rel=1e-4)  # theirs is a table's
    assert found.p == pytest.approx(stats.friedmanchisquare(*blocks.to_numpy().T).pvalue)


def test_groups_of_the_diagram_are_those_of_autorank():
    autorank_util = pytest.importorskip("autorank._util")
    from types import SimpleNamespace

    for seed in range(5):
        found = significance.ranking(significance.by_pair(made_up(seed, "ABCDEFG", 9)))
        result = SimpleNamespace(cd=found.critical_difference, rankdf=pd.DataFrame(
            {"meanrank": found.ranks}, index=found.algorithms))
        assert found.groups() == autorank_util.get_sorted_rank_groups(result, False)[2]


def test_equal_accuracies_share_a_rank_and_say_nothing():
    outcomes = {("Set", name, env): Outcome({0: .5}, WHOLE)
                for name, env in itertools.product("ABC", range(3))}
    found = significance.ranking(significance.by_pair(outcomes))
    assert found.ranks == [2, 2, 2] and found.p == 1 and found.groups() == [(0, 2)]


@pytest.mark.parametrize("names, n_envs", [("AB", 6), ("ABC", 1)])
def test_too_little_cannot_be_ranked(names, n_envs):
    assert significance.ranking(significance.by_pair(made_up(0, names, n_envs))) is None
    assert significance.ranking({}) is None
