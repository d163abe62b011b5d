import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDENS, ROOT

from domainbed_kd import algorithms, command_launchers, datasets, machine
from domainbed_kd.console import run_main
from domainbed_kd.folder import claims
from domainbed_kd.scripts import collect_results, report, sweep
from domainbed_kd.sweep import listing, workers
from domainbed_kd.sweep.jobs import Job

SMALL = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1", "--n_trials", "1",
         "--hparams", '{"batch_size": 4}', "--steps", "3"]


def flags(command, folder, *more):
    return [command, *SMALL, "--output_dir", str(folder), "--skip_confirmation", *more]


def sh(args, **options):
    return subprocess.run([sys.executable, "-m", "domainbed_kd.scripts.sweep", *args],
                          capture_output=True, text=True, **options)


@pytest.fixture
def launched(monkeypatch):
    """A launcher called `pretend` that finishes each job at once, and what it was given."""
    commands = []

    def pretend(received):
        commands.extend(received)
        for command in received:
            (Path(command_of(command)["output_dir"][0]) / "done").write_text("done")

    monkeypatch.setitem(command_launchers.REGISTRY, "pretend", pretend)
    return commands


def command_of(command):
    """{flag: values} of a command line."""
    found = {}
    for word in workers.words(command)[3:]:
        if word.startswith("--"):
            values = found.setdefault(word[2:], [])
        else:
            values.append(word)
    return found


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


@pytest.mark.slow
def test_each_domain_held_out_with_others_has_a_column_and_runs_are_chosen_without_them(
        tmp_path, capsys):
    assert sweep.main(flags(
        "launch", tmp_path / "sweep", "--datasets", "DigitsDG", "--algorithms", "ERM", "KD",
        "--test_envs", "0", "1", "3", "--hparams",
        '{"batch_size": 4, "wrn_depth": 10, "wrn_widen": 1}', "--checkpoint_freq", "1",
        "--allow_bad_teacher")) == 0
    wanted = {}
    for run in runs_in(tmp_path / "sweep"):
        records = [json.loads(line) for line in (run / "results.jsonl").open()]
        best = max(records, key=lambda record: record["env2_out_acc"])
        accs = [100 * best[f"env{i}_in_acc"] for i in (0, 1, 3)]
        wanted[best["args"]["algorithm"]] = [f"{acc:.1f}" for acc in (*accs, sum(accs) / 3)]
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(tmp_path / "sweep")]) == 0
    out = capsys.readouterr().out
    for name in ("ERM", "KD"):
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        row = line.replace("?", " ").split()  # the teacher of so short a run is a bad one
        assert [row[i] for i in (1, 4, 7, 10)] == wanted[name]
    assert "texture" not in out and "absent" not in out
    assert report.main(["--input_dir", str(tmp_path / "sweep")]) == 0
    text = (tmp_path / "sweep" / "report.html").read_text()
    assert "Students and their teachers on each held-out domain of DigitsDG" in text
    assert sweep.main(flags("launch", tmp_path / "sweep", "--datasets", "DigitsDG",
                            "--test_envs", "0", "--hparams",
                            '{"batch_size": 4, "wrn_depth": 10, "wrn_widen": 1}')) == 0
    with pytest.raises(ValueError, match="hold out 0, some 0 1 3: these cannot share a column"):
        collect_results.main(["--input_dir", str(tmp_path / "sweep")])


def test_commands_come_in_the_order_of_the_list(tmp_path, launched):
    sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend", "--n_trials", "2"))
    seen = [(c["trial_seed"], c["test_envs"]) for c in map(command_of, launched)]
    sets = [["0"], ["0", "1"], ["0", "2"], ["1"], ["1", "2"], ["2"]]
    assert seen == [([t], s) for t in "01" for s in sets]


def test_a_sweep_of_domainbeds_is_seen_as_done_wherever_its_data_lie(tmp_path, capsys):
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    args = ["status", "--datasets", "VLCS", "--algorithms", "ERM", "--n_hparams", "2",
            "--n_trials", "2", "--steps", "1001", "--output_dir", str(tmp_path / "sweep")]
    assert sweep.main([*args, "--data_dir", "elsewhere"]) == 0
    first = capsys.readouterr().out.splitlines()[:2]
    assert [line.split() for line in first] == [
        ["algorithm", "done", "running", "interrupted", "failed", "not", "launched"],
        ["ERM", "40", "0", "0", "0", "0"]]


