"""Kinds of labels, and what is measured on them: one per image, or one per pixel.

A dataset declares its task: `MultipleDomainDataset.TASK`. Maps of logits are (B, C, H, W), their
labels int64 (B, H, W), where IGNORED marks pixels that count in no loss and in no metric. It is
the index that `torch.nn.functional.cross_entropy` ignores, so that a plain one is right on maps.
torch is imported when something is counted, not with this module.
"""

from typing import NamedTuple

#: The label of pixels that do not count; in files of masks it is 255.
IGNORED = -100


class Hits:
    """Counts right guesses among images."""

    def __init__(self):
        self.right, self.n = 0, 0

    def add(self, logits, y) -> None:
        """Takes in a batch: logits (B, C), or (B, 1) of two classes, and labels (B,)."""
        guess = logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0
        self.right = self.right + (guess == y).sum()
        self.n += len(y)

    def score(self) -> float:
        """Share of images whose class was guessed, in [0, 1]."""
        return self.right.item() / self.n

    def by_class(self) -> list[float | None] | None:
        """None: accuracy is not a mean over classes."""


class Confusion:
    """Counts pixels by label and guess over a whole set; ignored pixels are not counted."""

    def __init__(self):
        self.counts = 0

    def add(self, logits, y) -> None:
        """Takes in a batch: maps (B, C, h, w), and labels (B, H, W) of the same or another size."""
        self.counts = self.counts + confusion(at_size_of(logits, y), y)

    def score(self) -> float:
        """Mean intersection over union, in [0, 1], of the classes that occur or were guessed."""
        found = [iou for iou in self.by_class() if iou is not None]
        return sum(found) / len(found) if found else 0.0

    def by_class(self) -> list[float | None] | None:
        """Each class's intersection over union; None for one that neither occurs nor is guessed."""
        counts = self.counts.cpu().double()
        both = counts.diag()
        either = counts.sum(dim=0) + counts.sum(dim=1) - both
        return [(i / u).item() if u else None for i, u in zip(both, either)]


class Task(NamedTuple):
    """A kind of labels, and the metric that stands where DomainBed has an accuracy."""

    name: str
    #: The metric as tables and figures call it.
    metric: str
    #: What records say of it under "metric"; None where they say nothing, as DomainBed's.
    on_record: str | None
    #: Makes what counts guesses over a set.
    counter: type

    @property
    def per_pixel(self) -> bool:
        """Whether a label is one per pixel."""
        return self is SEGMENTATION


CLASSIFICATION = Task("classification", "accuracy", None, Hits)
SEGMENTATION = Task("segmentation", "mIoU", "miou", Confusion)


def metric_name(on_record: str | None) -> str:
    """The metric that a record's "metric" stands for, as tables call it."""
    known = {task.on_record: task.metric for task in (CLASSIFICATION, SEGMENTATION)}
    return known.get(on_record) or str(on_record)


def n_labels(y) -> int:
    """How many images labels (B,) are of, or masks (B, H, W) pixels that are not ignored.

    An int, or a tensor of one number: nothing waits for a GPU.
    """
    return len(y) if y.dim() == 1 else (y != IGNORED).sum()


def at_size_of(logits, y):
    """Logits as they are; maps (B, C, h, w) at the size of labels (B, H, W), bilinear."""
    if y.dim() == 1 or logits.shape[2:] == y.shape[1:]:
        return logits
    import torch.nn.functional as F

    return F.interpolate(logits.float(), y.shape[1:], mode="bilinear")


def confusion(logits, y):
    """Counts, int64 (C, C), by label and guess, of logits (B, C, ...) and labels (B, ...)."""
    import torch

    n = logits.shape[1]
    pairs = torch.where(y == IGNORED, n * n, y * n + logits.argmax(dim=1))
    return pairs.flatten().bincount(minlength=n * n + 1)[:-1].view(n, n)
