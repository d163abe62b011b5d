"""What a sweep's jobs have cost so far, and what is left, from what they measured themselves."""

from collections import Counter
from collections.abc import Iterable


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

    def seconds_left(self, job) -> float | None:
        """Seconds that a job still needs; None if unknown."""
        if job.state == job.DONE:
            return 0.0
        cost = job.cost()
        steps = cost.get("steps", 0)
        rate = cost["seconds"] / steps if steps else self.of(job)
        return None if rate is None else rate * max(job.n_steps - steps, 0)


def _kind(job) -> tuple[str, str]:
    return job.train_args["algorithm"], job.train_args["dataset"]


def in_words(seconds: float) -> str:
    """A duration as a person says it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
