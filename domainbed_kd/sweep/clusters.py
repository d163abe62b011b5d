"""Launchers for clusters: `slurm` through submitit, and `ray`.

Both wait for the jobs and return their exit statuses, so teachers come before students. All
machines must share the sweep's folder; see docs/clusters.md. Jobs of a lost machine continue
elsewhere from their last checkpoints, and end in the same bits.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from domainbed_kd import console
from domainbed_kd.folder import claims
from domainbed_kd.folder.claims import STOPPED
from domainbed_kd.sweep import children, workers

# How long a job that continues elsewhere waits until the claim of its first process is stale.
WAIT = f" --wait {claims.STALE_S + 60}"
# How often ray starts a job again after its machine was lost.
MAX_LOST = 5
# How often submitit starts a job again after a time-out; the run continues where it was.
MAX_TIMEOUTS = 1000
POLL_S = 1
# How long the head of a Ray cluster may take to answer; Ray itself would wait two minutes.
CONNECT_S = 3
START_RAY = ("Start the cluster's head with `ray start --head`, or leave the flag out for a "
             "cluster on this machine.")


def add_flags(parser) -> None:
    """Adds the flags of both launchers."""
    slurm = parser.add_argument_group("launcher slurm", "see docs/clusters.md")
    slurm.add_argument("--slurm_partition", metavar="NAME", help="default: the cluster's own")
    slurm.add_argument("--slurm_gpus", type=int, metavar="N", help="GPUs of a job; default: 1")
    slurm.add_argument("--slurm_cpus", type=int, metavar="N", help="CPUs of a job; default: 4")
    slurm.add_argument("--slurm_time", type=int, metavar="MINUTES",
                       help="time limit of a job, which then saves its state and is queued again; "
                            "default: 1440")
    slurm.add_argument("--slurm_parallel", type=int, metavar="N",
                       help="jobs at a time; default: 256")
    slurm.add_argument("--slurm_extra", metavar="JSON",
                       help="further submitit parameters, such as "
                            "'{\"slurm_account\": \"me\"}'")
    slurm.add_argument("--slurm_logs", metavar="FOLDER",
                       help="where submitit keeps its files; default: slurm_logs")
    slurm.add_argument("--slurm_cluster", choices=["slurm", "local"],
                       help="local tries the launcher on this machine, without Slurm")
    ray = parser.add_argument_group("launcher ray", "see docs/clusters.md")
    ray.add_argument("--ray_address", metavar="ADDRESS",
                     help="address of a running cluster, or auto; default: a new one on this "
                          "machine")
    ray.add_argument("--ray_gpus", type=float, metavar="SHARE",
                     help="GPUs of a job, such as 0.5; default: 1 if there are any")
    ray.add_argument("--ray_cpus", type=float, metavar="N", help="CPUs of a job; default: 1")


def slurm(commands: list[str], *, slurm_partition: str | None = None, slurm_gpus: int = 1,
          slurm_cpus: int = 4, slurm_time: float = 1440, slurm_parallel: int = 256,
          slurm_extra: str | None = None, slurm_logs: str = "slurm_logs",
          slurm_cluster: str = "slurm") -> list[int]:
    """Runs the commands as a Slurm job array through submitit; returns exit statuses.

    Options are those of `add_flags`. Without commands it only checks them, and leaves no file.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("The launcher slurm needs submitit: pip install 'domainbed_kd[slurm]'."
                         ) from None
    for program in ("sbatch", "srun") if slurm_cluster == "slurm" else ():
        if not shutil.which(program):
            raise ValueError(f"The launcher slurm finds no {program} on this machine. Launch on a "
                             "node that submits jobs, or try it with --slurm_cluster local.")
    with tempfile.TemporaryDirectory() as nowhere:  # submitit makes its folder even for a check
        executor = submitit.AutoExecutor(
            slurm_logs if commands else nowhere, cluster=slurm_cluster,
            **{f"{slurm_cluster}_max_num_timeout": MAX_TIMEOUTS})
    parameters = {"name": "domainbed_kd", "timeout_min": slurm_time, "cpus_per_task": slurm_cpus,
                  "gpus_per_node": slurm_gpus, "slurm_array_parallelism": slurm_parallel}
    if slurm_partition:
        parameters["slurm_partition"] = slurm_partition
    try:
        executor.update_parameters(**parameters | parse_extra(slurm_extra))
    except (NameError, TypeError, AssertionError) as error:
        raise ValueError(f"--slurm_extra: {error}") from error
    if not commands:
        return []

    # Slurm limits how many run at a time; submitit's local executor starts all that it gets.
    size = len(commands) if slurm_cluster == "slurm" else slurm_parallel
    statuses = []
    for start in range(0, len(commands), size):
        statuses += _array(executor, commands[start:start + size], start, len(commands))
    return statuses


def parse_extra(extra: str | None) -> dict:
    """The submitit parameters in a JSON object; none for None."""
    return {} if extra is None else console.parse_object(
        "--slurm_extra", extra, '{"slurm_account": "me"}')


