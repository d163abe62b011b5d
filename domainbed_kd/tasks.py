"""Tasks, with one label per image or one per pixel, and their metrics.

A dataset declares its task: `MultipleDomainDataset.TASK`. Maps of logits are (B, C, H, W), their
labels int64 (B, H, W), where IGNORED marks pixels that losses and metrics leave out. It is the
default `ignore_index` of `torch.nn.functional.cross_entropy`.
torch is imported when something is counted, not with this module.
"""

from typing import NamedTuple

#: The label of pixels that do not count; mask files have 255.
IGNORED = -100


class Hits:
    """Counts correctly classified images."""

    def __init__(self):
        self.right, self.n = 0, 0

    def add(self, logits, y) -> None:
        """Adds a batch: logits (B, C), or (B, 1) for two classes, and labels (B,)."""
        guess = logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0
        self.right = self.right + (guess == y).sum()
        self.n += len(y)

    def score(self) -> float:
        """The accuracy, in [0, 1]."""
        return self.right.item() / self.n

    def by_class(self) -> list[float | None] | None:
        """None: accuracy is not a mean over classes."""


class Confusion:
    """Counts pixels by label and prediction over a whole split, without ignored pixels."""

    def __init__(self):
        self.counts = 0

    def add(self, logits, y) -> None:
        """Adds a batch: maps (B, C, h, w), and labels (B, H, W) of the same or another size."""
        self.counts = self.counts + confusion(at_size_of(logits, y), y)

    def score(self) -> float:
        """The mean IoU, in [0, 1], of the classes that occur or are predicted."""
        found = [iou for iou in self.by_class() if iou is not None]
        return sum(found) / len(found) if found else 0.0

    def by_class(self) -> list[float | None] | None:
        """Each class's IoU; None for a class that neither occurs nor is predicted."""
        counts = self.counts.cpu().double()
        both = counts.diag()
        either = counts.sum(dim=0) + counts.sum(dim=1) - both
        return [(i / u).item() if u else None for i, u in zip(both, either)]


class Task(NamedTuple):
    """A kind of labels, and the metric in place of DomainBed's accuracy."""

    name: str
    #: The metric's name in tables and figures.
    metric: str
    #: A record's "metric"; None if records have no such key, like DomainBed's.
    on_record: str | None
    #: The class that computes the metric over a split.
    counter: type

    @property
    def per_pixel(self) -> bool:
        """Whether there is one label per pixel."""
        return self is SEGMENTATION


CLASSIFICATION = Task("classification", "accuracy", None, Hits)
SEGMENTATION = Task("segmentation", "mIoU", "miou", Confusion)


def metric_name(on_record: str | None) -> str:
    """The name in tables of a record's "metric"."""
    known = {task.on_record: task.metric for task in (CLASSIFICATION, SEGMENTATION)}
    return known.get(on_record) or str(on_record)


def n_labels(y) -> int:
    """The number of labels (B,), or of pixels in masks (B, H, W) that are not ignored.

    An int, or a one-element tensor, so that nothing waits for a GPU.
    """
    return len(y) if y.dim() == 1 else (y != IGNORED).sum()


def at_size_of(logits, y):
    """Maps (B, C, h, w) resized to labels (B, H, W), bilinear; logits (B, C) unchanged."""
    if y.dim() == 1 or logits.shape[2:] == y.shape[1:]:
        return logits
    import torch.nn.functional as F

    return F.interpolate(logits.float(), y.shape[1:], mode="bilinear")


def confusion(logits, y):
    """Counts by label and prediction, int64 (C, C), of logits (B, C, ...) and labels (B, ...)."""
    import torch

    n = logits.shape[1]
    pairs = torch.where(y == IGNORED, n * n, y * n + logits.argmax(dim=1))
    return pairs.flatten().bincount(minlength=n * n + 1)[:-1].view(n, n)
