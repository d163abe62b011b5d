import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from launches import command_of, flags, left_by_a_killed_job, runs_in, sh

from domainbed_kd import command_launchers, machine
from domainbed_kd.folder import claims
from domainbed_kd.scripts import collect_results, sweep


def test_launching_twice_runs_nothing_the_second_time(tmp_path, launched, capsys):
    args = flags("launch", tmp_path / "sweep", "--command_launcher", "pretend")
    assert sweep.main(args) == 0
    out = capsys.readouterr().out
    assert ("6 jobs: 0 done, 0 running, 0 interrupted, 0 failed, 6 not launched.\n"
            "About to launch 6 jobs.\n") in out
    assert out.endswith("Launching...\nMaking job directories:\nLaunched 6 jobs!\n")
    assert len(launched) == 6
    assert sweep.main(args) == 0
    out = capsys.readouterr().out
    assert out.endswith("6 jobs: 6 done, 0 running, 0 interrupted, 0 failed, 0 not launched.\n"
                        "About to launch 0 jobs.\n")
    assert out.count("\nDone: ") + out.startswith("Done: ") == 6
    assert len(launched) == 6


def test_domains_can_be_held_out_together(tmp_path, launched, capsys):
    folder = tmp_path / "sweep"
    args = flags("launch", folder, "--command_launcher", "pretend", "--datasets", "DigitsDG",
                 "--algorithms", "ERM", "KD", "--n_trials", "2", "--test_envs", "0", "1", "3")
    assert sweep.main(args) == 0
    commands = [command_of(command) for command in launched]
    assert [(c["algorithm"], c["trial_seed"], c["test_envs"]) for c in commands] == [
        ([name], [trial], ["0", "1", "3"]) for name in ("ERM", "KD") for trial in "01"]
    ran = {c["trial_seed"][0]: c["output_dir"] for c in commands[:2]}
    assert [c["teacher"] for c in commands[2:]] == [ran["0"], ran["1"]]
    # Whoever says the rest of the flags, or nothing but the folder, means the same runs.
    for again in (args, ["launch", str(folder)]):
        assert sweep.main(again) == 0
        assert "4 jobs: 4 done" in capsys.readouterr().out
    assert sweep.main(["status", str(folder)]) == 0
    assert "DigitsDG            4 " in capsys.readouterr().out
    assert sweep.main(["plan", str(folder)]) == 0
    assert "total: 4 runs, 2 teachers, 4 done" in capsys.readouterr().out
    assert len(launched) == 4


def test_commands_come_in_the_order_of_the_list(tmp_path, launched):
    sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend", "--n_trials", "2"))
    seen = [(c["trial_seed"], c["test_envs"]) for c in map(command_of, launched)]
    sets = [["0"], ["0", "1"], ["0", "2"], ["1"], ["1", "2"], ["2"]]
    assert seen == [([t], s) for t in "01" for s in sets]


def test_failed_jobs_are_launched_again_as_often_as_asked(tmp_path, monkeypatch, capsys):
    attempts = []

    def launcher(commands):
        attempts.append(len(commands))
        for command in commands[len(attempts):]:
            folder = Path(command_of(command)["output_dir"][0])
            (folder / "out.txt").touch()
            (folder / "done").touch()
        return [1] * min(len(attempts), len(commands)) + [0] * (len(commands) - len(attempts))

    monkeypatch.setitem(command_launchers.REGISTRY, "mine", launcher)
    args = flags("launch", tmp_path, "--command_launcher", "mine", "--retry", "2")
    assert sweep.main(args) == 1
    assert attempts == [6, 1, 1]
    err = capsys.readouterr().err
    assert err.count("1 jobs failed and are launched again.") == 2
    assert "1 of 6 jobs failed:" in err and "exit status 1, no message" in err


