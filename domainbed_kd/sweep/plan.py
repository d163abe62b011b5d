"""A sweep's cost so far and a forecast of the rest, from what its jobs measured."""

import argparse
import heapq
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from domainbed_kd import datasets, machine
from domainbed_kd.folder import curves
from domainbed_kd.sweep import measure
from domainbed_kd.sweep.jobs import Job


class Rates:
    """How long runs take, by what jobs measured.

    Args:
        jobs: the sweep's; those that have begun count, evaluations included.
        stated: seconds of a run whose algorithm no job has measured on its dataset.
    """

    def __init__(self, jobs: Iterable[Job], stated: float | None = None):
        seconds, steps = Counter(), Counter()
        for job in jobs:
            cost = job.cost
            if cost.get("steps"):
                kind = kind_of(job)
                for key in (kind, kind[1]):
                    seconds[key] += cost["seconds"]
                    steps[key] += cost["steps"]
        self._per_step = {key: seconds[key] / steps[key] for key in steps}
        self._stated = stated
        self._timings: dict[tuple[str, str], measure.Timing | None] = {}

    def time(self, jobs: Iterable[Job]) -> None:
        """Times a few steps of those jobs whose kind no job has measured."""
        unknown = [job for job in jobs if kind_of(job) not in self._per_step]
        self._timings = dict(zip(map(kind_of, unknown), measure.measure(unknown)))

    def of_run(self, job: Job) -> tuple[float | None, str]:
        """Seconds of a whole run, None if unknown, and their source."""
        kind = kind_of(job)
        if kind in self._per_step:
            return self._per_step[kind] * job.n_steps, "measured"
        if timing := self._timings.get(kind):
            return measure.of_job(timing, job), (
                f"at {1000 * timing.step:.3g} ms an update and {timing.evaluation:.3g} s an "
                "evaluation")
        if self._stated:
            return self._stated, "as stated"
        if (others := self._per_step.get(kind[1])) is not None:
            return others * job.n_steps, f"by other algorithms on {kind[1]}"
        return None, "not measured yet: pass --measure or --hours_per_run"

    def seconds_left(self, job: Job) -> float | None:
        """Seconds that a job still needs, at its own pace if it has begun; None if unknown."""
        if job.state == job.DONE:
            return 0.0
        if steps := job.cost.get("steps"):
            return job.cost["seconds"] / steps * max(job.n_steps - steps, 0)
        return self.of_run(job)[0]


def kind_of(job: Job) -> tuple[str, str]:
    """The table row and the dataset of a job."""
    return curves.row(job.train_args), job.train_args["dataset"]


def wall_seconds(jobs: list[Job], seconds: dict[int, float], slots: int) -> float:
    """Seconds in which jobs run in order, `slots` at a time; `seconds` has those of each by id.

    Students begin after all teachers.
    """
    total = 0.0
    for generation in sorted({job.generation for job in jobs}):
        ends = [0.0] * slots
        for job in jobs:
            if job.generation == generation:
                heapq.heapreplace(ends, ends[0] + seconds[id(job)])
        total += max(ends)
    return total