def test_status_counts_states_by_algorithm_and_by_data_set(tmp_path, capsys):
    args = flags("status", tmp_path, "--algorithms", "ERM", "SWAD", "--datasets", "Debug28",
                 "DigitsDG", "--single_test_envs")
    parsed = sweep.build_parser().parse_args(args)
    todo = [Job(train_args, str(tmp_path)) for train_args in args_list_of(parsed)]
    folders = [Path(job.output_dir) for job in todo]
    for folder, *files in ((folders[0], "out.txt", "done"), (folders[1], "out.txt"),
                           (folders[2], "out.txt", "failed"), (folders[3], "out.txt"),
                           (folders[4],)):
        folder.mkdir()
        for file in files:
            (folder / file).write_text("error: it is late\n")
    with claims.held(folders[1]):
        assert sweep.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert ["ERM", "1", "1", "0", "1", "4"] in rows and ["SWAD", "0", "0", "1", "0", "6"] in rows
    assert ["Debug28", "1", "1", "1", "1", "2"] in rows
    assert ["DigitsDG", "0", "0", "0", "0", "8"] in rows
    assert (f"failed: {folders[2]} (ERM Debug28 test env 2, trial 0, hparams 0): "
            "error: it is late") in lines
    assert "1 of those not launched have a folder: they wait in a queue" in lines[-1]


def test_status_tells_rate_and_time_left_from_what_jobs_took(tmp_path, capsys):
    args = flags("status", tmp_path, "--steps", "100", "--single_test_envs")
    parsed = sweep.build_parser().parse_args(args)
    folders = [Path(Job(train_args, str(tmp_path)).output_dir)
               for train_args in args_list_of(parsed)]
    for folder, cost in ((folders[0], {"seconds": 600, "steps": 100}),
                         (folders[1], {"seconds": 150, "steps": 50})):
        folder.mkdir()
        (folder / "memory.json").write_text(json.dumps({"rss_mb": 1, "gpu_mb": 0} | cost))
        (folder / "out.txt").touch()
    (folders[0] / "done").touch()
    with claims.held(folders[1]):
        assert sweep.main(args) == 0
    out = capsys.readouterr().out
    assert "running: 1 jobs, 0.333 updates a second together\n" in out
    # 50 updates at its own 3 s, and 100 at the 5 s that the 150 measured ones took on average.
    assert "left: 10.8 minutes with 1 at a time\n" in out


def test_status_reckons_with_the_jobs_at_a_time_that_the_launcher_would_have(tmp_path, capsys):
    args = flags("status", tmp_path, "--steps", "100", "--single_test_envs", "--jobs_per_device",
                 "2")
    done = Path(Job(args_list_of(sweep.build_parser().parse_args(args))[0],
                    str(tmp_path)).output_dir)
    done.mkdir()
    (done / "memory.json").write_text(json.dumps({"seconds": 600, "steps": 100}))
    (done / "done").touch()
    assert sweep.main(args) == 0
    assert "left: 10.0 minutes with 2 at a time\n" in capsys.readouterr().out + "\n"
    assert sweep.main([*args, "--jobs_per_device", "9"]) == 0  # of which two are left
    assert "left: 10.0 minutes with 2 at a time\n" in capsys.readouterr().out + "\n"


def test_status_counts_the_jobs_that_diverged(tmp_path, capsys):
    args = flags("status", tmp_path, "--algorithms", "ERM", "SWAD", "--datasets", "Debug28")
    jobs_listed = args_list_of(sweep.build_parser().parse_args(args))
    for train_args in jobs_listed[:2] + jobs_listed[-1:]:
        folder = Path(Job(train_args, str(tmp_path)).output_dir)
        folder.mkdir()
        (folder / "memory.json").write_text('{"diverged": "loss is nan since step 3"}')
    assert sweep.main(args) == 0
    assert ("diverged: the losses of 3 jobs are not finite (ERM 2, SWAD 1); their err.txt says "
            "since which step") in capsys.readouterr().out.splitlines()


def test_status_is_shown_again_until_all_jobs_are_done(tmp_path, launched, monkeypatch, capsys):
    waited = []

    def finish(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend"))

    monkeypatch.setattr(sweep.status.time, "sleep", finish)
    assert sweep.main(flags("status", tmp_path, "--watch", "7")) == 0
    assert waited == [7, 7]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:3] == "ERM"]
    assert rows == [["ERM", "0", "0", "0", "0", "6"]] * 2 + [["ERM", "6", "0", "0", "0", "0"]]


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


def runs_in(folder):
    """The folders of runs in a sweep's."""
    return [path for path in folder.iterdir() if path.is_dir()]


