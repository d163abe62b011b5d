"""What every algorithm is: DomainBed's four-argument constructor, `update` and `predict`."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn


def fixed(value) -> tuple:
    """A search-space entry that every draw leaves at `value`."""
    return value, lambda r: value


class Takes(NamedTuple):
    """What an hparam may be: a test of a value, and words that follow "it takes"."""

    fits: Callable[[object], bool]
    words: str


def at_least(low: float) -> Takes:
    """Numbers from `low` up."""
    return Takes(lambda value: isinstance(value, Real) and value >= low, f"at least {low}")


def above(low: float, up_to: float = float("inf")) -> Takes:
    """Numbers above `low`, at most `up_to`."""
    limit = "" if up_to == float("inf") else f", up to {up_to}"
    return Takes(lambda value: isinstance(value, Real) and low < value <= up_to,
                 f"a number above {low}{limit}")


def between(low: float, high: float) -> Takes:
    """Numbers from `low` to `high`, both included."""
    return Takes(lambda value: isinstance(value, Real) and low <= value <= high,
                 f"a number from {low} to {high}")


def one_of(*known: str) -> Takes:
    """Some words."""
    return Takes(lambda value: value in known, f"one of {', '.join(known)}")


def or_null(takes: Takes) -> Takes:
    """The same or None, which is null in JSON."""
    return Takes(lambda value: value is None or takes.fits(value), f"{takes.words}, or null")


@contextlib.contextmanager
def forked_rng() -> Iterator[None]:
    """Inside, random numbers may be drawn freely; outside, the global streams never notice.

    Everything that a method builds beyond ERM's student goes in here, so that with its extra
    weights at 0 it trains as ERM does, bit for bit.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


class Algorithm(nn.Module):
    """A domain-generalization algorithm.

    A subclass sets `self.network` (the part that `predict` runs and that is averaged) and
    `self.optimizer`, and implements `update` and `predict`.

    Raises:
        ValueError: if an hparam is not what `takes` says.
    """

    #: The name that tables show, where it differs from the class's.
    display_name: str | None = None
    #: True if only a run's last record counts in model selection (SWAD), not its best.
    selects_last = False
    #: Updates that no average of its weights takes in, as the student is not yet what it will be.
    averages_after = 0
    #: True if DomainBed's numbers hold a defect, which the hparam `mended`: true mends.
    mends = False
    #: Why its teacher has to see what the student sees, if it has to; see canonical_view.
    needs_same_view: str | None = None
    #: What hparams take that do not take every value of their default's kind.
    takes: dict[str, Takes] = {
        "lr": at_least(0), "weight_decay": at_least(0), "resnet_dropout": between(0, 1),
        "vit_dropout": between(0, 1)}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__()
        for name, takes in self.takes.items():
            if name in hparams and not takes.fits(hparams[name]):
                raise ValueError(
                    f"{self.display_name or type(self).__name__}: {name} is {hparams[name]!r}; it "
                    f"takes {takes.words}.")
        self.hparams = hparams

    @staticmethod
    def search_space(dataset: str) -> dict:
        """Hparams of this algorithm: `{name: (default, draw)}`, where draw(RandomState) -> value.

        Entries override those that all algorithms share, such as `lr`.
        """
        return {}

    def update(self, minibatches, unlabeled=None):
        """One optimisation step.

        Args:
            minibatches: one (x, y) per training domain; x is float32 (B, C, H, W), y int64 (B,).
            unlabeled: None, or one x per test domain (task domain_adaptation).

        Returns:
            dict[str, float]: `loss` and each of its terms before weighting.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement update().")

    def predict(self, x):
        """Logits (B, num_classes) of x (B, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement predict().")

    def forward(self, x):
        """The same as `predict`."""
        return self.predict(x)

    def checkpoint(self, step: int, last: bool, validate, batches) -> None:
        """Called by the training loop after each update; does nothing unless overridden.

        Args:
            step: the update just made, from 0.
            last: whether it was the run's last.
            validate: a function of a predictor (x -> logits) that returns the mean over the
                training domains of its cross-entropy on the out-split, images not augmented.
            batches: a function of n that yields n lists of minibatches like those of `update`.
                Both leave every random stream as it was.
        """

    def adam(self, *modules: nn.Module, lr: float | None = None,
             weight_decay: float | None = None, **options) -> torch.optim.Adam:
        """DomainBed's optimiser: Adam over the modules' parameters at the run's lr and decay."""
        parameters: Iterable = [p for module in modules for p in module.parameters()]
        return torch.optim.Adam(
            parameters,
            lr=self.hparams["lr"] if lr is None else lr,
            weight_decay=self.hparams["weight_decay"] if weight_decay is None else weight_decay,
            **options)

    def descend(self, loss: Tensor, **terms: Tensor | float) -> dict[str, float]:
        """One step of `self.optimizer` on the loss; returns the loss and its terms as floats."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {name: term.item() if isinstance(term, Tensor) else term
                for name, term in {"loss": loss, **terms}.items()}
