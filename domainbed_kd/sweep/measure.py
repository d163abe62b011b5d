"""Times a few updates and an evaluation of each method on this machine."""

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from domainbed_kd import datasets
from domainbed_kd.folder import files
from domainbed_kd.folder.args import words
from domainbed_kd.sweep.jobs import Job

# How many updates are timed, after a first one.
N_STEPS = 20


class Timing(NamedTuple):
    """Seconds of a run's start (with its first update), of an update, and of an evaluation."""

    start: float
    step: float
    evaluation: float

    def of_run(self, n_steps: int, checkpoint_freq: int) -> float:
        """Seconds of a run, which evaluates at its first step, its last, and some between."""
        n_evaluations = 1 + -(-(n_steps - 1) // checkpoint_freq)
        return self.start + n_steps * self.step + n_evaluations * self.evaluation


def of_job(timing: Timing, job: Job) -> float:
    """Seconds of a whole job."""
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
    short = _train(job, folder / "short", {**flags, "steps": 1})
    long = _train(job, folder / "long", flags)
    step = files.last_record(folder / "long")["step_time"]  # the mean of all but the first
    evaluation = max(0.0, long - short - N_STEPS * step)
    return Timing(max(0.0, short - evaluation - step), step, evaluation)


def _taught(job: Job, folder: Path) -> dict:
    """Trains a job's teachers, and theirs, in folders below; returns the flags that name them."""
    if not job.teachers:
        return {}
    folders = [folder / f"teacher{i}" for i in range(len(job.teachers))]
    for teacher, own in zip(job.teachers, folders):
        _train(teacher, own, _taught(teacher, own))
    return {"teacher": list(map(str, folders)), "allow_bad_teacher": True}


def _train(job: Job, folder: Path, flags: dict) -> float:
    """Runs a job with some flags changed; the seconds of its updates and evaluations.

    Raises:
        ValueError: if it fails; the message is its last line.
    """
    args = {**job.train_args, "steps": N_STEPS + 1, "checkpoint_freq": N_STEPS, **flags,
            "output_dir": str(folder)}
    command = [sys.executable, "-m", "domainbed_kd.scripts.train", *words(args), *job.flags]
    ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                         errors="replace")
    if ran.returncode != 0:
        raise ValueError((ran.stderr.strip().splitlines() or ["no message"])[-1])
    return files.cost(folder)["seconds"]