def _array(executor, commands: list[str], n_before: int, n_all: int) -> list[int]:
    """Submits an array of commands and waits for them."""
    import submitit

    with executor.batch():
        jobs = [executor.submit(Task(command)) for command in commands]
    pending, statuses = dict(enumerate(jobs)), [1] * len(jobs)
    with children.interruptible():
        try:
            while pending:
                time.sleep(POLL_S)
                for i, job in [(i, job) for i, job in pending.items() if job.done()]:
                    try:
                        statuses[i] = job.result()
                    except submitit.core.utils.UncompletedJobError:
                        print(f"Slurm ended job {job.job_id}; {job.paths.stderr} may say why.",
                              file=sys.stderr)
                    del pending[i]
                    n_done = n_before + len(jobs) - len(pending)
                    workers.report(workers.words(commands[i]), statuses[i], n_done, n_all)
        except BaseException:
            print(f"Cancelling {len(pending)} jobs.", file=sys.stderr)
            for job in pending.values():
                job.cancel(check=False)
            raise
    return statuses


class Task:
    """A command for submitit. At submitit's signal the run saves its state and is queued again."""

    def __init__(self, command: str):
        self.command = command

    def __call__(self) -> int:
        """Runs the command; returns its exit status.

        If somebody else stopped the run, the job is about to be preempted. The run is started
        again until both processes are killed: while this one lives, Slurm queues the job again.
        """
        status = STOPPED
        while status == STOPPED:
            self.process = subprocess.Popen(workers.words(self.command))
            try:
                while (status := self.process.poll()) is None:
                    time.sleep(0.1)
            except BaseException:  # cancelled
                self.process.terminate()
                raise
        return status

    def checkpoint(self):
        """Saves the run's state; submitit calls it before a time-out or a preemption."""
        from submitit.helpers import DelayedSubmission

        self.process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(ChildProcessError):  # it has just ended by itself
            # Not process.wait(): this runs in a signal's handler, which may have interrupted it.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Task(self.command.removesuffix(WAIT) + WAIT))


def ray(commands: list[str], *, ray_address: str | None = None, ray_gpus: float | None = None,
        ray_cpus: float = 1) -> list[int]:
    """Runs the commands as tasks of a Ray cluster; returns exit statuses.

    Options are those of `add_flags`. Without commands it only checks that the cluster is there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray as library
    except ImportError:
        raise ValueError("The launcher ray needs Ray: pip install 'domainbed_kd[ray]'.") from None
    if ray_address:
        _check_address(ray_address)
    if not commands:
        return []
    try:
        library.init(address=ray_address, include_dashboard=None if ray_address else False,
                     log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, SystemExit) as error:  # it exits if nobody answers
        raise ValueError(f"--ray_address {ray_address}: no Ray cluster answers there ({error}). "
                         f"{START_RAY}") from error
    try:
        there = library.cluster_resources()
        if ray_gpus is None:
            ray_gpus = min(there.get("GPU", 0), 1)
        for name, wanted in (("CPU", ray_cpus), ("GPU", ray_gpus)):
            if wanted > there.get(name, 0):
                raise ValueError(f"A job takes {wanted} {name}s, and the Ray cluster has "
                                 f"{there.get(name, 0):g}. Lower --ray_{name.lower()}s.")
        task = library.remote(num_cpus=ray_cpus, num_gpus=ray_gpus, max_retries=0)(_run_here)
        with children.interruptible():
            return _tasks(library, task, commands)
    finally:
        library.shutdown()


def _check_address(address: str) -> None:
    """Refuses an address that is malformed, or does not answer within CONNECT_S seconds."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"--ray_address {address} is not an address; it takes auto, or HOST:PORT "
                         "of the cluster's head, such as 10.0.0.1:6379.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--ray_address {address}: nobody answers there ({error}). {START_RAY}"
                         ) from None


def _run_here(command: str, folder: str, path: list[str]) -> int:
    """Runs a command in a Ray worker, with which it ends."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    return workers.local([command])[0]


def _tasks(library, task: Callable, commands: list[str]) -> list[int]:
    """Starts all tasks, starts them again if a machine is lost, and waits for them.

    If this process's own node is lost, tasks that have not ended count as stopped.
    """

    def start(command):
        return task.remote(command, os.getcwd(), sys.path)

    pending = {start(command): i for i, command in enumerate(commands)}
    statuses, n_lost, n_done = [STOPPED] * len(commands), [0] * len(commands), 0
    try:
        while pending:
            (ref,), _ = library.wait(list(pending), num_returns=1)
            i = pending.pop(ref)
            try:
                statuses[i] = library.get(ref)
            except library.exceptions.RayTaskError:
                raise
            except library.exceptions.LocalRayletDiedError:
                print("The Ray cluster is lost: its node on this machine died.", file=sys.stderr)
                return statuses
            except library.exceptions.RayError as error:
                n_lost[i] += 1
                if n_lost[i] <= MAX_LOST:
                    print(f"lost  {workers.label(commands[i])}  ({type(error).__name__}); it "
                          "continues elsewhere", file=sys.stderr)
                    pending[start(commands[i] + WAIT)] = i
                    continue
                statuses[i] = 1
            n_done += 1
            workers.report(workers.words(commands[i]), statuses[i], n_done, len(commands))
    except BaseException:
        for ref in pending:
            library.cancel(ref, force=True)
        raise
    return statuses
