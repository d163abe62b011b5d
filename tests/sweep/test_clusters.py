"""Launchers for clusters, with submitit's local executor and a Ray cluster on this machine."""

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from conftest import ROOT

from domainbed_kd.folder import claims
from domainbed_kd.scripts import sweep
from domainbed_kd.sweep import clusters

spec = importlib.util.spec_from_file_location("chaos", ROOT / "tools" / "chaos.py")
chaos = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chaos)

SMALL = ["launch", "--datasets", "Debug28", "--n_hparams", "1", "--n_trials", "1",
         "--single_test_envs", "--skip_confirmation", "--output_dir", "sweep",
         "--checkpoint_freq", "25", "--hparams", '{"batch_size": 8}']


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit")


def start(folder, *flags):
    """Starts a sweep in a folder of its own; all such sweeps have the same paths."""
    folder.mkdir(exist_ok=True)
    with (folder / "launcher.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "domainbed_kd.scripts.sweep", *SMALL, *flags],
            cwd=folder, stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def quiet(folder, *flags):
    assert start(folder / "quiet", *flags).wait() == 0
    return folder / "quiet"


def python(code, *args):
    return shlex.join(["python", "-c", code, *map(str, args)])


@pytest.mark.slow
def test_slurm_jobs_return_their_statuses_and_are_said(submitit, tmp_path, capfd):
    commands = [python("pass"), python("raise SystemExit(3)")]
    assert clusters.slurm(commands, slurm_logs=str(tmp_path), slurm_cluster="local",
                          slurm_gpus=0) == [0, 3]
    err = capfd.readouterr().err
    assert "] done  " in err and "exit status 3\n" in err and "[2/2] " in err


@pytest.mark.slow
def test_a_slurm_job_that_times_out_goes_on_and_ends_in_the_same_bits(submitit, tmp_path):
    # submitit takes a signal in a job's last ten minutes for a time-out: here, at any moment.
    flags = ["--algorithms", "ERM", "--steps", "100"]
    folder = tmp_path / "timed"
    timed = start(folder, *flags, "--command_launcher", "slurm", "--slurm_cluster", "local",
                  "--slurm_gpus", "0", "--slurm_time", "5", "--slurm_parallel", "2")
    wait_for(lambda: list(folder.glob("sweep/*/results.jsonl")) or timed.poll() is not None)
    for pid in chaos.processes(folder):
        if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGUSR2)
    status = timed.wait()
    assert status == 0, (folder / "launcher.log").read_text()
    errors = [path.read_text() for path in folder.glob("sweep/*/err.txt")]
    assert any("Stopped after step" in text and "Continuing at step" in text for text in errors)
    assert chaos.differences(quiet(tmp_path, *flags), folder) == []
    wait_for(lambda: not chaos.processes(folder))


def test_a_signal_makes_a_slurm_job_save_and_gives_the_command_that_goes_on(submitit):
    task = clusters.Task(python("import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: "
                                "sys.exit(143)); print('ready', flush=True); signal.pause()"))
    task.process = subprocess.Popen(shlex.split(task.command.replace("python", sys.executable, 1)),
                                    stdout=subprocess.PIPE, text=True)
    assert task.process.stdout.readline() == "ready\n"
    again = task.checkpoint().function
    assert task.process.wait() == 143
    assert again.command == task.command + clusters.WAIT
    again.process = subprocess.Popen([sys.executable, "-c", "pass"])
    again.process.wait()
    assert again.checkpoint().function.command == again.command  # once is enough


def test_a_job_that_slurm_is_about_to_preempt_is_started_again_until_both_are_killed(tmp_path):
    code = "import os, sys; p = sys.argv[1]; n = os.path.exists(p); open(p, 'w'); sys.exit(0 if n "
    assert clusters.Task(python(code + "else 143)", tmp_path / "seen"))() == 0


