import itertools

import numpy as np
import pandas as pd
import pytest

from domainbed_kd.folder.curves import of_records, searches
from domainbed_kd.results import summaries
from domainbed_kd.results.selection import IIDAccuracySelectionMethod as IID


def record(algorithm="ERM", env=0, trial=0, draw=0, step=0, acc=.5, **more):
    """A row of `to_frame` as a dict; `acc` is its accuracy everywhere."""
    return {"run": f"{algorithm}{env}{trial}{draw}", "step": step, "val_acc": acc,
            "test_acc": acc, "selected": True, "args.dataset": "Debug28",
            "args.algorithm": algorithm, "args.test_envs": (env,), "args.trial_seed": trial,
            "args.hparams_seed": draw, **more}


def frame(*rows):
    return summaries.by_test_env(pd.DataFrame(rows))


def test_runs_that_hold_out_two_domains_take_no_part():
    rows = [record(env=1), record() | {"args.test_envs": (0, 1)}]
    assert frame(*rows)["test_env"].tolist() == [1]


def test_a_run_that_holds_out_several_domains_counts_for_each_of_them():
    accs = {f"env{i}_in_acc": .1 * i for i in range(4)}
    run = record(acc=.7, **accs) | {"args.test_envs": (1, 2, 3)}
    found = frame(run, record(env=2, acc=.6, **accs))
    assert found["test_env"].tolist() == [1, 2, 3, 2]
    assert found["test_acc"].tolist() == pytest.approx([.1, .2, .3, .6])


def test_the_chosen_runs_are_those_whose_draw_the_selection_method_puts_first():
    rows, records = [], []
    for (env, trial, draw), acc in zip(itertools.product(range(2), range(2), range(3)),
                                       (.1, .3, .2, .3, .1, .2, .1, .2, .3, .3, .1, .2)):
        rows.append(record(env=env, trial=trial, draw=draw, acc=acc))
        accs = {f"env{i}_{split}_acc": acc for i in range(3) for split in ("in", "out")}
        records.append({"step": 0, "hparams": {}, **accs, "args": {
            "dataset": "Debug28", "algorithm": "ERM", "test_envs": [env], "trial_seed": trial,
            "hparams_seed": draw}})
    chosen = summaries.chosen(frame(*rows), searches(of_records(records)), IID)
    assert chosen["run"].tolist() == ["ERM001", "ERM010", "ERM102", "ERM110"]


def test_curves_leave_out_steps_that_some_runs_have_not_reached():
    rows = [record(env=env, step=step, acc=.1 * (env + step))
            for env, step in ((0, 0), (0, 2), (0, 4), (1, 0), (1, 2))]
    found = summaries.curves(frame(*rows))
    assert found["step"].tolist() == [0, 2]
    assert found["test_acc"].tolist() == pytest.approx([.05, .25])


def test_cost_counts_each_step_once():
    # Step 0 takes 5 s, steps 1-10 take 2 s each, steps 11-14 3 s each: 37 s; the other run 1 s.
    rows = [record(step=step, step_time=s) for step, s in ((10, 2.), (0, 5.), (14, 3.))]
    rows.append(record(env=1, step=0, step_time=1.))
    assert summaries.costs(frame(*rows))["seconds"].tolist() == [(37 + 1) / 2]


def test_effects_of_hparams_are_rank_correlations_over_draws():
    r = np.random.RandomState(0)
    lr, width, acc = r.rand(2, 6), r.randint(1, 9, (2, 6)), r.rand(3, 2, 6)
    rows = [record(env=env, trial=trial, draw=draw, acc=acc[env, trial, draw],
                   **{"hparams.lr": lr[trial, draw], "hparams.width": width[trial, draw],
                      "hparams.same": 1, "hparams.name": "word"})
            for env, trial, draw in itertools.product(range(3), range(2), range(6))]
    rows.append(record(trial=7, acc=9.) | {"hparams.lr": 9.})  # lacks two test envs
    found = summaries.hparam_effects(frame(*rows)).set_index("hparam")
    assert set(found.index) == {"lr", "width"} and set(found["n_draws"]) == {12}
    accuracy = pd.Series(acc.mean(axis=0).flatten())
    for name, values in (("lr", lr), ("width", width)):
        expected = np.corrcoef(pd.Series(values.flatten()).rank(), accuracy.rank())[0, 1]
        assert found.loc[name, "rho"] == pytest.approx(expected)


def test_few_draws_give_no_effects():
    rows = [record(draw=draw, acc=draw, **{"hparams.lr": draw}) for draw in range(4)]
    assert summaries.hparam_effects(frame(*rows)).empty


def test_unrelated_values_pass_the_chance_correlation_one_time_in_twenty():
    r = np.random.RandomState(0)
    ranks = r.rand(4000, 2, 20).argsort(axis=2)
    rho = [np.corrcoef(*pair)[0, 1] for pair in ranks]
    share = (np.abs(rho) > summaries.chance_correlation(20)).mean()
    assert 0.035 < share < 0.065


def test_a_teacher_that_is_a_run_is_looked_up_and_others_are_read_from_diagnostics():
    teacher = record(env=1, acc=.8)
    student = record("KDDG", env=1, acc=.6) | {"args.teacher": "/moved/sweep/ERM100/"}
    clip = record("RISE", env=1, acc=.6) | {
        "diagnostics.env1_acc": .65, "diagnostics.env1_teacher_acc": .9,
        "diagnostics.env0_teacher_acc": .1}
    lost = record("MosaicKD", env=1) | {"args.teacher": "/moved/sweep/gone"}
    everything = frame(teacher, student, clip, lost)
    found = summaries.teachers(everything, everything).set_index("algorithm")
    assert found[["student", "teacher"]].to_dict("index") == {
        "KDDG": {"student": .6, "teacher": .8}, "RISE": {"student": .65, "teacher": .9}}


def test_diagnostics_of_the_held_out_domain_follow_the_run():
    rows = [record(env=env, **{"diagnostics.env0_ece": .1, "diagnostics.env1_ece": .3})
            for env in (0, 1)]
    found = summaries.diagnostics(frame(*rows))
    assert found["calibration error, held-out domain"].tolist() == [pytest.approx(.2)]
    assert found.shape[1] == 4  # and nothing about what nobody measured
