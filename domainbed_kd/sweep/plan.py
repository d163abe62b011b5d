"""A sweep's cost so far and a forecast of the rest, from what its jobs measured."""

import argparse
import heapq
import importlib.util
import itertools
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from domainbed_kd import datasets, machine
from domainbed_kd.algorithms import display_name
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

    def once(self, job: Job) -> float:
        """Additional seconds if this job is the first in its process; 0 if not measured."""
        timing = self._timings.get(kind_of(job))
        return timing.once if timing and not job.cost.get("steps") else 0.0

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


def wall_seconds(jobs: list[Job], seconds: dict[int, float], slots: int,
                 once: dict[int, float]) -> float:
    """Seconds in which jobs run in order, `slots` at a time; `seconds` has those of each by id.

    The first job in a slot takes its seconds of `once`, if any, in addition. Students begin after
    all teachers.
    """
    total = 0.0
    for generation in sorted({job.generation for job in jobs}):
        ends = [0.0] * slots
        for job in jobs:
            if job.generation == generation:
                first = 0.0 if ends[0] else once.get(id(job), 0.0)
                heapq.heapreplace(ends, ends[0] + first + seconds[id(job)])
        total += max(ends)
    return total


def in_words(seconds: float) -> str:
    """A duration in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def slots(args: argparse.Namespace, launcher: str, per_device: int | None = None) -> int:
    """How many jobs a launcher runs at a time; 1 if that is not known.

    `per_device` replaces --jobs_per_device.
    """
    per_device = per_device or args.jobs_per_device or 1
    if launcher == "multi_gpu":
        return max(1, len(machine.gpus())) * per_device
    if launcher == "slurm":
        return args.slurm_parallel or 256
    if launcher == "ray" and not args.ray_address:
        return _slots_of_ray(args)
    return per_device if launcher == "local" else 1


def _slots_of_ray(args: argparse.Namespace) -> int:
    """How many jobs Ray runs at a time on this machine."""
    found = int((os.cpu_count() or 1) / (args.ray_cpus or 1))
    n_gpus = len(machine.gpus())
    share = min(n_gpus, 1) if args.ray_gpus is None else args.ray_gpus
    if 0 < share < 1:
        found = min(found, n_gpus * int(1 / share))
    elif share:
        found = min(found, int(n_gpus / share))
    return max(1, found)


def launchers(args: argparse.Namespace) -> list[str]:
    """The launchers that work on this machine, and the chosen one.

    GPUs are looked for only with --measure, as that takes seconds.
    """
    usable = {"local": True, "multi_gpu": args.measure and machine.gpus(),
              "slurm": shutil.which("sbatch"), "ray": importlib.util.find_spec("ray"),
              args.command_launcher: True}
    return [name for name, works in usable.items() if works]


class Prices:
    """Hours of jobs by launcher, and by how many jobs share a device.

    Args:
        sharing: how many times as long a job takes if so many share a device.
    """

    def __init__(self, args: argparse.Namespace, rates: Rates, jobs: list[Job],
                 sharing: dict[int, float]):
        self.args, self.sharing = args, sharing
        self._left = {id(job): rates.seconds_left(job) for job in jobs}
        self._once = {id(job): rates.once(job) for job in jobs}

    @property
    def are_known(self) -> bool:
        """Whether it is known how long each job takes."""
        return None not in self._left.values()

    def hours(self, some: list[Job], launcher: str, per_device: int | None = None) -> float:
        """Hours of these jobs; processes of `local` and `multi_gpu` run one job after another."""
        n, stays = slots(self.args, launcher, per_device), launcher in ("local", "multi_gpu")
        sharing = 1
        if stays:
            sharing = per_device or 1
        elif launcher == "ray":
            sharing = n // max(1, len(machine.gpus()))
        factor = self.sharing[max(i for i in self.sharing if i <= max(1, sharing))]
        each = {key: factor * (seconds + (0 if stays else self._once[key]))
                for key, seconds in self._left.items()}
        return wall_seconds(some, each, n, self._once if stays else {}) / 3600

    def tell(self, jobs: list[Job]) -> None:
        """Prints a line for each launcher and, if it was measured, each number of jobs a device."""
        lines = []
        for launcher in launchers(self.args):
            shares = launcher in ("local", "multi_gpu") and len(self.sharing) > 1
            for n in self.sharing if shares else [self.args.jobs_per_device or 1]:
                hours = self.hours(jobs, launcher, n)
                lines.append((hours, launcher, f" --jobs_per_device {n}" * shares,
                              slots(self.args, launcher, n)))
        here = [line for line in lines if line[1] in ("local", "multi_gpu")]
        best = min(here) if len(here) > 1 else None
        for line in lines:
            hours, launcher, flag, n = line
            print(f"{launcher}{flag}: {hours:.3g} hours, {n} at a time"
                  + "; the fastest on this machine" * (line is best))


def _shared(args: argparse.Namespace, rates: Rates, kinds: dict[tuple, list[Job]]
            ) -> dict[int, float]:
    """Measures how jobs slow each other down on a device, with the quickest kind of run."""
    known = [(seconds / some[0].n_steps, some[0]) for some in kinds.values()
             if (seconds := rates.of_run(some[0])[0]) is not None]
    if not known:
        return {1: 1.0}
    step, job = min(known, key=lambda each: each[0])
    most = 4 if machine.gpus() else max(2, machine.available())
    numbers = {n for n in (2, 4) if n <= most} | {args.jobs_per_device or 1}
    found = {1: 1.0} | measure.slow_downs(job, step, numbers, args.threads_per_job)
    told = ", ".join(f"{n} at a time {factor:.3g}" for n, factor in found.items() if n > 1)
    print(f"times as long as alone, on one device: {told} (measured with {' '.join(kind_of(job))} "
          "and assumed of all)")
    return found


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
        print(f"{display_name(kind[0])} {kind[1]}: {_counts(some, teachers)}; {each}{source}")
    print(f"total: {len(all_jobs)} runs, {len(teachers)} teachers, {_n_done(all_jobs)} done")
    _print_own_lengths(all_jobs)
    prices = Prices(args, rates, all_jobs,
                    _shared(args, rates, kinds) if args.measure else {1: 1.0})
    if not prices.are_known:
        if args.budget:
            raise ValueError("--budget needs the time that a run takes: pass --measure or "
                             "--hours_per_run, or finish a run of each dataset first.")
        return 0
    prices.tell(all_jobs)
    if not args.budget:
        return 0
    return _fit_budget(launches, all_jobs, lambda some: prices.hours(
        some, args.command_launcher, args.jobs_per_device))


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
