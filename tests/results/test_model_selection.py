import math
import random

import pytest
from conftest import GOLDENS

from domainbed_kd.folder.curves import Search, of_records, searches
from domainbed_kd.results import records, selection
from domainbed_kd.results.selection import (
    IIDAccuracySelectionMethod,
    IIDAutoLRAccuracySelectionMethod,
    LeaveOneOutSelectionMethod,
    OracleSelectionMethod,
)


def record(step=0, out=(0, 0, 0), in_=(0, 0, 0), test_envs=(0,), hparams_seed=0, **more):
    accs = {f"env{i}_out_acc": float(acc) for i, acc in enumerate(out)}
    accs |= {f"env{i}_in_acc": float(acc) for i, acc in enumerate(in_)}
    args = {"test_envs": list(test_envs), "hparams_seed": hparams_seed, "trial_seed": 0,
            "dataset": "Debug28", "algorithm": "ERM", "holdout_fraction": 0.2}
    return {"step": step, "args": args, "hparams": {}, **accs, **more}


def test_names_are_domainbeds():
    assert [method.name for method in selection.METHODS] == [
        "training-domain validation set", "leave-one-domain-out cross-validation",
        "test-domain validation set (oracle)"]
    assert (IIDAutoLRAccuracySelectionMethod.name
            == "auto lr training-domain validation set")


@pytest.mark.parametrize("method", selection.METHODS)
def test_no_records_have_no_accuracy(method):
    assert method.run_acc([]) is None
    assert method.run_acc([{"step": 0, "hparams": {}, "args": record()["args"]}]) is None
    assert method.hparams_accs(Search()) == []
    assert method.sweep_acc(Search()) is None


# Training-domain validation.

def test_iid_takes_the_best_mean_of_the_training_domains_out_splits():
    run = [record(0, out=(1, .2, .4), in_=(.5, 0, 0)), record(10, out=(0, .6, .2), in_=(.6, 0, 0)),
           record(20, out=(1, .3, .3), in_=(.7, 0, 0))]
    assert IIDAccuracySelectionMethod.run_acc(run) == {"val_acc": .4, "test_acc": .6}


def test_iid_takes_the_earliest_of_equal_checkpoints():
    run = [record(step, out=(0, .5, .5), in_=(step / 100, 0, 0)) for step in (10, 20, 30)]
    assert IIDAccuracySelectionMethod.run_acc(run)["test_acc"] == .1


def test_iid_leaves_runs_with_two_test_envs_out():
    pair = record(out=(1, 1, 1), test_envs=(0, 1))
    assert IIDAccuracySelectionMethod.run_acc([pair]) is None
    single = record(out=(0, .1, .1))
    assert IIDAccuracySelectionMethod.run_acc([pair, single])["val_acc"] == .1


def test_a_run_that_selects_last_is_judged_by_its_last_record():
    run = [record(20, out=(0, .2, .2), in_=(.3, 0, 0), selection="last"),
           record(10, out=(0, .9, .9), in_=(.1, 0, 0), selection="last")]
    assert IIDAccuracySelectionMethod.run_acc(run) == {"val_acc": .2, "test_acc": .3}


# The choice among hparams.

def test_equal_draws_go_to_the_larger_hparams_seed():
    cell = Search(of_records(record(out=(0, .5, .5), in_=(seed / 10, 0, 0), hparams_seed=seed)
                           for seed in (2, 0, 1)))
    assert IIDAccuracySelectionMethod.sweep_acc(cell) == .2
    assert [draw[0].args["hparams_seed"]
            for _, draw in IIDAccuracySelectionMethod.hparams_accs(cell)] == [2, 1, 0]


def test_nan_is_the_worst_validation_accuracy():
    cell = Search(of_records([record(out=(0, math.nan, .5), hparams_seed=9),
                            record(out=(0, 0, .1), in_=(.7, 0, 0), hparams_seed=0)]))
    assert IIDAccuracySelectionMethod.sweep_acc(cell) == .7


def test_draws_without_an_accuracy_drop_out():
    cell = Search(of_records([record(test_envs=(0, 1), hparams_seed=0), record(hparams_seed=1)]))
    assert [draw[0].args["hparams_seed"]
            for _, draw in IIDAccuracySelectionMethod.hparams_accs(cell)] == [1]


# Leave one domain out.

def loo_step(step, test=.5, val=(.2, .4), **more):
    """All that a step of test env 0 needs; val: accuracies on envs 1 and 2 when held out too."""
    return [record(step, in_=(test, 0, 0), **more),
            record(step, in_=(.9, val[0], 0), test_envs=(0, 1), **more),
            record(step, in_=(.9, 0, val[1]), test_envs=(0, 2), **more)]


def test_loo_means_over_the_domains_held_out_too():
    acc = LeaveOneOutSelectionMethod.run_acc(loo_step(0))
    assert acc == {"val_acc": pytest.approx(.3), "test_acc": .5}


def test_loo_takes_the_best_step_and_the_earliest_of_equals():
    run = loo_step(30, .3, (.5, .5)) + loo_step(10, .1, (.1, .1)) + loo_step(20, .2, (.5, .5))
    assert LeaveOneOutSelectionMethod.run_acc(run)["test_acc"] == .2


