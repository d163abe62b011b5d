"""The launchers that run jobs on this machine, and how a sweep's command lines are read.

`local` and `multi_gpu` run `train` in warm workers: a fork server imports torch once and forks a
child per job, so jobs start at once and a crash harms no other. No shell reads the commands.
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
from typing import NamedTuple

from domainbed_kd import console, machine
from domainbed_kd.folder import args, claims, files
from domainbed_kd.sweep import children


def local(commands: list[str], *, jobs_per_device: int = 1,
          threads_per_job: int | None = None) -> list[int]:
    """Runs the commands on this machine, `jobs_per_device` at a time; returns exit statuses.

    With several at a time, their output stays in out.txt and err.txt of each job's folder. A job
    gets `threads_per_job` threads, or an even share of the cores; one job at a time has torch's
    own default.
    """
    return _run_all(commands, [{}] * jobs_per_device, threads_per_job)


def multi_gpu(commands: list[str], *, jobs_per_device: int = 1,
              threads_per_job: int | None = None) -> list[int]:
    """Runs `jobs_per_device` commands at a time on each visible GPU; returns exit statuses."""
    children.context(is_warm=True)
    children.start_server()  # it imports torch while another process asks for GPUs
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
    """A job at work: its number, process, slot, start (s) and, if kept apart, its stderr.

    The process is reached by `jobs`, see `children.start`. A slot is its number, from 1, and its
    environment variables.
    """

    index: int
    process: multiprocessing.Process
    jobs: multiprocessing.connection.Connection
    slot: tuple[int, dict]
    start: float
    errors: object


def _run_all(commands: list[str], slots: list[dict], threads: int | None) -> list[int]:
    """Runs each command in the next free slot, a set of environment variables.

    Returns the exit statuses; a negative one is the signal that killed the command.
    """
    if not slots:
        raise ValueError("jobs_per_device takes a number from 1 up.")
    if not commands:
        return []
    slots = slots[:len(commands)]
    argvs = [words(command) for command in commands]
    quiet = len(slots) > 1
    if threads is None and quiet and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, machine.available() // len(slots))
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}

    waiting = deque(enumerate(argvs))
    # Slots, with the process and connection of a worker that waits for a job.
    free = deque((slot, None) for slot in enumerate(slots, 1))
    running: dict[int, _Running] = {}
    lines = {}  # {sentinel: JobLine}
    statuses, n_lost = [0] * len(argvs), Counter()
    context = children.context(any(map(children.is_warm, argvs)))
    sys.stdout.flush()
    with children.interruptible(), contextlib.ExitStack() as at_end, (
            console.bar(total=len(argvs), unit="job") if quiet
            else contextlib.nullcontext()) as bar:
        at_end.callback(lambda: children.stop([job.process for job in running.values()]))
        at_end.callback(lambda: [children.dismiss(worker) for _, worker in free if worker])
        while waiting or running:
            while waiting and free:
                index, argv = waiting.popleft()
                slot, worker = free.popleft()
                errors = tempfile.NamedTemporaryFile() if quiet else None
                path = errors.name if errors else None
                worker = children.employ(worker, argv, path) or children.start(
                    context, argv, {**os.environ, **variables, **slot[1]}, threads, path)
                running[worker[0].sentinel] = _Running(
                    index, *worker, slot, time.monotonic(), errors)
                if quiet and sys.stderr.isatty() and children.is_warm(argv):
                    lines[worker[0].sentinel] = JobLine(
                        args.of_words(argv[3:]), position=slot[0])
            # Lines are updated every second.
            connections = [job.jobs for job in running.values()
                           if children.is_warm(argvs[job.index])]
            ready = multiprocessing.connection.wait(
                [*running, *connections], 1 if lines else None)
            ended = [sentinel for sentinel in running if sentinel in ready]
            staying = [sentinel for sentinel, job in running.items() if sentinel not in ended
                       and job.jobs in ready and children.would_take_another(job.jobs)]
            for line in lines.values():
                line.refresh()
            orphans = any(children.is_orphan(running[sentinel].process) for sentinel in ended)
            if orphans:  # then all are
                ended, staying = list(running), []
                children.stop_orphans([job.process for job in running.values()])
            for sentinel in ended + staying:
                job = running.pop(sentinel)
                if sentinel in lines:
                    lines.pop(sentinel).close()
                worker = (job.process, job.jobs)
                free.appendleft((job.slot, worker if sentinel in staying
                                 else children.dismiss(worker)))
                statuses[job.index] = 0 if sentinel in staying else job.process.exitcode
                if orphans and job.process.exitcode == children.UNKNOWN:
                    n_lost[job.index] += 1
                    statuses[job.index] = claims.STOPPED
                    if n_lost[job.index] <= children.MAX_LOST:
                        waiting.appendleft((job.index, argvs[job.index]))
                        continue
                if bar is not None:
                    bar.update()
                done = len(argvs) - len(waiting) - len(running)
                errors = ""
                if job.errors:
                    errors = job.errors.read().decode(errors="replace")
                    job.errors.close()
                last_line = errors.strip().rpartition("\n")[2].strip()
                outcome = _outcome(argvs[job.index], statuses[job.index],
                                   f"({time.monotonic() - job.start:.0f} s)", last_line)
                with console.lifted():
                    print(f"[{done}/{len(argvs)}] {outcome}", file=sys.stderr)
    return statuses


def words(command: str) -> list[str]:
    """A command's words, with this interpreter for `python`."""
    argv = shlex.split(command)
    return [sys.executable if argv[0] == "python" else argv[0], *argv[1:]]


def _outcome(argv: list[str], status: int, took: str = "", error: str = "") -> str:
    """How a job ended, in a line; `error` is the last line of its stderr."""
    what = "  ".join(filter(None, [_label_of(argv), took]))
    if status == 0:
        return f"done  {what}"
    if status == claims.BUSY:
        return f"left  {what}  another process trains it"
    why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"failed  {what}  {': '.join(filter(None, [why, error]))}"


def report(command: str, status: int, n_done: int, n_all: int) -> None:
    """Says on stderr how a job ended that ran elsewhere."""
    print(f"[{n_done}/{n_all}] {_outcome(words(command), status)}", file=sys.stderr)


def label(command: str) -> str:
    """The label of a train command's run; any other command as it is."""
    return _label_of(words(command))


def _label_of(argv: list[str]) -> str:
    return args.label(args.of_words(argv[3:])) if children.is_warm(argv) else shlex.join(argv)


class JobLine:
    """A line about a run in another process: its steps, their rate and the time left.

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
        """Takes the line away."""
        self.bar.close()


def n_steps(run: Mapping) -> int | None:
    """How many updates a run makes, by its args; None if its dataset is not known here."""
    from domainbed_kd import datasets

    name = run["dataset"]
    known = name in datasets.DATASETS or name.partition(":")[0] in datasets.OWN
    return run["steps"] or (datasets.get_dataset_class(name).N_STEPS if known else None)
