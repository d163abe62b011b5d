"""A sweep as a list of jobs: what each trains, the folder it trains in, what became of it.

Folder names, seeds and order are DomainBed's (scripts/sweep.py at b93c22a), so a sweep begun there
can be finished here. A folder's name depends on `data_dir`; what a run *is* does not, so a run
made from data in another place is found by the arguments on record in its results.jsonl.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import time
from collections.abc import Callable

from domainbed_kd import algorithms, datasets
from domainbed_kd.console import parse_hparams
from domainbed_kd.datasets import counts
from domainbed_kd.folder import claims, composition, files
from domainbed_kd.folder.args import identity, label, of_sweep, off_record, words
from domainbed_kd.folder.claims import BUSY, STOPPED
from domainbed_kd.seeds import seed_hash

_encode = json.JSONEncoder(sort_keys=True).encode


def test_env_sets(n_envs: int, single: bool) -> list[list[int]]:
    """The sets of domains to hold out: [0], [0, 1], [0, 2], ..., [1], [1, 2], ...

    The pairs serve leave-one-domain-out model selection; `single` leaves them out.
    """
    return [[i, j] if j > i else [i]
            for i in range(n_envs) for j in range(i, i + 1 if single else n_envs)]


def _env_sets_of(dataset: str, data_dir: str | None, single: bool,
                 together: list[int] | None) -> list[list[int]]:
    n_envs = datasets.num_environments(dataset, data_dir)
    if together is not None:
        datasets.check_test_envs(dataset, n_envs, together)
        return [together]
    if n_envs < 2:
        raise ValueError(f"{dataset} has {n_envs} domain: with it held out, none is left to train "
                         "on. Give it two domains or more.")
    if n_envs < 3 and not single:
        raise ValueError(f"{dataset} has {n_envs} domains: with a pair held out, none is left to "
                         "train on. Pass --single_test_envs, which holds out no pairs.")
    return test_env_sets(n_envs, single)


def make_args_list(n_trials, dataset_names, algorithms, n_hparams_from, n_hparams, data_dir, task,
                   holdout_fraction, single_test_envs, test_envs=None, **more) -> list[dict]:
    """The train arguments of every job of a sweep, in DomainBed's order.

    Arguments are flags of `sweep`, which explains them, and `more` flags of `train`. Those that are
    None stay out, so that folders keep the names that DomainBed gives them.

    Raises:
        ValueError: if a dataset has too few domains, or not those of `test_envs`.
    """
    given = {name: value for name, value in more.items() if value is not None}
    env_sets = {name: _env_sets_of(name, data_dir, single_test_envs, test_envs)
                for name in dataset_names}
    return [
        {"dataset": dataset, "algorithm": algorithm, "test_envs": envs,
         "holdout_fraction": holdout_fraction, "hparams_seed": hparams_seed, "data_dir": data_dir,
         "task": task, "trial_seed": trial_seed,
         "seed": seed_hash(dataset, algorithm, envs, hparams_seed, trial_seed), **given}
        for trial_seed in range(n_trials)
        for dataset in dataset_names
        for algorithm in algorithms
        for envs in env_sets[dataset]
        for hparams_seed in range(n_hparams_from, n_hparams)]


def teachers_args(train_args: dict) -> list[dict]:
    """The train arguments of each run that teaches a student: by itself default hparams.

    They are the student's but for what its hparams `teachers` or `teacher` say; without these, a
    method that learns from a run learns from ERM.

    Raises:
        ValueError, NotImplementedError: if they name no teacher, or no algorithm.
    """
    text = train_args.get("hparams")
    hparams = parse_hparams(text) if text else {}
    if asked := composition.teacher_of_method(hparams):
        asked = [asked]
    else:
        asked = [each for each in composition.teachers(hparams) if each.kind == "run"]
    if asked:
        return [_teacher_args(train_args, each, hparams) for each in asked]
    if not algorithms.learns_from_run(train_args["algorithm"]):
        return []
    return [_teacher_args(train_args, composition.Teacher("run", "ERM"))]


def _teacher_args(train_args: dict, teacher: composition.Teacher, hparams: dict | None = None
                  ) -> dict:
    """One teacher's, of a student with these hparams; None keeps the student's text."""
    algorithms.check_name(teacher.name)
    name = algorithms.canonical_name(teacher.name)
    args = {**train_args, "algorithm": name, "hparams_seed": 0}
    if teacher.swapped:
        n_envs = datasets.num_environments(args["dataset"], args["data_dir"])
        args["test_envs"] = [i for i in range(n_envs) if i not in train_args["test_envs"]]
    args["seed"] = seed_hash(args["dataset"], name, args["test_envs"], 0, args["trial_seed"])
    if teacher.steps is not None:
        args["steps"] = teacher.steps
    if hparams is not None:
        if of_run := teacher.hparams_of_run(hparams):
            args["hparams"] = json.dumps(of_run)
        else:
            del args["hparams"]
    return args


def key_of(args: dict) -> tuple:
    """What a run trains, hashable; who teaches it is for the sweep to know."""
    return tuple(identity({**args, "teacher": None}).values())


class Runs:
    """The runs in a sweep's folder, found by folder name or else by what they train."""

    def __init__(self, sweep_output_dir: str):
        self.folder = sweep_output_dir
        self.names = set(os.listdir(sweep_output_dir)) if os.path.isdir(sweep_output_dir) else set()

    def find(self, name: str, train_args: dict) -> str | None:
        """The name of the folder with that name, else of one with the same run, else None."""
        if name in self.names or not self.names:
            return name if self.names else None
        return self._by_identity.get(key_of(train_args))

    @functools.cached_property
    def _by_identity(self) -> dict[tuple, str]:
        """{what is trained: folder name}; what has finished comes first, then what has begun."""
        found, best = {}, {}
        for name in sorted(self.names):
            path = os.path.join(self.folder, name)
            rank = 3 if files.is_done(path) else 2
            try:
                args = files.first_args(path)
            except OSError:
                continue
            if args is None and not os.path.exists(os.path.join(path, files.RESULTS)):
                args, rank = files.planned_args(path), 1  # it may say what it waits to train
            if args and rank > best.get(key := key_of(args), 0):
                found[key], best[key] = name, rank
        return found


