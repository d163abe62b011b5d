"""The base of every algorithm: DomainBed's constructor, `update` and `predict`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from domainbed_kd import networks
from domainbed_kd.datasets import MultipleDomainDataset

#: Hparams: {name: (default, draw)}, where draw(RandomState) -> value.
Space: TypeAlias = dict[str, tuple[Any, Callable[[Any], Any]]]


def fixed(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A search-space entry that every draw leaves at `value`."""
    return value, lambda r: value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real)


class Takes(NamedTuple):
    """The values that an hparam takes: a test, and words that follow "it takes"."""

    fits: Callable[[object], bool]
    words: str


def at_least(low: float) -> Takes:
    """Numbers from `low` up."""
    return Takes(lambda value: _is_number(value) and value >= low, f"at least {low}")


def above(low: float, up_to: float = float("inf")) -> Takes:
    """Numbers above `low`, at most `up_to`."""
    limit = "" if up_to == float("inf") else f", up to {up_to}"
    return Takes(lambda value: _is_number(value) and low < value <= up_to,
                 f"a number above {low}{limit}")


def between(low: float, high: float) -> Takes:
    """Numbers from `low` to `high`, both included."""
    return Takes(lambda value: _is_number(value) and low <= value <= high,
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


def detached(**terms: Tensor | float) -> dict[str, Tensor | float]:
    """Copies of these for an update to return: tensors without gradient."""
    return {name: term.detach().clone() if isinstance(term, Tensor) else term
            for name, term in terms.items()}


class Algorithm(networks.CountsOnCPU):
    """A domain-generalization algorithm.

    A subclass sets `self.network` (the part that `predict` runs and that is averaged) and
    `self.optimizer`, and implements `update` and `predict`. What else the package asks of a
    method is declared below, with the answer of a method that says nothing.

    Raises:
        ValueError: if an hparam is not what `takes` says, or if `mended` would fix nothing.
    """

    #: The name that tables show, where it differs from the class's.
    display_name: str | None = None
    #: True if only a run's last record counts in model selection (SWAD), not its best.
    selects_last = False
    #: True if it predicts with an average of its weights, so that none can be put on top.
    averages_weights = False
    #: Updates that such an average leaves out, as the student is not yet what it will be.
    averages_after = 0
    #: True if DomainBed's numbers hold a defect, which the hparam `mended`: true fixes.
    mends = False
    #: True if the sweep trains a teacher for it first: ERM with default hparams.
    learns_from_run = False
    #: True if `train --auto_lr` may choose the learning rate of its `optimizer`.
    takes_auto_lr = False
    #: True while another optimiser than `optimizer` trains it.
    in_warm_up = False
    #: Why its teacher must see the student's augmented images, if it must; see canonical_view.
    needs_same_view: str | None = None
    #: Why no teachers can be put on top of it, if they cannot: a reason that follows a colon.
    no_teachers: str | None = None
    #: True if its loss is not on its minibatches' images in their order.
    rearranges_images = False
    #: Why it cannot learn from a label per pixel; None if it can.
    needs_image_labels: str | None = "its networks end in one vector per image"
    #: What its teacher makes of the student's images: x (B, C, H, W) -> logits (B, num_classes);
    #: None if it has no teacher. The teacher itself is `self.teacher`.
    teacher_logits: Callable[[Tensor], Tensor] | None = None
    #: (dataset, seed or None) -> all hparams, for a fork's method whose fork states them.
    all_hparams: Callable[[str, int | None], dict[str, Any]] | None = None
    #: What hparams take that do not take every value of their default's kind.
    takes: dict[str, Takes] = {
        "lr": at_least(0), "weight_decay": at_least(0), "resnet_dropout": between(0, 1),
        "vit_dropout": between(0, 1), "optimizer": one_of("adam", "sgd", "adamw"),
        "schedule": one_of("none", "step", "cosine")}

    #: The part that predicts, and the optimiser that trains it.
    network: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int,
                 hparams: dict[str, Any]) -> None:
        super().__init__()
        for name, takes in self.takes.items():
            if name in hparams and not takes.fits(hparams[name]):
                raise ValueError(
                    f"{self.display_name or type(self).__name__}: {name} is {hparams[name]!r}; it "
                    f"takes {takes.words}.")
        if hparams.get("mended") and not self.mends:
            raise ValueError(
                f"{self.display_name or type(self).__name__}: the hparam mended is true, but there "
                "is nothing to fix in its numbers. Leave it out.")
        self.hparams = hparams

    @property
    def total_steps(self) -> int:
        """How many updates the run takes; DomainBed's number where a fork does not tell."""
        steps: int = self.hparams.get("total_steps", MultipleDomainDataset.N_STEPS)
        return steps

    def count_updates(self, shape: tuple[int, ...] = ()) -> None:
        """Declares the buffer `update_count`, 0 at first, which survives a restart.

        The method adds 1 in `update`. DomainBed's methods have it in shape (1,).
        """
        self.register_buffer("update_count", torch.zeros(shape, dtype=torch.long))

    def part(self, name: str) -> Any:
        """One of its parts, None if it has none of that name.

        They are "network", which `predict` runs; its "featurizer" and "classifier"; "average", of
        its weights; "teacher" or, where there are several, "teachers".
        """
        return getattr(self, name, None)

    def teacher_is_ready(self) -> bool:
        """Whether `teacher_logits` can be called: there is a teacher, and it is trained."""
        return self.teacher_logits is not None

    @staticmethod
    def search_space(dataset: str) -> Space:
        """Hparams of this algorithm: `{name: (default, draw)}`, where draw(RandomState) -> value.

        Entries override those that all algorithms share, such as `lr`.
        """
        return {}

    def update(self, minibatches: list[tuple[Tensor, Tensor]],
               unlabeled: list[Tensor] | None = None) -> dict[str, Tensor | float]:
        """One optimisation step.

        Args:
            minibatches: one (x, y) per training domain; x is float32 (B, C, H, W), y int64 (B,).
            unlabeled: None, or one x per test domain (task domain_adaptation).

        Returns:
            `loss` and each of its terms before weighting, by name: floats or, so that no step
            waits for a GPU, tensors of one number without gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement update().")

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of x (B, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement predict().")

    def forward(self, x: Tensor) -> Tensor:
        """The same as `predict`."""
        return self.predict(x)

    def checkpoint(self, step: int, last: bool,
                   validate: Callable[[Callable[[Tensor], Tensor]], float],
                   batches: Callable[[int], Iterator[list[tuple[Tensor, Tensor]]]]) -> None:
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
             weight_decay: float | None = None, **options: Any) -> torch.optim.Optimizer:
        """DomainBed's optimiser: Adam over the modules' parameters at the run's lr and decay.

        The hparam `optimizer` makes it AdamW, or SGD with momentum 0.9, unless the method has
        options for Adam.
        """
        rate: float = self.hparams["lr"] if lr is None else lr
        decay = self.hparams["weight_decay"] if weight_decay is None else weight_decay
        kind = "adam" if options else self.hparams.get("optimizer", "adam")
        if kind == "sgd":
            return self.sgd(*modules, lr=rate, weight_decay=decay)
        parameters = [p for module in modules for p in module.parameters()]
        optimizer = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
        return optimizer(parameters, lr=rate, weight_decay=decay, **options)

    def sgd(self, *modules: nn.Module, lr: float | None = None,
            weight_decay: float | None = None) -> torch.optim.SGD:
        """SGD with momentum 0.9 over the modules' parameters, by default at the run's settings."""
        parameters = [p for module in modules for p in module.parameters()]
        return torch.optim.SGD(
            parameters, self.hparams["lr"] if lr is None else lr, momentum=0.9,
            weight_decay=self.hparams["weight_decay"] if weight_decay is None else weight_decay)

    def descend(self, loss: Tensor, **terms: Tensor | float) -> dict[str, Tensor | float]:
        """One step of `self.optimizer` on the loss; returns the loss and its terms."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return detached(loss=loss, **terms)
