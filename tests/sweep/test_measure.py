import json
from pathlib import Path

import pytest

from domainbed_kd import machine
from domainbed_kd.scripts import sweep
from domainbed_kd.sweep import measure, plan

PLAN = ["plan", "--datasets", "Debug28", "--n_hparams", "2", "--n_trials", "1",
        "--single_test_envs", "--hparams", '{"batch_size": 4}', "--steps", "1001",
        "--checkpoint_freq", "100", "--output_dir", "sweep", "--measure"]


@pytest.mark.parametrize("n_steps, freq", [(1, 5), (2, 5), (6, 5), (7, 5), (1001, 100), (10, 1)])
def test_a_run_is_its_start_its_updates_and_its_evaluations(n_steps, freq):
    evaluated = [step for step in range(n_steps) if step % freq == 0 or step == n_steps - 1]
    assert measure.Timing(9, 3, 0.5, 2).of_run(n_steps, freq) == pytest.approx(
        3 + n_steps * 0.5 + 2 * len(evaluated))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """`train` is a stand-in: once 20 s, a start of 3 s, 0.5 s an update, 2 s an evaluation.

    Two jobs at a time take 1.5 times as long for an update, and four run out of memory. The
    fixture is a list of (number of jobs at a time, updates, threads) of each call.
    """
    calls = []

    def train(job, runs, threads=None):
        took = []
        for number, (folder, flags) in enumerate(runs.items()):
            n_steps = flags.get("steps", measure.N_STEPS + 1)
            at_once = int(folder.parent.name.partition("at_once")[2] or 1)
            calls.append((at_once, n_steps, threads))
            if at_once == 4:
                raise ValueError("error: the GPU's memory ran out")
            step = {1: 0.5, 2: 0.75}[at_once]
            folder.mkdir(parents=True)
            record = json.dumps({"step": 20, "step_time": step})
            (folder / "results.jsonl").write_text(f"{record}\n")
            took.append(20 * (number == 0) + 3 + step * n_steps + 2 * (1 if n_steps == 1 else 2))
        return took

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "_train", train)
    monkeypatch.setattr(machine, "available", lambda: 8)
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(plan, "launchers", lambda args: ["local", "ray"])
    return calls


def test_timings_are_told_apart_and_jobs_that_share_are_priced(trained, monkeypatch, capsys):
    monkeypatch.setattr(plan, "slots", lambda args, launcher, n=None: (
        n or 1 if launcher == "local" else 2))
    assert sweep.main([*PLAN, "--algorithms", "ERM"]) == 0
    out, err = capsys.readouterr()
    # 3 + 1001 x 0.5 + 11 x 2 = 525.5 s a run, and 6 runs; 1.5 times as long for two at a time.
    one, two = 20 + 6 * 525.5, 20 + 3 * 1.5 * 525.5
    of_ray = 3 * 1.5 * (525.5 + 20)  # its processes do not stay
    assert out.splitlines() == [
        "ERM Debug28: 6 runs, 0 done; 8.8 minutes each, at 500 ms an update and 2 s an evaluation",
        "total: 6 runs, 0 teachers, 0 done",
        "times as long as alone, on one device: 2 at a time 1.5 (measured with ERM Debug28 and "
        "assumed of all)",
        f"local --jobs_per_device 1: {one / 3600:.3g} hours, 1 at a time",
        f"local --jobs_per_device 2: {two / 3600:.3g} hours, 2 at a time; the fastest on this "
        "machine",
        f"ray: {of_ray / 3600:.3g} hours, 2 at a time"]
    assert err == "4 at a time cannot be timed: error: the GPU's memory ran out\n"


def test_jobs_that_share_are_timed_for_ten_seconds_with_an_even_share_of_the_cores(trained):
    assert sweep.main([*PLAN, "--algorithms", "ERM"]) == 0
    # At 525.5 s for 1001 updates, evaluations included, 10 s are 19 updates, after a first one.
    assert trained[3:6] == [(1, 20, None), (2, 20, 4), (2, 20, 4)]


def test_the_budget_is_that_of_the_number_of_jobs_asked_for(trained, capsys):
    # Six runs take 0.88 hours alone, 0.66 at two a time.
    assert sweep.main([*PLAN, "--algorithms", "ERM", "--budget", "0.7"]) == 0
    assert "--n_trials 1 --n_hparams 1\n" in capsys.readouterr().out
    assert sweep.main([*PLAN, "--algorithms", "ERM", "--budget", "0.7", "--jobs_per_device",
                       "2"]) == 0
    assert "--n_trials 1 --n_hparams 2\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_times_methods_and_their_teachers_here_and_leaves_nothing(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "SHARED_S", 0)  # three updates
    assert sweep.main([*PLAN, "--algorithms", "KDDG", "--budget", "1000"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "not measured" not in out and "within 1000 hours: --n_trials 1" in out
    assert out.count(" ms an update and ") == 2 and not Path("sweep").exists()


def test_what_cannot_be_timed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep.main([*PLAN, "--algorithms", "ERM", "--hparams", '{"batch_size": 0}']) == 0
    out, err = capsys.readouterr()
    assert err.startswith("ERM Debug28 test env 0, trial 0, hparams 0 cannot be timed: error: ")
    assert "batch_size" in err and "not measured yet: pass --measure or --hours_per_run" in out
