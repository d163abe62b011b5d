"""Times a few updates and an evaluation of each method on this machine, alone and side by side."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from domainbed_kd import datasets, machine
from domainbed_kd.folder import files
from domainbed_kd.folder.args import words
from domainbed_kd.sweep import children
from domainbed_kd.sweep.jobs import Job

# How many updates are timed, after a first one.
N_STEPS = 20
# How many seconds of updates are timed where jobs share a device, and at most how many updates.
SHARED_S, MAX_STEPS = 10, 1000
# Runs `train` once for each list of flags, in one process.
_IN_TURN = """
import gc, json, runpy, sys
for flags in json.loads(sys.argv[1]):
    gc.collect()
    sys.argv[1:] = flags
    try:
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
""".replace("MODULE", repr(children.WARM_MODULE))


class Timing(NamedTuple):
    """Seconds for a process's own start, a run's start, an update and an evaluation.

    `once` includes starting CUDA and building an image cache; `start` includes the first update.
    """

    once: float
    start: float
    step: float
    evaluation: float

    def of_run(self, n_steps: int, checkpoint_freq: int) -> float:
        """Seconds of a run, which evaluates at its first step, its last, and some between."""
        n_evaluations = 1 + -(-(n_steps - 1) // checkpoint_freq)
        return self.start + n_steps * self.step + n_evaluations * self.evaluation


def of_job(timing: Timing, job: Job) -> float:
    """Seconds of a whole job, without `once`."""
    freq = (job.train_args.get("checkpoint_freq")
            or datasets.get_dataset_class(job.train_args["dataset"]).CHECKPOINT_FREQ)
    return timing.of_run(job.n_steps, freq)


def measure(some: Iterable[Job]) -> list[Timing | None]:
    """The timings of jobs, which are run in processes of their own and temporary folders.

    A student's teacher is trained for as many updates. The timing of a job that fails is None,
    and stderr says why.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(some):
            try:
                found.append(_timing(job, Path(folder, str(number))))
            except ValueError as error:
                print(f"{job.label} cannot be timed: {error}", file=sys.stderr)
                found.append(None)
    return found


def _timing(job: Job, folder: Path) -> Timing:
    flags = _taught(job, folder)
    one_step = {**flags, "steps": 1}
    first, short, long = _train(job, {
        folder / "first": one_step, folder / "short": one_step, folder / "long": flags})
    step = files.last_record(folder / "long")["step_time"]  # the mean of all but the first
    evaluation = max(0.0, long - short - N_STEPS * step)
    return Timing(max(0.0, first - short), max(0.0, short - evaluation - step), step, evaluation)


def slow_downs(job: Job, step: float, numbers: Iterable[int], threads: int | None = None
               ) -> dict[int, float]:
    """How many times as long a job's updates take if so many such jobs share a device.

    They do not start at the same moment, so jobs that always share are a little slower.
    A number whose jobs fail, as when memory runs out, is left out, and stderr says why.

    Args:
        job: whose updates are timed.
        step: roughly the seconds of an update.
        numbers: of jobs at a time.
        threads: of each job; by default an even share of the cores, as launchers give it.
    """
    n_steps = min(max(int(SHARED_S / max(step, 1e-6)), 3), MAX_STEPS)
    n, found = 1, {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            flags = {**_taught(job, Path(folder)), "steps": n_steps + 1, "checkpoint_freq": n_steps}
            for n in sorted({1, *numbers}):
                found[n] = _step_of_each(job, flags, Path(folder, f"at_once{n}"), n, threads)
        except ValueError as error:
            print(f"{n} at a time cannot be timed: {error}", file=sys.stderr)
    return {n: seconds / found[1] for n, seconds in found.items()}


def _step_of_each(job: Job, flags: dict, folder: Path, n: int, threads: int | None) -> float:
    """The mean seconds of an update of n jobs at a time."""
    if threads is None and n > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, machine.available() // n)
    folders = [folder / str(i) for i in range(n)]
    with ThreadPoolExecutor(n) as pool:
        list(pool.map(lambda own: _train(job, {own: flags}, threads), folders))
    return sum(files.last_record(own)["step_time"] for own in folders) / n


def _taught(job: Job, folder: Path) -> dict:
    """Trains a job's teachers, and theirs, in folders below; returns the flags that name them."""
    if not job.teachers:
        return {}
    folders = [folder / f"teacher{i}" for i in range(len(job.teachers))]
    for teacher, own in zip(job.teachers, folders):
        _train(teacher, {own: _taught(teacher, own)})
    return {"teacher": list(map(str, folders)), "allow_bad_teacher": True}


def _train(job: Job, runs: dict[Path, dict], threads: int | None = None) -> list[float]:
    """Runs a job in each folder with some flags changed, one run after another.

    Processes stay as a launcher's do: all runs are in one, unless plug-ins keep it from staying.

    Returns:
        The seconds of each run's updates and evaluations.

    Raises:
        ValueError: if one fails; the message is its last line.
    """
    flags = [[*words({**job.train_args, "steps": N_STEPS + 1, "checkpoint_freq": N_STEPS,
                      **changed, "output_dir": str(folder)}), *job.flags]
             for folder, changed in runs.items()]
    stays = not children.END_THEIR_PROCESS & set(job.flags)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    for each in [flags] if stays else [[one] for one in flags]:
        ran = subprocess.run([sys.executable, "-c", _IN_TURN, json.dumps(each)],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             errors="replace", env=environment)
        if ran.returncode != 0:
            raise ValueError((ran.stderr.strip().splitlines() or ["no message"])[-1])
    return [files.cost(folder)["seconds"] for folder in runs]
