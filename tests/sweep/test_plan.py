import json
import os
from pathlib import Path

import pytest
from launches import args_list_of, flags

from domainbed_kd.scripts import sweep
from domainbed_kd.sweep.jobs import Job


def measured(tmp_path, *more, seconds=36.0, steps=10):
    """Flags of a plan with a finished ERM run that took 3.6 s an update."""
    args = flags("plan", tmp_path, "--single_test_envs", "--steps", "1000", "--n_trials", "2",
                 "--n_hparams", "2", *more)
    train_args = args_list_of(sweep.build_parser().parse_args(args))[0]
    folder = Path(Job(train_args, str(tmp_path)).output_dir)
    folder.mkdir(parents=True)
    (folder / "done").touch()
    (folder / "memory.json").write_text(json.dumps({"seconds": seconds, "steps": steps}))
    return args


def test_a_plan_counts_runs_teachers_and_hours(tmp_path, capsys):
    args = measured(tmp_path, "--algorithms", "ERM", "KDDG", "--hours_per_run", "2",
                    "--jobs_per_device", "2", "--slurm_parallel", "100")
    assert sweep.main(args) == 0
    # 2 trials x 3 domains x 2 seeds each; ERM takes an hour, as measured, and one run is done.
    assert capsys.readouterr().out.splitlines() == [
        "ERM Debug28: 12 runs, 6 of them teachers, 1 done; 60.0 minutes each, measured",
        "KDDG Debug28: 12 runs, after their teachers, 0 done; 2.0 hours each, as stated",
        "total: 24 runs, 6 teachers, 1 done",
        "local: 18 hours, 2 at a time",  # 11 in 6, 12 times 2 in 12
        "slurm: 3 hours, 100 at a time",
        f"ray: {capsys_ray_hours()} hours, {os.cpu_count()} at a time"]


def test_a_plan_says_that_0_steps_are_the_data_sets_own(tmp_path, capsys):
    args = flags("plan", tmp_path, "--datasets", "Debug28", "PACS", "--data_dir", "d",
                 "--steps", "0", "--checkpoint_freq", "0")
    assert sweep.main(args) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "--steps 0, as in DomainBed, is the dataset's own: Debug28 5001, PACS 5001",
        "--checkpoint_freq 0, as in DomainBed, is the dataset's own: Debug28 100, PACS 300"]


def capsys_ray_hours():
    n = os.cpu_count()
    return -(-11 // n) + 2 * -(-12 // n)


@pytest.mark.parametrize("budget, expected", [
    ("11", "--n_trials 2 --n_hparams 2"), ("6", "--n_trials 2 --n_hparams 1"),
    ("2.5", "--n_trials 1 --n_hparams 1")])
def test_a_budget_trims_trials_and_seeds_evenly(budget, expected, tmp_path, capsys):
    # An hour a run, one of 12 done: 2 x 1 costs 5 of them, 1 x 1 costs 2.
    assert sweep.main(measured(tmp_path, "--budget", budget)) == 0
    assert capsys.readouterr().out.endswith(f"within {budget} hours: {expected}\n")


def test_a_budget_that_is_too_small_and_a_cost_that_is_unknown_are_said(tmp_path, capsys):
    assert sweep.main(measured(tmp_path / "a", "--budget", "0.5")) == 1
    assert "0.5 hours do not suffice" in capsys.readouterr().out
    assert sweep.main(flags("plan", tmp_path / "b")) == 0
    assert "not measured yet: pass --measure or --hours_per_run" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--budget needs the time that a run takes"):
        sweep.main(flags("plan", tmp_path / "b", "--budget", "1"))
    assert not (tmp_path / "b").exists()
