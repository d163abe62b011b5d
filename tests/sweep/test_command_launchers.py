import ast
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from domainbed_kd import machine
from domainbed_kd.command_launchers import dummy, get_launcher, local, multi_gpu
from domainbed_kd.sweep import children, workers

TRAIN = "python -m domainbed_kd.scripts.train"


def python(code, *args):
    return shlex.join(["python", "-c", code, *map(str, args)])


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_commands_run_in_order_one_at_a_time_and_their_statuses_are_returned(tmp_path):
    log = tmp_path / "log"
    code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[2]))"
    assert local([python(code, log, status) for status in (0, 3, 0, 1)]) == [0, 3, 0, 1]
    assert log.read_text() == "0301"


def test_children_of_a_warm_server_may_use_a_gpu():
    # CUDA cannot begin in a child whose parent has asked for a GPU, with or without one.
    code = """if True:
        import os
        import domainbed_kd.scripts._warm, torch
        child = os.fork()
        if child == 0:
            os._exit(int(torch.cuda._is_in_bad_fork()))
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_shell_reads_a_command(tmp_path):
    target = tmp_path / "a'; touch b; $(touch c) `touch d` * \"e\".txt"
    assert local([python("import sys; open(sys.argv[1], 'w')", target)]) == [0]
    assert os.listdir(tmp_path) == [target.name]


def test_python_is_the_one_that_runs_the_sweep(tmp_path):
    local([python(f"import sys; open({str(tmp_path / 'x')!r}, 'w').write(sys.executable)")])
    assert (tmp_path / "x").read_text() == sys.executable


def test_a_killed_job_harms_no_other_and_is_reported(capfd):
    suicide = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert local([suicide, python(""), suicide]) == [-9, 0, -9]
    assert capfd.readouterr().err.count("killed by SIGKILL") == 2


def test_a_program_that_is_not_there_is_a_failed_job(tmp_path):
    assert local([str(tmp_path / "nothing"), python("")]) == [127, 0]


def test_jobs_at_a_time_are_as_many_as_asked_for(tmp_path):
    # Each job waits until it has seen another at work, so one at a time would time out.
    code = ("import os, sys, time; d, me = sys.argv[1:]; open(d + '/' + me, 'w')\n"
            "for _ in range(2000):\n"
            "    if len(os.listdir(d)) > 1: sys.exit(0)\n"
            "    time.sleep(0.01)\n"
            "sys.exit(9)")
    assert local([python(code, tmp_path, i) for i in range(2)], jobs_per_device=2) == [0, 0]


def test_with_several_at_a_time_each_job_gets_one_line_and_its_last_error(capfd):
    commands = [python("print('chatter')"),
                python("import sys; sys.exit('line one\\nno such thing')")]
    assert local(commands, jobs_per_device=2) == [0, 1]
    out, err = capfd.readouterr()
    assert "chatter" not in out
    lines = sorted(line.split("] ")[1].split("  ")[0] + line[:4] for line in err.splitlines())
    assert [line[:-4] for line in lines] == ["done", "failed"]
    assert {line[-4:] for line in lines} == {"[1/2", "[2/2"}
    assert re.search(r"failed .*\(\d+ s\)  exit status 1: no such thing\n", err)
    assert "line one" not in err.replace(shlex.quote(shlex.split(commands[1])[2]), "")


def test_threads_are_shared_out_evenly_unless_given(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "available", lambda: 9)
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ.get('OMP_NUM_THREADS', '-'))"

    def threads(n, **options):
        local([python(code, tmp_path / str(i)) for i in range(n)], **options)
        return {(tmp_path / str(i)).read_text() for i in range(n)}

    assert threads(2, jobs_per_device=2) == {"4"}
    assert threads(2, jobs_per_device=2, threads_per_job=3) == {"3"}
    assert threads(1, jobs_per_device=2) == {"-"}  # one job has torch's own default
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(2, jobs_per_device=2) == {"5"}


def test_multi_gpu_gives_each_job_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "n_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7,")
    # As in the test above: a job ends when it has seen one on the other GPU.
    code = ("import os, sys, time; d = sys.argv[1]\n"
            "open(os.path.join(d, os.environ['CUDA_VISIBLE_DEVICES']), 'w')\n"
            "for _ in range(2000):\n"
            "    if len(os.listdir(d)) == 2: sys.exit(0)\n"
            "    time.sleep(0.01)\n"
            "sys.exit(9)")
    commands = [python(code, tmp_path)] * 3
    assert multi_gpu(commands) == [0, 0, 0]
    assert sorted(os.listdir(tmp_path)) == ["4", "7"]
    assert len(commands) == 3  # the caller's list is the caller's


def test_multi_gpu_packs_several_jobs_on_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "n_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = []
    monkeypatch.setattr(workers, "_run_all",
                        lambda commands, slots, threads: seen.extend(slots))
    multi_gpu(["x"] * 9, jobs_per_device=2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in seen] == ["0", "1", "0", "1"]


def test_multi_gpu_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(machine, "n_gpus", lambda: 0)
    with pytest.raises(ValueError, match="sees no GPU.*--command_launcher local"):
        multi_gpu(["x"])


def test_no_jobs_at_a_time_is_refused():
    with pytest.raises(ValueError, match="from 1 up"):
        local(["x"], jobs_per_device=0)


def test_no_commands_take_no_time():
    assert local([]) == []


def test_dummy_prints_the_commands(capsys):
    dummy(["python -m x", "python 'y z'"])
    assert capsys.readouterr().out == "Dummy launcher: python -m x\nDummy launcher: python 'y z'\n"


def test_launchers_are_found_by_name_and_by_module():
    assert get_launcher("local") is local
    assert get_launcher("os:listdir") is os.listdir


@pytest.mark.parametrize("name, message", [
    ("locl", "Did you mean local"), ("os:nothing", "nothing"), ("no.module:f", "no"),
    ("os:sep", "not a function"), ("slrm", "Did you mean slurm"),
    ("pbs", "Known: local, dummy, multi_gpu, slurm, ray")])
def test_an_unknown_launcher_is_named(name, message):
    with pytest.raises(NotImplementedError, match=f"Launcher not found: {name}.*{message}"):
        get_launcher(name)


PARENT = """
import sys
from domainbed_kd import command_launchers, console
console.run_main(lambda: command_launchers.local(sys.argv[1:], jobs_per_device=2))
"""


@pytest.mark.parametrize("number, to_group", [
    (signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False),
    (signal.SIGHUP, False)])
def test_an_interrupted_sweep_leaves_no_process(number, to_group, tmp_path):
    # A job that has started a process of its own, as loaders do.
    code = ("import os, subprocess, sys, time\n"
            "child = subprocess.Popen(['sleep', '100'])\n"
            "open(f'{sys.argv[1]}/{os.getpid()} {child.pid}', 'w')\n"
            "time.sleep(100)")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *[python(code, tmp_path)] * 3],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(os.listdir(tmp_path)) == 2)
    (os.killpg if to_group else os.kill)(parent.pid, number)
    _, err = parent.communicate(timeout=20)
    assert parent.returncode == 130
    assert "Stopping 2 jobs" in err and err.endswith("Interrupted.\n")
    assert "Traceback" not in err
    assert len(os.listdir(tmp_path)) == 2  # the third never began
    pids = [int(pid) for name in os.listdir(tmp_path) for pid in name.split()]
    wait_for(lambda: not any(map(alive, pids)), seconds=5)


def test_a_label_says_what_is_trained():
    command = (f"{TRAIN} --algorithm RISE --dataset PACS --hparams '{{\"lr\": 1}}' "
               "--hparams_seed 3 --test_envs 0 2 --trial_seed 1")
    label = workers.label(command)
    assert label == "RISE PACS test env 0 2, trial 1, hparams 3"


@pytest.mark.slow
def test_a_run_finds_all_that_it_imports_in_the_warm_server(tmp_path):
    code = f"""
