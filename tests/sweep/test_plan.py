import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from launches import args_list_of, flags

from domainbed_kd import machine
from domainbed_kd.scripts import sweep
from domainbed_kd.sweep import plan
from domainbed_kd.sweep.jobs import Job


@pytest.fixture(autouse=True)
def with_ray_and_slurm_and_without_gpus(monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


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


def args_of(*more):
    return sweep.build_parser().parse_args(["plan", "--datasets", "Debug28", "--n_hparams", "1",
                                            "--output_dir", "sweep", *more])


@pytest.mark.parametrize("gpus, more, wanted", [
    ([], [], {"local", "slurm", "ray"}), (["0"], [], {"local", "slurm", "ray"}),
    (["0"], ["--measure"], {"local", "multi_gpu", "slurm", "ray"}),
    ([], ["--measure"], {"local", "slurm", "ray"}),
    ([], ["--command_launcher", "multi_gpu"], {"local", "multi_gpu", "slurm", "ray"})])
def test_launchers_that_work_here_are_priced(gpus, more, wanted, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    assert set(plan.launchers(args_of(*more))) == wanted


def test_a_cluster_that_is_not_here_is_not_priced(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plan.launchers(args_of()) == ["local"]
    assert plan.launchers(args_of("--command_launcher", "slurm")) == ["local", "slurm"]


@pytest.mark.parametrize("n_gpus, more, wanted", [
    (0, [], 16), (0, ["--ray_cpus", "4"], 4), (2, [], 2), (2, ["--ray_gpus", "0.5"], 4),
    (2, ["--ray_gpus", "0.4"], 4), (2, ["--ray_gpus", "2"], 1), (2, ["--ray_gpus", "0"], 16),
    (4, ["--ray_gpus", "0.25", "--ray_cpus", "2"], 8), (2, ["--ray_address", "auto"], 1)])
def test_jobs_of_ray_take_a_gpu_or_their_share(n_gpus, more, wanted, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: list(map(str, range(n_gpus))))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert plan.slots(args_of(*more), "ray") == wanted


def test_what_a_process_needs_once_counts_for_the_first_job_of_each_slot():
    jobs = [Job(train_args, "sweep") for train_args in args_list_of(args_of())][:3]
    seconds, once = ({id(job): each for job in jobs} for each in (10.0, 5.0))
    assert plan.wall_seconds(jobs, seconds, 1, once) == 5 + 3 * 10
    assert plan.wall_seconds(jobs, seconds, 2, once) == 5 + 2 * 10
    assert plan.wall_seconds(jobs, seconds, 2, {}) == 2 * 10
