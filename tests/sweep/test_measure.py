import json
from pathlib import Path

import pytest

from domainbed_kd.scripts import sweep
from domainbed_kd.sweep import measure

PLAN = ["plan", "--datasets", "Debug28", "--n_hparams", "2", "--n_trials", "1",
        "--single_test_envs", "--hparams", '{"batch_size": 4}', "--steps", "1001",
        "--checkpoint_freq", "100", "--output_dir", "sweep", "--measure"]


@pytest.mark.parametrize("n_steps, freq", [(1, 5), (2, 5), (6, 5), (7, 5), (1001, 100), (10, 1)])
def test_a_run_is_its_start_its_updates_and_its_evaluations(n_steps, freq):
    evaluated = [step for step in range(n_steps) if step % freq == 0 or step == n_steps - 1]
    assert measure.Timing(3, 0.5, 2).of_run(n_steps, freq) == pytest.approx(
        3 + n_steps * 0.5 + 2 * len(evaluated))


def test_timings_are_told_apart(tmp_path, monkeypatch, capsys):
    # A start of 3 s, 0.5 s an update, 2 s an evaluation.
    def train(job, folder, flags):
        n_steps = flags.get("steps", measure.N_STEPS + 1)
        folder.mkdir(parents=True)
        (folder / "results.jsonl").write_text(json.dumps({"step": 20, "step_time": 0.5}) + "\n")
        return 3 + 0.5 * n_steps + 2 * (1 if n_steps == 1 else 2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "_train", train)
    assert sweep.main([*PLAN, "--algorithms", "ERM"]) == 0
    out = capsys.readouterr().out.splitlines()
    # 3 + 1001 x 0.5 + 11 x 2 = 525.5 s a run, and 6 runs.
    assert out[0] == ("ERM Debug28: 6 runs, 0 done; 8.8 minutes each, at 500 ms an update and "
                      "2 s an evaluation")
    assert f"local: {6 * 525.5 / 3600:.3g} hours, 1 at a time" in out


@pytest.mark.slow
def test_a_plan_times_methods_and_their_teachers_here_and_leaves_nothing(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
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
