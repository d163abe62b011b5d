"""The launchers that run jobs on this machine, and how a sweep's command lines are read.

`local` and `multi_gpu` run `train` in warm workers: a fork server imports torch once and forks a
child for each job, so jobs start at once and a crash harms no other. Commands are run without a
shell.
"""

import contextlib
import importlib.metadata
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

from domainbed_kd import console, machine
from domainbed_kd.folder import args, claims, files
from domainbed_kd.sweep import children


def local(commands: list[str], *, jobs_per_device: int = 1,
          threads_per_job: int | None = None) -> list[int]:
    """Runs the commands on this machine, `jobs_per_device` at a time; returns exit statuses.

    With several at a time, their output is only in out.txt and err.txt of each job's folder. A job
    gets `threads_per_job` threads, or else an even share of the cores; jobs that run one at a time
    have torch's own default.
    """
    return _run_all(commands, [{}] * jobs_per_device, threads_per_job)


def multi_gpu(commands: list[str], *, jobs_per_device: int = 1,
              threads_per_job: int | None = None) -> list[int]:
    """Runs `jobs_per_device` commands at a time on each visible GPU; returns exit statuses."""
    children.context(is_warm=True)
    children.start_server()  # it imports torch while another process looks for GPUs
    slots = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in _visible_gpus()] * jobs_per_device
    return _run_all(commands, slots, threads_per_job)


def _visible_gpus() -> list[str]:
    if found := machine.gpus():
        return found
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    raise ValueError(
        f"multi_gpu: torch {importlib.metadata.version('torch')} sees no GPU "
        f"(CUDA_VISIBLE_DEVICES is {'not set' if chosen is None else repr(chosen)}). Use "
        "--command_launcher local.")


def dummy(commands: list[str], *, jobs_per_device: int = 1,
          threads_per_job: int | None = None) -> None:
    """Prints the commands and runs nothing, whatever the options."""
    for command in commands:
        print(f"Dummy launcher: {command}")


class _Running(NamedTuple):
    """A job at work."""

    index: int
    process: multiprocessing.Process
    #: Reaches the process; see `children.start`.
    jobs: multiprocessing.connection.Connection
    #: Its number, from 1, and its environment variables.
    slot: tuple[int, dict]
    start: float
    #: The file of its stderr, if that is kept apart.
    errors: BinaryIO | None
    #: Its progress on a terminal.
    line: "JobLine | None"


def _run_all(commands: list[str], slots: list[dict], threads: int | None) -> list[int]:
    """Runs each command in the next free slot, a set of environment variables.

    Returns the exit statuses; a negative one is the signal that killed the command.
    """
    if not slots:
        raise ValueError("jobs_per_device takes a number from 1 up.")
    if not commands:
        return []
    return _Pool([words(command) for command in commands], slots[:len(commands)], threads).run()