def test_what_was_stopped_has_not_failed_and_nothing_more_is_launched(
        tmp_path, monkeypatch, capsys):
    attempts = []

    def lost(commands):
        attempts.append(len(commands))
        for command, done in zip(commands, (True, False, False)):
            folder = Path(command_of(command)["output_dir"][0])
            (folder / "out.txt").touch()
            if done:
                (folder / "done").touch()
        return [0, 1, claims.STOPPED]

    monkeypatch.setitem(command_launchers.REGISTRY, "lost", lost)
    args = flags("launch", tmp_path, "--command_launcher", "lost", "--retry", "2",
                 "--algorithms", "ERM", "KDDG", "--single_test_envs")
    assert sweep.main(args) == 1 and attempts == [3]
    err = capsys.readouterr().err
    assert "1 jobs were stopped. The same command continues them." in err
    assert "1 of 6 jobs failed:" in err
    sweep.main(["status", *args[1:]])
    assert ["ERM", "1", "0", "1", "1", "0"] in [
        line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("flag", ["--diagnostics", "--save_logits", "--format",
                                  "--allow_bad_teacher"])
def test_a_sweep_goes_on_whatever_its_runs_are_to_keep_and_finished_runs_that_lack_it_are_named(
        flag, tmp_path, launched, capsys):
    args = flags("launch", tmp_path, "--command_launcher", "pretend")
    sweep.main(args)
    for command in launched:
        run = command_of(command)
        record = {"step": 2, "args": json.loads(
            (Path(run["output_dir"][0]) / "args.json").read_text())}
        (Path(run["output_dir"][0]) / "results.jsonl").write_text(json.dumps(record) + "\n")
    begun = left_by_a_killed_job(tmp_path, launched)
    more = [flag, *(["safetensors"] if flag == "--format" else [])]
    capsys.readouterr()
    assert sweep.main(["status", *args[1:], *more]) == 0
    out, err = capsys.readouterr()
    assert ["ERM", "5", "0", "1", "0", "0"] in [line.split() for line in out.splitlines()]
    assert sweep.main([*args, *more]) == 0
    assert [command_of(command)["output_dir"] for command in launched[6:]] == [[str(begun)]]
    if flag == "--allow_bad_teacher":
        assert err == ""
    else:
        assert err.startswith(f"{flag}: 5 finished runs were trained without it and lack what ")
        assert err.count(f"{tmp_path}/") == 3 and "and 2 more. To get it, delete their" in err


def test_running_jobs_are_not_deleted(tmp_path, launched, capsys):
    sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend"))
    for command in launched[:2]:
        run = left_by_a_killed_job(tmp_path, [command])
    with claims.held(run):
        assert sweep.main(flags("delete_incomplete", tmp_path)) == 0
    out, err = capsys.readouterr()
    assert "Deleted 1 jobs!" in out and "1 jobs are running and are kept." in err
    assert run.exists() and len(runs_in(tmp_path)) == 5


def test_incomplete_jobs_are_kept_and_named_at_launch_and_deleted_on_demand(
        tmp_path, launched, capsys):
    args = flags("launch", tmp_path, "--command_launcher", "pretend")
    sweep.main(args)
    for command in launched[:2]:
        os.remove(os.path.join(command_of(command)["output_dir"][0], "done"))
    capsys.readouterr()
    sweep.main(args)
    out, err = capsys.readouterr()
    assert "6 jobs: 4 done, 0 running, 0 interrupted, 0 failed, 2 not launched." in out
    assert "2 jobs wait for their launcher and are left alone" in err and "delete_incomplete" in err
    assert sweep.main(flags("delete_incomplete", tmp_path)) == 0
    out, err = capsys.readouterr()
    assert out.endswith("About to delete 2 jobs.\nDeleting...\nDeleted 2 jobs!\n")
    assert "2 of them wrote in the last 10 minutes" in err
    assert len(runs_in(tmp_path)) == 4
    sweep.main(args)
    assert len(launched) == 8


def test_dummy_prints_the_commands_and_leaves_no_folder(tmp_path, capsys):
    args = flags("launch", tmp_path / "sweep", "--command_launcher", "dummy")
    assert sweep.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Dummy launcher: python -m domainbed_kd.scripts.train --algorithm "
                               "ERM ") for line in lines) == 6
    assert not (tmp_path / "sweep").exists()


def test_hparams_that_nothing_reads_are_named_before_anything_is_launched(tmp_path, monkeypatch,
                                                                          capsys):
    monkeypatch.setattr(command_launchers, "REGISTRY", command_launchers.REGISTRY.copy())
    args = flags("launch", tmp_path / "sweep", "--command_launcher", "dummy", "--hparams",
                 '{"lrr": 1, "mmd_gamma": 2.0, "sma_start": 3, "wrn_depth": 10, "lr": 0.1}')
    sweep.main(args)
    assert capsys.readouterr().err == (
        "--hparams: nothing here reads 'lrr'. Did you mean lr?\n")
    plugin = tmp_path / "my_launcher.py"
    plugin.write_text("LAUNCHERS = {'none': print}\n")
    sweep.main([*args, "--plugin", str(plugin)])  # it might read it
    assert capsys.readouterr().err == ""


def test_multi_gpu_without_a_gpu_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "n_gpus", lambda: 0)
    with pytest.raises(ValueError, match="sees no GPU"):
        sweep.main(flags("launch", tmp_path, "--command_launcher", "multi_gpu"))
    assert os.listdir(tmp_path) == []


def test_nobody_can_be_asked_without_a_terminal(tmp_path):
    ran = sh(flags("launch", tmp_path / "sweep")[:-1], stdin=subprocess.DEVNULL)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1 and "--skip_confirmation" in ran.stderr
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("answer, deleted", [("n\n", False), ("Yes\n", True), ("\x04", False)])
def test_the_question_on_a_terminal_is_domainbeds(answer, deleted, tmp_path, launched):
    sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend"))
    os.remove(os.path.join(command_of(launched[0])["output_dir"][0], "done"))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "domainbed_kd.scripts.sweep",
         *flags("delete_incomplete", tmp_path)[:-1]],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(ours, answer.encode())
    out, err = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, err
    assert "Are you sure? (y/n) " in out
    assert ("Deleted 1 jobs!" in out, "Nevermind!" in out) == (deleted, not deleted)
    assert len(runs_in(tmp_path)) == 6 - deleted