@pytest.mark.parametrize("lost", range(3))
def test_loo_leaves_out_a_step_that_lacks_a_record(lost):
    step = loo_step(0)
    del step[lost]
    assert LeaveOneOutSelectionMethod.run_acc(step) is None
    assert LeaveOneOutSelectionMethod.run_acc(step + loo_step(10, .7))["test_acc"] == .7


def test_loo_leaves_out_a_step_with_two_single_records():
    assert LeaveOneOutSelectionMethod.run_acc(loo_step(0) + [record(0)]) is None


def test_loo_judges_a_run_that_selects_last_by_its_last_step():
    run = loo_step(10, .1, (.9, .9), selection="last") + loo_step(20, .2, selection="last")
    assert LeaveOneOutSelectionMethod.run_acc(run)["test_acc"] == .2
    assert LeaveOneOutSelectionMethod.run_acc(run[:-1]) is None


@pytest.mark.parametrize("seed", range(20))
def test_loo_equals_a_naive_loop_over_records_that_lack_or_repeat_some(seed):
    rng = random.Random(seed)
    whole = [record(step, [rng.random() for _ in range(3)], [rng.random() for _ in range(3)], envs,
                    **{"selection": "last"} if seed % 3 == 0 else {})
             for envs in ((0,), (1, 0), (0, 2)) for step in (0, 10, 20, 30)]
    run = rng.sample(whole, 9) + rng.sample(whole, 2)
    best = None
    for step in sorted({r["step"] for r in run})[-1 if seed % 3 == 0 else 0:]:
        alone = [r for r in run if r["step"] == step and r["args"]["test_envs"] == [0]]
        val = {i: r[f"env{i}_in_acc"] for r in run for i in (1, 2)
               if r["step"] == step and sorted(r["args"]["test_envs"]) == [0, i]}
        if len(alone) == 1 and len(val) == 2 and not (
                best and best["val_acc"] >= (val[1] + val[2]) / 2):
            best = {"val_acc": (val[1] + val[2]) / 2, "test_acc": alone[0]["env0_in_acc"]}
    assert LeaveOneOutSelectionMethod.run_acc(run) == best


# The oracle.

def test_the_oracle_looks_at_the_last_step_only():
    run = [record(10, out=(.9, 0, 0), in_=(.8, 0, 0)), record(20, out=(.4, 0, 0), in_=(.6, 0, 0)),
           record(0, out=(.9, 0, 0), in_=(.8, 0, 0)), record(30, test_envs=(0, 1))]
    assert OracleSelectionMethod.run_acc(run) == {"val_acc": .4, "test_acc": .6}


# ERM++'s two stages.

def test_auto_lr_joins_the_two_stages_of_a_run():
    first = [record(0, out=(0, .9, .9)), record(10, out=(0, .2, .4))]
    second = {"step": 10, "args": first[0]["args"] | {"holdout_fraction": 0.0}, "hparams": {},
              "fd_env0_in_acc": .8}
    acc = IIDAutoLRAccuracySelectionMethod.run_acc([*first, second])
    # One record is left, with the last value of each field: not the better one of step 0.
    assert acc == {"val_acc": pytest.approx(.3), "test_acc": .8}
    assert IIDAutoLRAccuracySelectionMethod.run_acc(first) is None
    assert IIDAccuracySelectionMethod.run_acc([*first, second])["val_acc"] == .9


# All of it, against a naive loop over the golden sweep.

def test_iid_and_oracle_equal_a_naive_loop_on_the_golden_sweep():
    found = records.Folder(GOLDENS / "sweep_data").curves()
    for (_, _, _, env), cell in searches(found).items():
        draws, oracle = {}, {}
        for r in (record for curve in cell for record in curve.records()):
            if r["args"]["test_envs"] != [env]:
                continue
            seed = r["args"]["hparams_seed"]
            others = [r[f"env{i}_out_acc"] for i in range(4) if i != env]
            candidate = (sum(others) / 3, -r["step"], r[f"env{env}_in_acc"])
            draws[seed] = max(draws.get(seed, (-1,)), candidate)
            if r["step"] == 1000:
                oracle[seed] = (r[f"env{env}_out_acc"], seed, r[f"env{env}_in_acc"])
        best = max((val, seed, test) for seed, (val, _, test) in draws.items())
        assert IIDAccuracySelectionMethod.sweep_acc(cell) == best[-1]
        assert OracleSelectionMethod.sweep_acc(cell) == max(oracle.values())[-1]


def test_outcomes_keep_a_cells_trials_and_coverage():
    found = records.Folder(GOLDENS / "sweep_data").curves()
    outcomes = selection.outcomes(
        searches(found), records.Grid(found), LeaveOneOutSelectionMethod)
    assert list(outcomes) == [("VLCS", "ERM", env) for env in range(4)]
    assert set(outcomes["VLCS", "ERM", 0].accs) == {0, 1}
    assert outcomes["VLCS", "ERM", 0].coverage[:2] == (16, 16)