def plan(launches: list[argparse.Namespace]) -> list["Job"]:
    """The jobs of a sweep's launches, each with its teacher; teachers that it lacks come first.

    Of a run that several launches list, the flags of the last count.

    Raises:
        ValueError: if teachers are needed but are to save no model.
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
        """Gives a job its teachers, and these theirs; teachers are added before their students."""
        for of_teacher in teachers_args(train_args):
            if args.epochs and of_teacher["steps"] == train_args["steps"]:
                if not args.checkpoint_freq:  # then an evaluation after each epoch
                    del of_teacher["checkpoint_freq"]
                _count_epochs(of_teacher, args.epochs)  # its domains or batches may be others
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


def list_args(args: argparse.Namespace) -> list[dict]:
    """The train arguments of the jobs that a launch's flags ask for, point by point of a grid."""
    found = []
    for point in json.loads(args.grid or "[{}]"):
        shared = of_sweep(args)
        if point:
            hparams = parse_hparams(args.hparams or "{}") | point
            left = {name: value for name, value in hparams.items() if value is not None}
            shared["hparams"] = json.dumps(left) if left else None
        found += make_args_list(
            n_trials=args.n_trials, dataset_names=args.datasets, algorithms=args.algorithms,
            n_hparams_from=args.n_hparams_from, n_hparams=args.n_hparams,
            single_test_envs=args.single_test_envs, test_envs=args.test_envs, **shared)
    for train_args in found:
        _draw(train_args, parse_hparams(args.draws or "{}"))
        if args.epochs:
            _count_epochs(train_args, args.epochs)
    return found


def _draw(train_args: dict, draws: dict) -> None:
    """Adds to a job's hparams one of each list, by the same seeds as the method's own draws."""
    if not draws or train_args["hparams_seed"] == 0:
        return
    seed = seed_hash(train_args["hparams_seed"], train_args["trial_seed"])
    drawn = {name: random.Random(seed_hash(seed, name)).choice(values)
             for name, values in draws.items()}
    train_args["hparams"] = json.dumps(parse_hparams(train_args.get("hparams") or "{}") | drawn)