def test_slurm_parameters_reach_submitit(submitit, tmp_path, monkeypatch):
    seen = {}

    class Executor:
        def __init__(self, folder, cluster, **options):
            seen.update(folder=folder, cluster=cluster, **options)

        def update_parameters(self, **parameters):
            seen.update(parameters)

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setattr(clusters.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(clusters, "_array", lambda executor, commands, before, n: [0] * n)
    assert clusters.slurm(["x"] * 3, slurm_partition="gpu", slurm_gpus=2, slurm_cpus=8,
                          slurm_time=60, slurm_parallel=2, slurm_logs="logs",
                          slurm_extra='{"slurm_account": "me", "mem_gb": 32}') == [0, 0, 0]
    assert seen == {
        "folder": "logs", "cluster": "slurm", "slurm_max_num_timeout": clusters.MAX_TIMEOUTS,
        "name": "domainbed_kd", "timeout_min": 60, "cpus_per_task": 8, "gpus_per_node": 2,
        "slurm_array_parallelism": 2, "slurm_partition": "gpu", "slurm_account": "me",
        "mem_gb": 32}


@pytest.mark.parametrize("options, message", [
    ({}, "finds no sbatch"), ({"slurm_cluster": "local", "slurm_extra": "{"}, "is not JSON"),
    ({"slurm_cluster": "local", "slurm_extra": "[]"}, "takes a JSON object"),
    ({"slurm_cluster": "local", "slurm_extra": '{"slurm_acount": 1}'}, "acount")])
def test_what_slurm_cannot_use_is_refused(options, message, submitit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        clusters.slurm(["x"], slurm_logs=str(tmp_path), **options)


@pytest.mark.parametrize("launcher, library", [("slurm", "submitit"), ("ray", "ray")])
def test_a_launcher_without_its_library_names_the_extra(launcher, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"domainbed_kd\[{launcher}\]"):
        sweep.main([*SMALL, "--output_dir", str(tmp_path), "--command_launcher", launcher])
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_ray_sweep_that_loses_a_node_ends_in_the_same_bits(ray, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--algorithms", "ERM", "--steps", "150"]
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    try:
        runs = tmp_path / "lost" / "sweep"
        lost = start(tmp_path / "lost", *flags, "--command_launcher", "ray", "--ray_address",
                     cluster.address)

        def begun():
            return len(list(runs.glob("*/results.jsonl"))) if lost.poll() is None else 9

        # The launcher belongs to the only node that is there when it starts.
        wait_for(lambda: begun() >= 1)
        node = cluster.add_node(num_cpus=1, num_gpus=0)
        wait_for(lambda: len(chaos.jobs_at_work(tmp_path / "lost")) >= 2 or begun() == 9)
        wait_for(lambda: begun() >= 2)
        cluster.remove_node(node, allow_graceful=False)
        status, log = lost.wait(), (tmp_path / "lost" / "launcher.log").read_text()
    finally:
        cluster.shutdown()
    assert status == 0 and "it continues elsewhere" in log, log
    assert chaos.differences(quiet(tmp_path, *flags), tmp_path / "lost") == []
    wait_for(lambda: not chaos.jobs_at_work(tmp_path / "lost"))


@pytest.mark.slow
def test_ray_starts_a_cluster_of_its_own_and_refuses_what_it_has_not(ray, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = python("import sys; open(sys.argv[1], 'w'); sys.exit(3)", tmp_path / "here")
    assert clusters.ray([command]) == [3] and (tmp_path / "here").exists()
    with pytest.raises(ValueError, match="takes 999 CPUs"):
        clusters.ray([command], ray_cpus=999)


@pytest.mark.slow
def test_ray_gives_each_job_its_share_of_a_gpu(ray, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    cluster = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 4, "num_gpus": 2, "include_dashboard": False})
    try:
        for share, wanted in ((0.5, {"0", "1"}), (2, {"0,1", "1,0"}), (None, {"0", "1"})):
            places = [tmp_path / f"{share} {i}" for i in range(3)]
            assert clusters.ray([python(code, place) for place in places],
                                ray_address=cluster.address, ray_gpus=share) == [0, 0, 0]
            assert {place.read_text() for place in places} <= wanted
    finally:
        cluster.shutdown()


class Lost:
    """What the launcher sees of Ray: one job has ended, then its own node dies."""

    def __init__(self, ray):
        self.exceptions, self.gets = ray.exceptions, 0

    def wait(self, refs, num_returns):
        return refs[:1], refs[1:]

    def get(self, ref):
        self.gets += 1
        if self.gets > 1:
            raise self.exceptions.LocalRayletDiedError
        return 0

    def cancel(self, ref, force):
        raise AssertionError("nobody is there who could")


def test_jobs_of_a_ray_cluster_that_is_lost_are_stopped_not_failed(ray, capsys):
    task = types.SimpleNamespace(remote=lambda *args: args[0])
    assert clusters._tasks(Lost(ray), task, ["a", "b", "c"]) == [0, claims.STOPPED, claims.STOPPED]
    assert "The Ray cluster is lost: its node on this machine died" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ConnectionError("nobody there"), SystemExit(15)])
def test_who_answers_but_is_no_ray_cluster_is_named(error, ray, monkeypatch):
    def refuse(**options):
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"--ray_address {address}: no Ray cluster answers"):
            clusters.ray(["x"], ray_address=address)
