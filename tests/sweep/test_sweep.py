import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from launches import args_list_of, flags, runs_in, sh

from domainbed_kd.scripts import collect_results, report, sweep
from domainbed_kd.sweep import workers
from domainbed_kd.sweep.jobs import Job


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