class _Pool:
    """Commands and the slots in which they run."""

    def __init__(self, argvs: list[list[str]], slots: list[dict], threads: int | None):
        self.argvs = argvs
        self.quiet = len(slots) > 1
        if threads is None and self.quiet and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, machine.available() // len(slots))
        self.threads = threads
        self.context = children.context(any(map(children.is_warm, argvs)))
        self.waiting = deque(range(len(argvs)))
        # Slots, with the process and connection of a worker that waits for a job.
        self.free = deque((slot, None) for slot in enumerate(slots, 1))
        self.running: dict[int, _Running] = {}  # by the sentinel of its process
        self.statuses, self.n_lost = [0] * len(argvs), Counter()

    def run(self) -> list[int]:
        """Runs all; if it is interrupted, jobs save their state and end."""
        sys.stdout.flush()
        with children.interruptible(), contextlib.ExitStack() as at_end:
            self.bar = at_end.enter_context(console.bar(total=len(self.argvs), unit="job")
                                            if self.quiet else contextlib.nullcontext())
            at_end.callback(lambda: children.stop([job.process for job in self.running.values()]))
            at_end.callback(lambda: children.dismiss(
                *(worker for _, worker in self.free if worker)))
            while self.waiting or self.running:
                while self.waiting and self.free:
                    self._start(self.waiting.popleft(), *self.free.popleft())
                ended, staying = self._wait()
                are_lost = any(children.is_orphan(job.process) for job in ended)
                if are_lost:  # then all are
                    ended, staying = list(self.running.values()), []
                    children.stop_orphans([job.process for job in ended])
                for job in ended:
                    self._settle(job, are_lost)
                for job in staying:
                    self._settle(job, stays=True)
        return self.statuses

    def _start(self, index: int, slot: tuple[int, dict], worker: tuple | None) -> None:
        """Gives a job to the worker of a free slot, or to a new process."""
        argv = self.argvs[index]
        errors = tempfile.NamedTemporaryFile() if self.quiet else None
        path = errors and errors.name
        line = None
        if self.quiet and sys.stderr.isatty() and children.is_warm(argv):
            line = JobLine(args.of_words(argv[3:]), position=slot[0])
        variables = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        process, jobs = children.employ(worker, argv, path) or children.start(
            self.context, argv, {**os.environ, **variables, **slot[1]}, self.threads, path)
        self.running[process.sentinel] = _Running(
            index, process, jobs, slot, time.monotonic(), errors, line)

    def _wait(self) -> tuple[list[_Running], list[_Running]]:
        """Waits for jobs to end; those whose process ended, and those whose process stays."""
        connections = [job.jobs for job in self.running.values()
                       if children.is_warm(self.argvs[job.index])]
        lines = [job.line for job in self.running.values() if job.line]
        ready = multiprocessing.connection.wait(
            [*self.running, *connections], 1 if lines else None)  # lines change every second
        for line in lines:
            line.refresh()
        ended = [job for sentinel, job in self.running.items() if sentinel in ready]
        staying = [job for job in self.running.values() if job not in ended
                   and job.jobs in ready and children.would_take_another(job.jobs)]
        return ended, staying

    def _settle(self, job: _Running, is_lost: bool = False, stays: bool = False) -> None:
        """Frees a job's slot, and reports its end or, if its server died, has it run again."""
        self.running.pop(job.process.sentinel)
        if job.line:
            job.line.close()
        worker = (job.process, job.jobs)
        self.free.appendleft((job.slot, worker if stays else children.dismiss(worker)))
        status = 0 if stays else job.process.exitcode
        if is_lost and status == children.UNKNOWN:
            status = claims.STOPPED
            self.n_lost[job.index] += 1
            if self.n_lost[job.index] <= children.MAX_LOST:
                self.waiting.appendleft(job.index)
                return
        self.statuses[job.index] = status
        if self.bar is not None:
            self.bar.update()
        n_done = len(self.argvs) - len(self.waiting) - len(self.running)
        last_line = ""
        if job.errors:
            with job.errors:
                last_line = job.errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        report(self.argvs[job.index], status, n_done, len(self.argvs),
               f"({time.monotonic() - job.start:.0f} s)", last_line.strip())


def words(command: str) -> list[str]:
    """A command's words, with this interpreter for `python`."""
    argv = shlex.split(command)
    return [sys.executable if argv[0] == "python" else argv[0], *argv[1:]]


def report(argv: list[str], status: int, n_done: int, n_all: int, took: str = "", error: str = ""
           ) -> None:
    """Prints on stderr how a job ended; `error` is the last line of its own stderr."""
    what = "  ".join(filter(None, [_label_of(argv), took]))
    if status == 0:
        outcome = f"done  {what}"
    elif status == claims.BUSY:
        outcome = f"left  {what}  another process trains it"
    else:
        why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        outcome = f"failed  {what}  {': '.join(filter(None, [why, error]))}"
    with console.lifted():
        print(f"[{n_done}/{n_all}] {outcome}", file=sys.stderr)


def label(command: str) -> str:
    """The label of a train command's run; any other command as it is."""
    return _label_of(words(command))


def _label_of(argv: list[str]) -> str:
    return args.label(args.of_words(argv[3:])) if children.is_warm(argv) else shlex.join(argv)


class JobLine:
    """A line on a run in another process: its steps, their rate and the time left.

    Args:
        run: its args.
        position: of the line, below the bar at 0.
    """

    def __init__(self, run: Mapping, position: int):
        self.folder = run["output_dir"]
        self.bar = console.bar(desc=args.label(run), total=n_steps(run), unit="step",
                               initial=files.steps_done(self.folder), position=position,
                               leave=False)

    def refresh(self) -> None:
        """Shows how far the run is, by its last evaluation."""
        self.bar.update(files.steps_done(self.folder) - self.bar.n)
        self.bar.refresh()

    def close(self) -> None:
        """Removes the line."""
        self.bar.close()


def n_steps(run: Mapping) -> int | None:
    """How many updates a run with these args makes; None if its dataset is not known here."""
    from domainbed_kd import datasets

    name = run["dataset"]
    known = name in datasets.DATASETS or name.partition(":")[0] in datasets.OWN
    return run["steps"] or (datasets.get_dataset_class(name).N_STEPS if known else None)