def test_a_job_that_ended_early_goes_on_at_the_next_launch(tmp_path, launched, capsys):
    args = flags("launch", tmp_path, "--command_launcher", "pretend")
    sweep.main(args)
    run = left_by_a_killed_job(tmp_path, launched)
    capsys.readouterr()
    assert sweep.main(args) == 0
    out, err = capsys.readouterr()
    assert "About to launch 1 jobs." in out and "1 of them ended early and continue" in err
    assert launched[6:] == launched[:1] and (run / "done").exists()


def test_a_job_that_is_at_work_is_launched_by_nobody_else(tmp_path, launched, capsys):
    args = flags("launch", tmp_path, "--command_launcher", "pretend")
    sweep.main(args)
    run = left_by_a_killed_job(tmp_path, launched)
    capsys.readouterr()
    with claims.held(run):
        assert sweep.main(args) == 1  # not all is done
        with pytest.raises(ValueError, match="Another process trains in"), claims.held(run):
            pass
    out, err = capsys.readouterr()
    assert "About to launch 0 jobs." in out and "1 jobs are running and are left alone" in err
    assert len(launched) == 6
    assert sweep.main(args) == 0 and len(launched) == 7


def test_what_a_process_left_that_was_killed_in_a_finished_run_is_removed(tmp_path, launched):
    args = flags("launch", tmp_path, "--command_launcher", "pretend")
    sweep.main(args)
    dead, alive = (Path(command_of(command)["output_dir"][0]) for command in launched[:2])
    (dead / "out.txt").touch()
    beat = json.dumps({"host": "here", "boot": claims._boot(), "pid": 1})
    (dead / "heartbeat").write_text(beat)
    with claims.held(alive):
        assert sweep.main(args) == 0
        assert sorted(os.listdir(dead)) == ["args.json", "done", "out.txt"]
        assert (alive / "heartbeat").exists()


def test_it_is_said_how_many_wait_for_their_teachers_and_who_need_not_wait_does_not(
        tmp_path, monkeypatch, capsys):
    waves = []

    def finish(commands):
        waves.append(sorted(command_of(command)["algorithm"][0] for command in commands))
        for command in commands:
            (Path(command_of(command)["output_dir"][0]) / "done").write_text("done")

    monkeypatch.setitem(command_launchers.REGISTRY, "finish", finish)
    args = flags("launch", tmp_path, "--command_launcher", "finish", "--single_test_envs",
                 "--algorithms", "KDDG", "--n_hparams")
    sweep.main([*args, "1"])
    assert waves == [["ERM"] * 3, ["KDDG"] * 3]
    assert "3 of them wait for their teachers and are counted after these." in (
        capsys.readouterr().err)
    sweep.main([*args, "2"])
    assert waves[2:] == [["KDDG"] * 3] and "wait for their teachers" not in capsys.readouterr().err


@pytest.mark.parametrize("is_stopped", [False, True])
def test_students_whose_teachers_fail_are_known_to_tables_but_not_of_a_launch_that_is_stopped(
        tmp_path, monkeypatch, capsys, is_stopped):
    def fail(commands):
        if commands and is_stopped:
            raise KeyboardInterrupt
        return [1] * len(commands)

    monkeypatch.setitem(command_launchers.REGISTRY, "fail", fail)
    monkeypatch.setattr(command_launchers, "BLOCKING", (fail,))
    args = flags("launch", tmp_path, "--command_launcher", "fail", "--single_test_envs",
                 "--algorithms", "ERM", "KDDG", "--n_hparams", "1")
    with pytest.raises(KeyboardInterrupt) if is_stopped else contextlib.nullcontext():
        assert sweep.main(args) == 1
    folders = runs_in(tmp_path)
    if is_stopped:
        assert folders == []
        return
    names = [json.loads((path / "args.json").read_text())["algorithm"] for path in folders]
    assert sorted(names) == ["ERM"] * 3 + ["KDDG"] * 3
    assert "3 jobs are not launched, as their teachers have not finished" in capsys.readouterr().err
    assert collect_results.main(["--input_dir", str(tmp_path)]) == 0
    assert "Debug28, KDDG, all test envs: trial 0, hparams 0\n" in capsys.readouterr().out
    sweep.main(args)
    assert "About to launch 6 jobs." in capsys.readouterr().out


def test_what_another_launcher_took_first_has_not_failed(tmp_path, monkeypatch, capsys):
    def beaten(commands):
        for command in commands:
            (Path(command_of(command)["output_dir"][0]) / "done").write_text("done")
        return [2] * len(commands)

    monkeypatch.setitem(command_launchers.REGISTRY, "beaten", beaten)
    assert sweep.main(flags("launch", tmp_path, "--command_launcher", "beaten")) == 0
