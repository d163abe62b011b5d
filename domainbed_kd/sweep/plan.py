"""A sweep's cost so far, and a forecast of the rest, from what its jobs measured."""

import argparse
import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from domainbed_kd import datasets, machine
from domainbed_kd.folder import curves
from domainbed_kd.sweep import measure
from domainbed_kd.sweep.jobs import Job


class Rates:
    """Seconds per update, evaluations included, by row of tables and dataset, of begun jobs."""

    def __init__(self, jobs: Iterable[Job]):
        seconds, steps = Counter(), Counter()
        for job in jobs:
            cost = job.cost
            if cost.get("steps"):
                kind = _kind(job)
                for key in (kind, kind[1]):
                    seconds[key] += cost["seconds"]
                    steps[key] += cost["steps"]
        self._rates = {key: seconds[key] / steps[key] for key in steps}

    def is_measured(self, job: Job) -> bool:
        """Whether a run of the same algorithm on the same dataset has measured it."""
        return _kind(job) in self._rates

    def of(self, job: Job) -> float | None:
        """Seconds per update of such a job, or else of all on its dataset; None if unknown."""
        return self._rates.get(_kind(job), self._rates.get(_kind(job)[1]))

    def seconds_left(self, job: Job, stated: float | None = None) -> float | None:
        """Seconds that a job still needs; None if unknown.

        `stated` are seconds of a whole run, for algorithms that no run has measured.
        """
        if job.state == job.DONE:
            return 0.0
        cost = job.cost
        steps = cost.get("steps", 0)
        rate = cost["seconds"] / steps if steps else self.of(job)
        if stated is not None and not self.is_measured(job):
            rate = stated / job.n_steps
        return None if rate is None else rate * max(job.n_steps - steps, 0)


def _kind(job: Job) -> tuple[str, str]:
    return curves.row(job.train_args), job.train_args["dataset"]


def wall_seconds(jobs: list[Job], seconds: dict[int, float], slots: int) -> float:
    """How long jobs take in order, `slots` at a time, by the seconds of each by its id.

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


def trimmed(n_trials: int, n_hparams: int, fits: Callable[[int, int], bool]
            ) -> tuple[int, int] | None:
    """The most trials and seeds of hparams that fit, shrunk evenly; None if none do.

    It is the pair with the largest smaller share of what was asked for, then with the most runs,
    then with the most trials.
    """
    pairs = [(trials, hparams) for trials in range(1, n_trials + 1)
             for hparams in range(1, n_hparams + 1)]
    pairs.sort(key=lambda pair: (min(pair[0] / n_trials, pair[1] / n_hparams),
                                 pair[0] * pair[1], pair[0]), reverse=True)
    return next((pair for pair in pairs if fits(*pair)), None)


def in_words(seconds: float) -> str:
    """A duration as a person says it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def slots(args: argparse.Namespace, launcher: str) -> int:
    """How many jobs a launcher runs at a time; 1 where that is not known."""
    per_device = args.jobs_per_device or 1
    if launcher == "multi_gpu":
        return max(1, len(machine.gpus())) * per_device
    if launcher == "slurm":
        return args.slurm_parallel or 256
    if launcher == "ray" and not args.ray_address:
        return max(1, int((os.cpu_count() or 1) / (args.ray_cpus or 1)))
    return per_device if launcher == "local" else 1


def forecast(launches: list[argparse.Namespace], all_jobs: list[Job]) -> int:
    """Prints how many runs there are, what each takes, and what that is by launcher.

    Returns:
        1 if not even one trial with one seed of hparams fits the budget, else 0.
    """
    args = launches[-1]
    rates = Rates(all_jobs)
    stated = args.hours_per_run and 3600 * args.hours_per_run
    teachers = {id(teacher) for job in all_jobs for teacher in job.teachers}
    kinds = defaultdict(list)
    for job in all_jobs:
        kinds[_kind(job)].append(job)
    unknown = [some[0] for some in kinds.values() if not rates.is_measured(some[0])]
    timings = {_kind(job): timing for job, timing in zip(unknown, measure.measure(unknown))
               if timing} if args.measure else {}
    left = {id(job): rates.seconds_left(
        job, measure.of_job(timings[_kind(job)], job) if _kind(job) in timings else stated)
        for job in all_jobs}
    for (algorithm, dataset), some in kinds.items():
        job = some[0]
        rate = rates.of(job)
        if rates.is_measured(job):
            cost = f"{in_words(rate * job.n_steps)} each, measured"
        elif timing := timings.get((algorithm, dataset)):
            cost = (f"{in_words(measure.of_job(timing, job))} each, at {1000 * timing.step:.3g} "
                    f"ms an update and {timing.evaluation:.3g} s an evaluation")
        elif stated:
            cost = f"{in_words(stated)} each, as stated"
        elif rate is not None:
            cost = f"{in_words(rate * job.n_steps)} each, by other algorithms on {dataset}"
        else:
            cost = "not measured yet: pass --measure or --hours_per_run"
        n_teachers = sum(id(job) in teachers for job in some)
        n_done = sum(job.state == Job.DONE for job in some)
        print(f"{algorithm} {dataset}: {len(some)} runs"
              + (f", {n_teachers} of them teachers" if n_teachers else "")
              + (", after their teachers" if job.teachers else "")
              + f", {n_done} done; {cost}")
    print(f"total: {len(all_jobs)} runs, {len(teachers)} teachers, "
          f"{sum(job.state == Job.DONE for job in all_jobs)} done")
    for flag, attribute in (("steps", "N_STEPS"), ("checkpoint_freq", "CHECKPOINT_FREQ")):
        own = {job.train_args["dataset"] for job in all_jobs if job.train_args.get(flag) == 0}
        if own:
            print(f"--{flag} 0, as in DomainBed, is the dataset's own: " + ", ".join(
                f"{name} {getattr(datasets.get_dataset_class(name), attribute)}"
                for _, name in kinds if name in own))
    if None in left.values():
        if args.budget:
            raise ValueError("--budget needs what a run takes: pass --measure or --hours_per_run, "
                             "or finish a run of each dataset first.")
        return 0

    def hours(some: list[Job], launcher: str) -> float:
        return wall_seconds(some, left, slots(args, launcher)) / 3600

    for launcher in dict.fromkeys(("local", "slurm", "ray", args.command_launcher)):
        print(f"{launcher}: {hours(all_jobs, launcher):.3g} hours, {slots(args, launcher)} at a "
              "time")
    if not args.budget:
        return 0

    first = min(each.n_hparams_from for each in launches)

    def fits(n_trials: int, n_hparams: int) -> bool:
        kept = [job for job in all_jobs if job.train_args["trial_seed"] < n_trials
                and (id(job) in teachers
                     or job.train_args["hparams_seed"] < first + n_hparams)]
        return hours(kept, args.command_launcher) <= args.budget

    chosen = trimmed(max(each.n_trials for each in launches),
                     max(each.n_hparams for each in launches) - first, fits)
    if chosen is None:
        print(f"{args.budget:g} hours do not suffice for one trial with one seed of hparams.")
        return 1
    print(f"within {args.budget:g} hours: --n_trials {chosen[0]} --n_hparams "
          f"{first + chosen[1]}")
    return 0