import sys
import domainbed_kd.scripts._warm, domainbed_kd.scripts.train
known = set(sys.modules)
domainbed_kd.scripts.train.main(["--dataset", "Debug28", "--steps", "1", "--hparams",
                                 '{{"batch_size": 4}}', "--output_dir", {str(tmp_path)!r}])
print([name for name in sys.modules if name not in known], file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new = ast.literal_eval(done.stderr.splitlines()[-1])
    heavy = [name for name in new if name.startswith(("domainbed_kd", "torch", "tensorboard"))]
    assert all(name.startswith("torch.utils.serialization") for name in heavy)  # torch.save's


STRUCK = """if True:
    import os, signal, sys, threading, time
    from domainbed_kd.sweep import workers

    def helpers():
        # What multiprocessing runs beside this process: a fork server and a resource tracker.
        return [int(pid) for pid in
                open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
                if sys.argv[3].encode() in open(f"/proc/{pid}/cmdline", "rb").read()]

    def strike():
        folder, n = sys.argv[1], int(sys.argv[2])
        while len(os.listdir(folder)) < n:
            time.sleep(0.01)
        for pid in helpers():
            os.kill(pid, signal.SIGKILL)
            print("killed", file=sys.stderr)

    threading.Thread(target=strike, daemon=True).start()
    print(workers.local(sys.argv[4:], jobs_per_device=2))"""


def struck(helper, folder, n, commands):
    """A launcher whose helper is killed once n files are in the folder."""
    return subprocess.run([sys.executable, "-c", STRUCK, str(folder), str(n), helper, *commands],
                          capture_output=True, text=True, timeout=60)


def test_a_sweep_goes_on_when_its_fork_server_is_killed_and_no_two_of_a_job_overlap(tmp_path):
    # Each job notes when it begins and ends, and takes a lock that a second one would miss.
    code = ("import fcntl, os, sys, time; folder, me = sys.argv[1:]\n"
            "lock = open(f'{folder}/../lock{me}', 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
            "first = not os.path.exists(f'{folder}/{me}')\n"
            "n = len([f for f in os.listdir(folder + '/../at_work')])\n"
            "open(f'{folder}/../at_work/{os.getpid()}', 'w').close()\n"
            "if n > 1: open(f'{folder}/../overlap', 'w').write(str(n))\n"
            "import signal\n"
            "def stop(*_):\n"
            "    os.unlink(f'{folder}/../at_work/{os.getpid()}'); os._exit(143)\n"
            "signal.signal(signal.SIGTERM, stop)\n"
            "open(f'{folder}/../log{me}', 'a').write('x')\n"
            "open(f'{folder}/{me}', 'w').close()\n"
            "time.sleep(100 if first else 0.2)\n"
            "os.unlink(f'{folder}/../at_work/{os.getpid()}')")
    begun = tmp_path / "begun"
    begun.mkdir()
    (tmp_path / "at_work").mkdir()
    ran = struck("forkserver", begun, 2, [python(code, begun, i) for i in range(2)])
    assert ran.stdout == "[0, 0]\n", ran
    assert "Traceback" not in ran.stderr
    assert ran.stderr.count("The server that starts jobs died. Its 2 jobs are interrupted") == 1
    assert [(tmp_path / f"log{i}").read_text() for i in range(2)] == ["xx", "xx"]
    assert not (tmp_path / "overlap").exists() and os.listdir(tmp_path / "at_work") == []


def test_a_sweep_does_not_notice_that_its_resource_tracker_is_killed(tmp_path):
    code = "import sys, time; open(sys.argv[1], 'w'); time.sleep(0.5)"
    ran = struck("resource_tracker", tmp_path, 2,
                 [python(code, tmp_path / str(i)) for i in range(5)])
    assert ran.stdout == "[0, 0, 0, 0, 0]\n" and len(os.listdir(tmp_path)) == 5
    assert ran.stderr.count("killed\n") == 1 and "Traceback" not in ran.stderr


def test_a_server_that_dies_while_it_is_asked_for_a_job_is_replaced(tmp_path, monkeypatch):
    context = multiprocessing.get_context("forkserver")
    start, killed = context.Process.start, []

    def start_while_it_dies(process):
        if not killed:
            killed.append(multiprocessing.forkserver._forkserver._forkserver_pid)
            os.kill(killed[0], signal.SIGSTOP)  # it takes the request, and dies before it answers
            threading.Timer(0.5, os.kill, (killed[0], signal.SIGKILL)).start()
        start(process)

    monkeypatch.setattr(context.Process, "start", start_while_it_dies)
    assert local([python(f"open({str(tmp_path / 'x')!r}, 'w')")]) == [0]
    assert killed and (tmp_path / "x").exists()


def test_what_another_process_trains_is_left_and_not_said_to_have_failed(capfd):
    assert local([python("import sys; sys.exit(75)")]) == [75]
    said = capfd.readouterr().err
    assert "another process trains it" in said and "failed" not in said


def test_a_job_that_exits_with_255_has_failed_and_is_not_started_again(tmp_path):
    code = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(255)"
    assert local([python(code, tmp_path / "log")]) == [255]
    assert (tmp_path / "log").read_text() == "x"


# As where jobs have begun with a GPU, each with a process that takes job after job.
STAYING = """
import json, multiprocessing, sys
import torch
from domainbed_kd.scripts import _warm
from domainbed_kd.sweep import children, workers
torch.set_num_threads(1)
n_started, start = [], children.start
children.has_begun_with_gpu = lambda: True
children.context = lambda is_warm: multiprocessing.get_context("fork")
children.start = lambda *args: (n_started.append(1), start(*args))[1]
commands, at_once = json.loads(sys.argv[1])
statuses = workers.local(commands, jobs_per_device=at_once, threads_per_job=1)
print(json.dumps([statuses, len(n_started)]))
"""


def staying(commands, at_once):
    """(statuses, number of processes)"""
    done = subprocess.run([sys.executable, "-c", STAYING, json.dumps([commands, at_once])],
                          capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.strip().splitlines()[-1])


def digits(folder, seed, *more):
    return shlex.join([*TRAIN.split(), "--dataset", "Debug28", "--steps", "3", "--seed", str(seed),
                       "--checkpoint_freq", "1", "--skip_model_save", "--hparams",
                       '{"batch_size": 4}', "--output_dir", str(folder / str(seed)), *more])


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "results.jsonl").open()]