def in_words(seconds: float) -> str:
    """A duration in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def slots(args: argparse.Namespace, launcher: str) -> int:
    """How many jobs a launcher runs at a time; 1 if that is not known."""
    per_device = args.jobs_per_device or 1
    if launcher == "multi_gpu":
        return max(1, len(machine.gpus())) * per_device
    if launcher == "slurm":
        return args.slurm_parallel or 256
    if launcher == "ray" and not args.ray_address:
        return max(1, int((os.cpu_count() or 1) / (args.ray_cpus or 1)))
    return per_device if launcher == "local" else 1


def forecast(launches: list[argparse.Namespace], all_jobs: list[Job]) -> int:
    """Prints how many runs there are, how long each takes, and how long all take by launcher.

    Returns:
        1 if not even one trial with one seed of hparams fits the budget, else 0.
    """
    args = launches[-1]
    rates = Rates(all_jobs, args.hours_per_run and 3600 * args.hours_per_run)
    kinds = defaultdict(list)
    for job in all_jobs:
        kinds[kind_of(job)].append(job)
    if args.measure:
        rates.time(some[0] for some in kinds.values())
    teachers = {id(teacher) for job in all_jobs for teacher in job.teachers}
    for kind, some in kinds.items():
        seconds, source = rates.of_run(some[0])
        each = "" if seconds is None else f"{in_words(seconds)} each, "
        print(f"{' '.join(kind)}: {_counts(some, teachers)}; {each}{source}")
    print(f"total: {len(all_jobs)} runs, {len(teachers)} teachers, {_n_done(all_jobs)} done")
    _print_own_lengths(all_jobs)
    left = {id(job): rates.seconds_left(job) for job in all_jobs}
    if None in left.values():
        if args.budget:
            raise ValueError("--budget needs the time that a run takes: pass --measure or "
                             "--hours_per_run, or finish a run of each dataset first.")
        return 0

    def hours(some: list[Job], launcher: str) -> float:
        return wall_seconds(some, left, slots(args, launcher)) / 3600

    for launcher in dict.fromkeys(("local", "slurm", "ray", args.command_launcher)):
        print(f"{launcher}: {hours(all_jobs, launcher):.3g} hours, {slots(args, launcher)} at a "
              "time")
    if not args.budget:
        return 0
    return _fit_budget(launches, all_jobs, lambda some: hours(some, args.command_launcher))


def _n_done(some: list[Job]) -> int:
    return sum(job.state == Job.DONE for job in some)


def _counts(some: list[Job], teachers: set[int]) -> str:
    """How many runs of a kind there are; `teachers` are the ids of jobs that teach."""
    n_teachers = sum(id(job) in teachers for job in some)
    return ", ".join([
        f"{len(some)} runs", *[f"{n_teachers} of them teachers"] * bool(n_teachers),
        *["after their teachers"] * bool(some[0].teachers), f"{_n_done(some)} done"])


def _print_own_lengths(all_jobs: list[Job]) -> None:
    """Prints what a flag of 0 stands for, in sweeps that have one."""
    for flag, attribute in (("steps", "N_STEPS"), ("checkpoint_freq", "CHECKPOINT_FREQ")):
        own = dict.fromkeys(job.train_args["dataset"] for job in all_jobs
                            if job.train_args.get(flag) == 0)
        if own:
            print(f"--{flag} 0, as in DomainBed, is the dataset's own: " + ", ".join(
                f"{name} {getattr(datasets.get_dataset_class(name), attribute)}" for name in own))


def _fit_budget(launches: list[argparse.Namespace], all_jobs: list[Job],
                hours: Callable[[list[Job]], float]) -> int:
    """Prints the most trials and seeds of hparams that fit the budget; 1 if none do.

    Both are reduced evenly: the pair with the largest smaller share of what was asked for counts,
    then the one with the most runs, then with the most trials.
    """
    budget = launches[-1].budget
    teachers = {id(teacher) for job in all_jobs for teacher in job.teachers}
    first = min(each.n_hparams_from for each in launches)
    most = (max(each.n_trials for each in launches),
            max(each.n_hparams for each in launches) - first)
    pairs = itertools.product(*(range(1, n + 1) for n in most))
    for n_trials, n_hparams in sorted(pairs, reverse=True, key=lambda pair: (
            min(pair[0] / most[0], pair[1] / most[1]), pair[0] * pair[1], pair[0])):
        kept = [job for job in all_jobs if job.train_args["trial_seed"] < n_trials and (
            id(job) in teachers or job.train_args["hparams_seed"] < first + n_hparams)]
        if hours(kept) <= budget:
            print(f"within {budget:g} hours: --n_trials {n_trials} --n_hparams "
                  f"{first + n_hparams}")
            return 0
    print(f"{budget:g} hours do not suffice for one trial with one seed of hparams.")
    return 1