def args_list_of(args):
    return listing.make_args_list(
        args.n_trials, args.datasets, args.algorithms, args.n_hparams_from, args.n_hparams,
        args.data_dir, args.task, args.holdout_fraction, args.single_test_envs, steps=args.steps,
        hparams=args.hparams)


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


def test_further_flags_reach_train(tmp_path, launched):
    sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend", "--checkpoint_freq", "2",
                     "--uda_holdout_fraction", "0.5", "--skip_model_save", "--task",
                     "domain_adaptation"))
    given = command_of(launched[0])
    assert (given["checkpoint_freq"], given["uda_holdout_fraction"]) == (["2"], ["0.5"])
    assert given["skip_model_save"] == [] and given["task"] == ["domain_adaptation"]


def test_launcher_options_reach_the_launcher_that_takes_them(tmp_path, monkeypatch):
    received = {}
    monkeypatch.setitem(command_launchers.REGISTRY, "mine", lambda commands, *, jobs_per_device=1:
                        received.update(jobs_per_device=jobs_per_device))
    args = flags("launch", tmp_path, "--command_launcher", "mine")
    assert sweep.main([*args, "--jobs_per_device", "3"]) == 0
    assert received == {"jobs_per_device": 3}
    with pytest.raises(ValueError, match="mine does not take --threads_per_job"):
        sweep.main([*args, "--threads_per_job", "3"])


def test_a_name_given_twice_or_in_its_other_form_is_one_job(tmp_path, launched):
    sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend",
                     "--algorithms", "ERM", "ERM", "--datasets", "Debug28", "Debug28"))
    assert len(launched) == len(set(launched)) == 6


def test_flags_stand_in_a_file_with_comments_and_quotes(tmp_path, launched):
    (tmp_path / "my sweep.args").write_text(
        "# What we ran in May.\n--datasets Debug28 --algorithms ERM  # one method\n\n"
        "--hparams '{\"batch_size\": 4, \"a\": \"b c\"}'\n--n_hparams 5 --n_trials 1\n"
        "--single_test_envs --skip_confirmation --command_launcher pretend\n")
    sweep.main(["launch", f"@{tmp_path / 'my sweep.args'}", "--n_hparams", "1",
                "--output_dir", str(tmp_path / "sweep")])
    assert len(launched) == 3
    assert command_of(launched[0])["hparams"] == ['{"batch_size": 4, "a": "b c"}']


def test_defaults_are_domainbeds():
    args = sweep.build_parser().parse_args(["launch", "--output_dir", "x"])
    full = json.loads((GOLDENS / "jobs_full_default.json").read_text())
    assert args.datasets == full["sweep_DATASETS"]
    assert args.algorithms == list(algorithms.ALGORITHMS)
    assert (args.task, args.n_hparams_from, args.n_hparams, args.n_trials, args.steps,
            args.hparams, args.holdout_fraction, args.single_test_envs, args.skip_confirmation) == (
        "domain_generalization", 0, 20, 3, None, None, 0.2, False, False)


