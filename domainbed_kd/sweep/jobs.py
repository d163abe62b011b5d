"""A sweep as a list of jobs: what each trains, in which folder, and its state.

Folder names are DomainBed's (scripts/sweep.py at b93c22a), so a sweep begun there can be finished
here. A folder's name depends on `data_dir`, but a run's identity does not: a run made from data in
another place is found by the arguments in its results.jsonl.
"""

import argparse
import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable

from domainbed_kd import datasets
from domainbed_kd.folder import claims, files
from domainbed_kd.folder.args import identity, label, off_record, words
from domainbed_kd.folder.claims import BUSY, STOPPED
from domainbed_kd.sweep.listing import count_epochs, list_args, teachers_args

_encode = json.JSONEncoder(sort_keys=True).encode


def key_of(args: dict) -> tuple:
    """A run's identity as a key; its teacher is left out, as the sweep knows it."""
    return tuple(identity({**args, "teacher": None}).values())


class Runs:
    """The runs in a sweep's folder, found by folder name or else by what they train."""

    def __init__(self, sweep_output_dir: str):
        self.folder = sweep_output_dir
        self.names = set(os.listdir(sweep_output_dir)) if os.path.isdir(sweep_output_dir) else set()

    def find(self, name: str, train_args: dict) -> str | None:
        """The name if there is such a folder, else that of a folder with the same run, or None."""
        if name in self.names:
            return name
        return self._by_identity.get(key_of(train_args)) if self.names else None

    @functools.cached_property
    def _by_identity(self) -> dict[tuple, str]:
        """{what is trained: folder name}; finished runs come first, then those that have begun."""
        found, best = {}, {}
        for name in sorted(self.names):
            path = os.path.join(self.folder, name)
            rank = 3 if files.is_done(path) else 2
            try:
                args = files.first_args(path)
            except OSError:
                continue
            if args is None and not os.path.exists(os.path.join(path, files.RESULTS)):
                args, rank = files.planned_args(path), 1
            if args and rank > best.get(key := key_of(args), 0):
                found[key], best[key] = name, rank
        return found


def plan(launches: list[argparse.Namespace]) -> list["Job"]:
    """The jobs of a sweep's launches, after the teachers that none of the launches lists.

    If several launches list a run, the flags of the last one count.
    """
    folder, listed = launches[-1].output_dir, {}
    for args in reversed(launches):
        for train_args in list_args(args):
            listed.setdefault(key_of(train_args), (train_args, args))
    runs, added = Runs(folder), {}
    flags = {id(args): off_record(args) for args in launches}
    made = {key: Job(train_args, folder, runs, flags=flags[id(args)])
            for key, (train_args, args) in listed.items()}

    def taught(job: Job, train_args: dict, args: argparse.Namespace) -> None:
        """Gives a job its teachers, and them theirs. Teachers are added before their students."""
        for of_teacher in teachers_args(train_args):
            if args.epochs and of_teacher["steps"] == train_args["steps"]:
                if not args.checkpoint_freq:  # then an evaluation after each epoch
                    del of_teacher["checkpoint_freq"]
                count_epochs(of_teacher, args.epochs)  # its domains or batches may differ
            if args.skip_model_save:
                raise ValueError(f"--skip_model_save: {train_args['algorithm']} learns from the "
                                 f"model of a run of {of_teacher['algorithm']}. Leave the flag "
                                 "out.")
            key = key_of(of_teacher)
            teacher = made.get(key) or added.get(key)
            if teacher is None:
                teacher = Job(of_teacher, folder, runs, flags=flags[id(args)])
                taught(teacher, of_teacher, args)
                added[key] = teacher
            job.teachers.append(teacher)

    for key, (train_args, args) in listed.items():
        taught(made[key], train_args, args)
    return [*added.values(), *made.values()]