def _count_epochs(train_args: dict, epochs: float) -> None:
    """Sets a job's steps, and how often it evaluates, by passes over its training images.

    Raises:
        ValueError: if the dataset's numbers of images or the batch size are not known.
    """
    found = counts.sizes(train_args["dataset"], train_args["data_dir"])
    batch_size = parse_hparams(train_args.get("hparams") or "{}").get("batch_size")
    if not found or not batch_size:
        raise ValueError(f"--epochs needs the hparam batch_size and a dataset whose numbers of "
                         f"images are known; {train_args['dataset']} is trained by --steps.")
    sizes = [n for i, n in enumerate(found) if i not in train_args["test_envs"]]
    kept = sum(n - int(n * train_args["holdout_fraction"]) for n in sizes)
    steps = max(1, kept // (batch_size * len(sizes)))  # an incomplete batch is dropped
    train_args["steps"] = max(1, round(epochs * steps))
    train_args.setdefault("checkpoint_freq", steps)


class Job:
    """A run of a sweep.

    Its folder is `<sweep_output_dir>/<md5 of the sorted JSON of train_args>`, as DomainBed's, or
    where there is none, the folder of a run that differs in nothing but `data_dir`. `state` is
    looked up once, here.

    Args:
        train_args: an entry of `make_args_list`.
        sweep_output_dir: the sweep's folder.
        runs: what that folder holds; share one among many jobs.
        flags: words of train that change nothing in its records. Neither these nor the
            `teachers`, the jobs whose models it learns from and which must be done first, are part
            of the folder's name.
    """

    NOT_LAUNCHED = "Not launched"  # also of one that waits in a launcher's queue
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
        folders = [teacher.output_dir for teacher in self.teachers]
        teacher = {"teacher": folders} if folders else {}
        return shlex.join([
            "python", "-m", "domainbed_kd.scripts.train", *words(dict(sorted(
                self.train_args.items())) | teacher), *self.flags])

    def __str__(self):
        args = self.train_args
        what = (args["dataset"], args["algorithm"], args["test_envs"], args["hparams_seed"])
        return f"{self.state}: {self.output_dir} {what}"

    def is_done(self) -> bool:
        """Whether it has finished, as of now."""
        return files.is_done(self.output_dir)

    @property
    def generation(self) -> int:
        """0 for a job without teachers, else one more than the last of them."""
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
        """Whether anything in its folder changed that recently."""
        if not self.has_folder:
            return False
        with os.scandir(self.output_dir) as entries:
            newest = max((entry.stat().st_mtime for entry in entries),
                         default=os.stat(self.output_dir).st_mtime)
        return time.time() - newest < seconds

    @property
    def n_steps(self) -> int:
        """The updates that it makes."""
        return (self.train_args.get("steps")
                or datasets.get_dataset_class(self.train_args["dataset"]).N_STEPS)

    @property
    def label(self) -> str:
        """What it trains, in words."""
        return label(self.train_args)

    @functools.cached_property
    def cost(self) -> dict[str, float]:
        """What it has taken so far; see `files.cost`."""
        return files.cost(self.output_dir)

    def why_failed(self) -> str:
        """Why it ended without being done, in a line."""
        if reason := files.failure(self.output_dir):
            return reason
        if self.exit_status == -signal.SIGKILL:
            return "killed by SIGKILL, as a system does that runs out of memory"
        if self.exit_status < 0:
            return f"killed by {signal.Signals(-self.exit_status).name}"
        if self.was_stopped:
            return "stopped before its end"
        return files.last_error(self.output_dir) or f"exit status {self.exit_status}, no message"

    @property
    def was_stopped(self) -> bool:
        """Whether somebody stopped it, so that it has not failed and can go on."""
        return self.exit_status in (STOPPED, BUSY)

    @property
    def was_taken(self) -> bool:
        """Whether another process trained in its folder when it was started."""
        return self.exit_status == BUSY

    def keep_reason(self) -> None:
        """Leaves in the file `failed` why it ended, unless it did so itself or was stopped."""
        if self.state_now() != self.FAILED and not self.was_stopped:
            files.note_failure(self.output_dir, self.why_failed())

    @staticmethod
    def launch(jobs: list["Job"], launcher_fn: Callable, later: list["Job"] | tuple = ()
               ) -> list["Job"]:
        """Makes the jobs' folders and hands their commands to a launcher.

        Folders of jobs that come `later` are made too, so that tables know of them.
        Returns the jobs that failed or were stopped; none if the launcher returns no exit statuses.
        One that another launcher has finished, or is at, has not failed.
        Folders in which nothing has begun when the launcher gives up are removed, so that their
        jobs count as not launched.
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
        for job in failed:
            job.keep_reason()
        return failed

    @staticmethod
    def delete(jobs: list["Job"]) -> None:
        """Removes the jobs' folders, with all that is in them."""
        print("Deleting...")
        for job in jobs:
            shutil.rmtree(job.output_dir)
        print(f"Deleted {len(jobs)} jobs!")