def test_a_process_that_has_begun_with_a_gpu_takes_jobs_that_train_to_the_same_bits(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    assert local([digits(one, seed) for seed in range(5)], threads_per_job=1) == [0] * 5
    statuses, n_processes = staying([digits(many, seed) for seed in range(5)], at_once=2)
    assert statuses == [0] * 5 and n_processes == 2
    for seed in range(5):
        assert losses(many / str(seed)) == losses(one / str(seed))
        assert (many / str(seed) / "err.txt").exists()


@pytest.mark.slow
def test_no_process_stays_after_a_job_that_failed_or_had_a_plugin(tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("from domainbed_kd.algorithms.erm import ERM\nclass Mine(ERM): pass\n")
    commands = [digits(tmp_path, 0), digits(tmp_path, 1, "--algorithm", "None"),
                digits(tmp_path, 2, "--plugin", str(plugin)), digits(tmp_path, 3),
                python("pass"), digits(tmp_path, 4)]
    statuses, n_processes = staying(commands, at_once=1)
    assert statuses == [0, 2, 0, 0, 0, 0]
    assert n_processes == 5  # only the second job found one that stayed


def test_processes_that_wait_are_all_told_to_end_before_one_is_waited_for():
    class Leaving:
        """A worker that ends only when both have been told to."""

        def join(self):
            assert all(there.poll() and there.recv() == (None, None) for there in others)
            others.clear()

    pairs = [multiprocessing.Pipe() for _ in range(2)]
    others = [there for _, there in pairs]
    children.dismiss(*((Leaving(), here) for here, _ in pairs))
    assert not others