class Job:
    """A run of a sweep.

    Its folder is `<sweep_output_dir>/<md5 of the sorted JSON of train_args>`, as DomainBed's, or
    that of a run that differs only in `data_dir`. `state` is looked up once, at construction;
    `teachers` are the jobs that must be done first.

    Args:
        train_args: an entry of `listing.make_args_list`.
        sweep_output_dir: the sweep's folder.
        runs: what that folder holds; share one among many jobs.
        flags: words of train's command line that do not go on record. Neither these nor the
            teachers are part of the folder's name.
    """

    NOT_LAUNCHED = "Not launched"  # perhaps in a launcher's queue
    RUNNING = "Running"
    INTERRUPTED = "Interrupted"
    FAILED = "Failed"
    DONE = "Done"
    STATES = (DONE, RUNNING, INTERRUPTED, FAILED, NOT_LAUNCHED)

    def __init__(self, train_args: dict, sweep_output_dir: str, runs: Runs | None = None,
                 flags: list[str] | tuple = ()):
        name = hashlib.md5(_encode(train_args).encode()).hexdigest()
        found = (runs or Runs(sweep_output_dir)).find(name, train_args)
        self.output_dir = os.path.join(sweep_output_dir, found or name)
        self.train_args = {**train_args, "output_dir": self.output_dir}
        self.teachers: list[Job] = []
        self.flags = flags
        self.exit_status = 0
        self.has_folder = found is not None
        self.state = self.state_now() if self.has_folder else self.NOT_LAUNCHED

    @property
    def command_str(self) -> str:
        """The command line that trains it."""
        args = dict(sorted(self.train_args.items()))
        if self.teachers:
            args["teacher"] = [teacher.output_dir for teacher in self.teachers]
        return shlex.join(["python", "-m", "domainbed_kd.scripts.train", *words(args), *self.flags])

    def __str__(self):
        args = self.train_args
        what = (args["dataset"], args["algorithm"], args["test_envs"], args["hparams_seed"])
        return f"{self.state}: {self.output_dir} {what}"

    def is_done(self) -> bool:
        """Whether it has finished, as of now."""
        return files.is_done(self.output_dir)

    @property
    def generation(self) -> int:
        """0 for a job without teachers, else 1 more than the largest among them."""
        return 1 + max((teacher.generation for teacher in self.teachers), default=-1)

    def state_now(self) -> str:
        """Its state, looked up again."""
        if self.is_done():
            return self.DONE
        if not files.has_begun(self.output_dir):
            return self.NOT_LAUNCHED
        if claims.holder(self.output_dir) is not None:  # a process of this package
            return self.RUNNING
        return self.INTERRUPTED if files.failure(self.output_dir) is None else self.FAILED

    def wrote_within(self, seconds: float) -> bool:
        """Whether anything in its folder changed within so many seconds."""
        if not self.has_folder:
            return False
        with os.scandir(self.output_dir) as entries:
            newest = max((entry.stat().st_mtime for entry in entries),
                         default=os.stat(self.output_dir).st_mtime)
        return time.time() - newest < seconds

    @property
    def n_steps(self) -> int:
        """How many updates it makes."""
        return (self.train_args.get("steps")
                or datasets.get_dataset_class(self.train_args["dataset"]).N_STEPS)

    @property
    def label(self) -> str:
        """Its algorithm, dataset, test envs and seeds, in words."""
        return label(self.train_args)

    @functools.cached_property
    def cost(self) -> dict[str, float]:
        """Its cost so far; see `files.cost`."""
        return files.cost(self.output_dir)

    def why_failed(self) -> str:
        """Why it ended without finishing, in a line."""
        if reason := files.failure(self.output_dir):
            return reason
        if self.exit_status == -signal.SIGKILL:
            return "killed by SIGKILL, as happens when a machine runs out of memory"
        if self.exit_status < 0:
            return f"killed by {signal.Signals(-self.exit_status).name}"
        if self.was_stopped:
            return "stopped before its end"
        return files.last_error(self.output_dir) or f"exit status {self.exit_status}, no message"

    @property
    def was_stopped(self) -> bool:
        """Whether somebody stopped it: it has not failed, and can continue."""
        return self.exit_status in (STOPPED, BUSY)

    @staticmethod
    def launch(jobs: list["Job"], launcher_fn: Callable, later: list["Job"] | tuple = ()
               ) -> list["Job"]:
        """Makes the jobs' folders and hands their commands to a launcher.

        Folders of jobs that come `later` are made too, as tables count them. If the launcher
        raises, folders in which nothing has begun are removed. Returns the jobs that failed or
        were stopped, except those that another launcher runs or has finished; none if the
        launcher returns no exit statuses.
        """
        print("Launching...")
        print("Making job directories:")
        for job in [*jobs, *later]:
            os.makedirs(job.output_dir, exist_ok=True)
            files.leave_args(job.output_dir, job.train_args)
            job.has_folder = True
        try:
            statuses = launcher_fn([job.command_str for job in jobs])
        except BaseException:
            for job in [*jobs, *later]:
                if files.is_waiting(job.output_dir):
                    files.remove_waiting(job.output_dir)
            raise
        print(f"Launched {len(jobs)} jobs!")
        if not isinstance(statuses, list):
            return []
        for job, status in zip(jobs, statuses):
            job.exit_status = status
        failed = [job for job in jobs if job.exit_status != 0
                  and job.state_now() not in (job.DONE, job.RUNNING)]
        for job in failed:  # one that was killed could not say why
            if job.state_now() != job.FAILED and not job.was_stopped:
                files.note_failure(job.output_dir, job.why_failed())
        return failed

    @staticmethod
    def delete(jobs: list["Job"]) -> None:
        """Removes the jobs' folders and all that is in them."""
        print("Deleting...")
        for job in jobs:
            shutil.rmtree(job.output_dir)
        print(f"Deleted {len(jobs)} jobs!")
