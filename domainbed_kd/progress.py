"""Progress on long work: bars on stderr if that is a terminal, nothing in logs and in CI."""

import os
import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager


def bar(*args, **options):
    """Tqdm's bar on the terminal itself: what copies stderr to a file does not see it."""
    from tqdm import tqdm

    return tqdm(*args, file=sys.__stderr__, disable=not sys.stderr.isatty(), **options)


def lifted() -> AbstractContextManager:
    """Inside, bars make room for lines that are printed."""
    from tqdm import tqdm

    return tqdm.external_write_mode(file=sys.__stderr__)


class JobLine:
    """A line about a run in another process: its steps, their rate and the time left.

    Args:
        label: what is trained.
        flags: of its train command, by name.
        position: of the line, below the bar at 0.
    """

    def __init__(self, label: str, flags: Mapping[str, str], position: int):
        self.path = os.path.join(flags.get("output_dir", "train_output"), "results.jsonl")
        self.bar = bar(desc=label, total=n_steps(flags), initial=steps_done(self.path),
                       unit="step", position=position, leave=False)

    def refresh(self) -> None:
        """Looks up how far the run is, by its last evaluation."""
        self.bar.update(steps_done(self.path) - self.bar.n)
        self.bar.refresh()

    def close(self) -> None:
        """Takes the line away."""
        self.bar.close()


def n_steps(flags: Mapping[str, str]) -> int | None:
    """How many updates a train command makes; None if its data set is not known here."""
    from domainbed_kd import datasets

    if steps := int(flags.get("steps") or 0):
        return steps
    name = flags.get("dataset", "RotatedMNIST")
    known = name in datasets.DATASETS or name.startswith("Folder:")
    return datasets.get_dataset_class(name).N_STEPS if known else None


def steps_done(path: str) -> int:
    """The updates before a run's last record; 0 if it has none yet."""
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as file:
        steps = re.findall(rb'"step": (\d+)', file.read())
    return int(steps[-1]) + 1 if steps else 0
