"""What a sweep's jobs have cost so far, and what is left, from what they measured themselves."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable


class Rates:
    """Seconds per update, evaluations included, by algorithm and data set.

    Args:
        jobs: those that have begun count; a job is a `jobs.Job`.
    """

    def __init__(self, jobs: Iterable):
        seconds, steps = Counter(), Counter()
        for job in jobs:
            cost = job.cost()
            if cost.get("steps"):
                kind = _kind(job)
                for key in (kind, kind[1]):
                    seconds[key] += cost["seconds"]
                    steps[key] += cost["steps"]
        self._rates = {key: seconds[key] / steps[key] for key in steps}

    def is_measured(self, job) -> bool:
        """Whether a run of the same algorithm on the same data set has measured it."""
        return _kind(job) in self._rates

    def of(self, job) -> float | None:
        """Seconds per update of such a job, or else of all on its data set; None if unknown."""
        return self._rates.get(_kind(job), self._rates.get(_kind(job)[1]))

    def seconds_left(self, job, stated: float | None = None) -> float | None:
        """Seconds that a job still needs; None if unknown.

        Args:
            job: a `jobs.Job`.
            stated: seconds of a whole run, for algorithms that no run has measured.
        """
        if job.state == job.DONE:
            return 0.0
        cost = job.cost()
        steps = cost.get("steps", 0)
        rate = cost["seconds"] / steps if steps else self.of(job)
        if stated is not None and not self.is_measured(job):
            rate = stated / job.n_steps
        return None if rate is None else rate * max(job.n_steps - steps, 0)


def _kind(job) -> tuple[str, str]:
    return job.train_args["algorithm"], job.train_args["dataset"]


def wall_seconds(jobs: Iterable, seconds: dict[int, float], slots: int) -> float:
    """How long jobs take, so many at a time and in order; students begin after all teachers.

    Args:
        jobs: `jobs.Job`s.
        seconds: what each takes, by its id.
        slots: jobs at a time.
    """
    total, jobs = 0.0, list(jobs)
    for taught in (False, True):
        ends = [0.0] * slots
        for job in jobs:
            if bool(job.teacher) == taught:
                heapq.heapreplace(ends, ends[0] + seconds[id(job)])
        total += max(ends)
    return total


def trimmed(n_trials: int, n_hparams: int, fits: Callable[[int, int], bool]
            ) -> tuple[int, int] | None:
    """The most trials and seeds of hparams that fit, shrunk as evenly as can be; None if none do.

    Of all that fit it is the pair whose smaller share of what was asked for is largest, and
    among those the one with the most runs, then with the most trials.
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