@pytest.mark.parametrize("change, message", [
    (["--n_trials", "-1"], "--n_trials is -1"),
    (["--n_trials", "0"], "--n_trials is 0"),
    (["--n_trials", "two"], "invalid int value: 'two'"),
    (["--n_hparams_from", "-1"], "--n_hparams_from is -1"),
    (["--n_hparams_from", "3", "--n_hparams", "3"], "not a count"),
    (["--steps", "-5"], "--steps is -5"),
    (["--checkpoint_freq", "-5"], "--checkpoint_freq is -5"),
    (["--holdout_fraction", "0"], "--holdout_fraction is 0"),
    (["--holdout_fraction", "1.5"], "--holdout_fraction is 1.5"),
    (["--uda_holdout_fraction", "1"], "--uda_holdout_fraction is 1"),
    (["--hparams", '{"lr": 1'], "--hparams is not JSON"),
    (["--hparams", "[1]"], "--hparams takes a JSON object"),
    (["--task", "domain_generalisation"], "invalid choice"),
    (["--task", "domain_adaptation"], "--uda_holdout_fraction"),
    (["--algorithms", "SWADD"], "Algorithm not found: SWADD. Did you mean SWAD?"),
    (["--datasets", "Debug28", "PASC"], "Dataset not found: PASC. Did you mean PACS?"),
    (["--datasets", "Folder:../x"], "without a path"),
    (["--datasets", "Folder:x"], "--data_dir"),
    (["--datasets", "Folder:x", "--data_dir", "."], "Folder:x"),
    (["--datasets", "PACS"], "PACS: no data directory is given"),
    (["--datasets", "RotatedMNIST"], "RotatedMNIST: no data directory is given"),
    (["--datasets", "PACS", "--data_dir", "/no/such"], "no folder /no/such/PACS"),
    (["--datasets", "RotatedMNIST", "--data_dir", "/no/such"], "no folder /no/such"),
    (["--command_launcher", "locl"], "Launcher not found: locl. Did you mean local?"),
    (["--command_launcher", "no_module:f"], "Launcher not found: no_module:f"),
    (["--command_launcher", "os:getcwd", "--jobs_per_device", "2"], "does not take"),
    (["--test_envs", "3"], "Debug28 has environments 0 to 2"),
    (["--test_envs", "0", "1", "2"], "holds out all of Debug28"),
    (["--test_envs", "0", "1", "1"], "names an environment twice"),
    (["--test_envs", "0", "1"], "Name one, or three or more"),
    (["--test_envs", "0", "--single_test_envs"], "Leave one out"),
    (["--retry", "-1"], "--retry is -1"),
    (["--slurm_gpus", "-1"], "--slurm_gpus is -1"),
    (["--slurm_time", "0"], "--slurm_time is 0"),
    (["--slurm_cluster", "lsf"], "invalid choice"),
    (["--slurm_time", "5"], "local does not take --slurm_time"),
    (["--ray_gpus", "nan"], "--ray_gpus is nan"),
    (["--ray_cpus", "inf"], "--ray_cpus is inf"),
    (["--budget", "0"], "--budget is 0"),
    (["--hours_per_run", "-1"], "--hours_per_run is -1"),
    (["--watch", "0"], "--watch is 0"),
    (["--watch", "nan"], "--watch is nan"),
    (["--jobs_per_device", "0"], "--jobs_per_device is 0"),
    (["--threads_per_job", "0"], "--threads_per_job is 0"),
    (["--loader_processes", "-1"], "--loader_processes is -1"),
    (["--plugin", "no_such_module"], "--plugin no_such_module"),
    (["--output_dir", __file__], "is a file"),
    (["--output_dir", f"{__file__}/x"], "Not a directory"),
    (["@no_such_file"], "No such file"),
    (["--nonsense"], "--nonsense")])
def test_misuse_is_said_in_one_line_before_anything_is_written(
        change, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: sweep.main([*flags("launch", "sweep"), *change]))
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and message in err
    assert os.listdir(tmp_path) == []


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


def records_of(job):
    """A job's records without what depends on the time or the place."""
    lines = (Path(job.output_dir) / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        del record["step_time"], record["args"]["output_dir"]
    return records


@pytest.mark.slow
def test_real_jobs_train_side_by_side_and_a_second_launch_runs_nothing(tmp_path):
    folder = tmp_path / "a 'folder'; touch $(oops)"
    args = flags("launch", folder, "--single_test_envs", "--jobs_per_device", "2")
    ran = sh([*args, "--data_dir", "here"], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert len(list(folder.glob("*/done"))) == len(list(folder.glob("*/model.pkl"))) == 3
    lines = sorted(line.split("] ")[1].rsplit("  (", 1)[0] for line in ran.stderr.splitlines())
    assert lines == [f"done  ERM Debug28 test env {i}, trial 0, hparams 0" for i in range(3)]
    assert "env0_in_acc" not in ran.stdout
    assert os.listdir(tmp_path) == [folder.name]
    again = sh([*args, "--data_dir", "moved"], cwd=tmp_path)
    assert "\nAbout to launch 0 jobs." in again.stdout and "3 jobs: 3 done" in again.stdout
    # The warm worker left what the same command leaves in a process of its own.
    parsed = sweep.build_parser().parse_args([*args, "--data_dir", "here"])
    args_list = args_list_of(parsed)
    warm, alone = (Job(args_list[0], str(place)) for place in (folder, tmp_path / "alone"))
    subprocess.run(workers.words(alone.command_str), cwd=tmp_path, check=True,
                   capture_output=True)
    assert records_of(warm) == records_of(alone)


@pytest.mark.slow
def test_failing_jobs_are_named_with_their_last_error_and_the_others_go_on(tmp_path):
    # Of the algorithms' default hparams, only DANN's has mlp_width as a number.
    ran = sh(flags("launch", tmp_path, "--single_test_envs", "--algorithms", "DANN", "ERM",
                   "--hparams", '{"batch_size": 4, "mlp_width": "wide"}'))
    assert ran.returncode == 1
    progress, summary = ran.stderr.split("3 of 6 jobs failed:\n")
    lines = summary.splitlines()
    assert len(lines) == 3 and all("error: --hparams: mlp_width" in line for line in lines)
    assert progress.count("  exit status 2") == 3
    assert len(list(tmp_path.glob("*/done"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_training_survives_its_sweep(number, tmp_path):
    args = flags("launch", tmp_path, "--single_test_envs", "--jobs_per_device", "2")
    process = subprocess.Popen(
        [sys.executable, "-m", "domainbed_kd.scripts.sweep", *args, "--steps", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*/results.jsonl"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(trainers(tmp_path)) >= 2
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.communicate(timeout=30)
    while trainers(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list(tmp_path.glob("*/resume.pt"))) == 2
    if number == signal.SIGINT:  # what had not begun can be launched again
        assert process.returncode == 130 and len(runs_in(tmp_path)) == 2


def trainers(folder):
    """The processes that have a file open under a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(os.readlink(fd)).startswith(str(folder)) for fd in process.glob("fd/*")):
                found.append(process.name)
        except OSError:
            continue
    return found


def test_every_data_set_without_files_can_be_swept_without_data_dir(tmp_path, launched):
    fileless = [name for name in datasets.DATASETS if not datasets.facts(name).NEEDS_FILES]
    assert "DigitsDG" in fileless
    for name in fileless:
        assert sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend",
                                "--datasets", name)) == 0


def left_by_a_killed_job(folder, launched):
    """Makes an incomplete job of one that `pretend` finished, and returns its folder."""
    run = Path(command_of(launched[0])["output_dir"][0])
    (run / "done").unlink()
    (run / "out.txt").write_text("Environment:\n")
    return run


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


@pytest.mark.slow
def test_two_launchers_on_one_folder_run_each_job_once(tmp_path):
    args = flags("launch", tmp_path / "sweep", "--single_test_envs", "--steps", "40")
    command = [sys.executable, "-m", "domainbed_kd.scripts.sweep", *args]
    launchers = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  text=True) for _ in range(2)]
    errors = [launcher.communicate()[1] for launcher in launchers]
    for launcher, said in zip(launchers, errors):  # who ends first may have left a job running
        assert launcher.returncode == ("that others run are not done yet" in said), said
        assert "failed" not in said, said
    assert 0 in (launcher.returncode for launcher in launchers)
    runs = sorted(runs_in(tmp_path / "sweep"))
    assert len(runs) == 3
    for run in runs:
        steps = [json.loads(line)["step"] for line in (run / "results.jsonl").open()]
        assert steps == sorted(set(steps)) and (run / "done").exists()
        assert (run / "out.txt").read_text().count("Environment:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher, library, kills, algorithms", [
    ("local", "torch", 4, ["ERM", "SWAD"]), ("ray", "ray", 2, ["KDDG"]),
    ("slurm", "submitit", 2, ["KDDG"])])
def test_a_sweep_that_is_killed_again_and_again_ends_in_the_same_bits(
        launcher, library, kills, algorithms, tmp_path, request):
    pytest.importorskip(library)
    if launcher == "ray":
        request.getfixturevalue("ray")
    tool = ROOT / "tools" / "chaos.py"
    ran = subprocess.run(
        [sys.executable, str(tool), "--folder", str(tmp_path / "chaos"), "--dataset", "Debug28",
         "--algorithms", *algorithms, "--steps", "21", "--kills", str(kills), "--within_s", "4",
         "--launcher", launcher],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tool.parents[1])})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("6 jobs, quiet") and "0 differences" in ran.stdout


def test_status_shows_the_most_memory_that_a_job_of_each_algorithm_held(tmp_path, capsys):
    args = flags("status", tmp_path, "--algorithms", "ERM", "SWAD", "--datasets", "Debug28")
    assert sweep.main(args) == 0
    assert "memory" not in capsys.readouterr().out
    parsed = sweep.build_parser().parse_args(args)
    folders = [Job(train_args, str(tmp_path)).output_dir for train_args in args_list_of(parsed)
               if train_args["algorithm"] == "ERM"]
    for folder, content in zip(folders, ('{"rss_mb": 400.4, "gpu_mb": 0.0}',
                                         '{"rss_mb": 300.0, "gpu_mb": 70.6}', "damaged")):
        os.makedirs(folder)
        with open(os.path.join(folder, "memory.json"), "w") as file:
            file.write(content)
    assert sweep.main(args) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "most memory of a job, MiB of process + GPU: ERM 400 + 71")


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
