"""The base of every algorithm: DomainBed's constructor, `update` and `predict`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from domainbed_kd import networks
from domainbed_kd.datasets import MultipleDomainDataset
from domainbed_kd.seeds import forked_rng as forked_rng  # methods import it from here

#: Hparams: {name: (default, draw)}, where draw(RandomState) -> value.
Space: TypeAlias = dict[str, tuple[Any, Callable[[Any], Any]]]


def fixed(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A search-space entry of which every draw is `value`."""
    return value, lambda r: value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real)


class Takes(NamedTuple):
    """The values that an hparam takes: a test, and the words after "it takes" in a message."""

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
    """One of these words."""
    return Takes(lambda value: value in known, f"one of {', '.join(known)}")


def or_null(takes: Takes) -> Takes:
    """The same values, or None (null in JSON)."""
    return Takes(lambda value: value is None or takes.fits(value), f"{takes.words}, or null")


def domain_labels(minibatches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The domain of each image, (B,): the position of its minibatch."""
    return torch.cat([torch.full_like(y, i) for i, (_, y) in enumerate(minibatches)])


def detached(**terms: Tensor | float) -> dict[str, Tensor | float]:
    """Copies of terms for an update to return, without gradients."""
    return {name: term.detach().clone() if isinstance(term, Tensor) else term
            for name, term in terms.items()}


class Algorithm(networks.CountsOnCPU):
    """A domain-generalization algorithm.

    A subclass sets `self.network` (the part that `predict` runs and that is averaged) and
    `self.optimizer`, and implements `update`. Everything else that the package asks of a method is
    declared below, with its default.

    Raises:
        ValueError: if `takes` excludes an hparam's value, or if `mended` would fix nothing.
    """

    #: The name that tables show, where it differs from the class's.
    display_name: str | None = None
    #: True if model selection takes a run's last record (SWAD), not its best.
    selects_last = False
    #: True if it predicts with averaged weights, so that the hparam `averaging` is refused.
    averages_weights = False
    #: How many first updates an average leaves out, as the student does not train yet.
    averages_after = 0
    #: True if DomainBed's version has a defect that the hparam `mended`: true fixes.
    mends = False
    #: True if the sweep trains a teacher for it first: ERM with default hparams.
    learns_from_run = False
    #: {hparam: the value with which its teacher may have seen the test domains}.
    taught_by_target: dict[str, str] = {}
    #: True if `train --auto_lr` may choose the learning rate of its `optimizer`.
    takes_auto_lr = False
    #: True while an optimiser other than `optimizer` trains it.
    in_warm_up = False
    #: Why its teacher must see the student's augmented images; None if not. See canonical_view.
    needs_same_view: str | None = None
    #: Why teachers cannot be put on top of it, as the end of a message; None if they can.
    no_teachers: str | None = None
    #: True if it predicts by the image network of its CLIP, not by one of its own.
    network_is_clips = False
    #: True if its loss is on other images than the minibatches', or in another order.
    rearranges_images = False
    #: Why it cannot learn from a label per pixel; None if it can.
    needs_image_labels: str | None = "its networks end in one vector per image"
    #: Its teacher's logits (B, num_classes) of the student's images x (B, C, H, W); None if it has
    #: no teacher. The teacher itself is `self.teacher`.
    teacher_logits: Callable[[Tensor], Tensor] | None = None
    #: (dataset, seed or None) -> all hparams, for a fork's method, whose hparams are the fork's.
    all_hparams: Callable[[str, int | None], dict[str, Any]] | None = None
    #: Which values hparams take, where not every value of their default's kind will do.
    takes: dict[str, Takes] = {
        "lr": at_least(0), "weight_decay": at_least(0), "resnet_dropout": between(0, 1),
        "vit_dropout": between(0, 1), "optimizer": one_of("adam", "sgd", "adamw"),
        "schedule": one_of("none", "step", "cosine"),
        "base_weight": at_least(0), "distill_weight": at_least(0), "distill_temperature": above(0)}

    #: The part that predicts, and the optimiser that trains it.
    network: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int,
                 hparams: dict[str, Any]) -> None:
        super().__init__()
        self.check_hparams(hparams)
        self.hparams = hparams

    @classmethod
    def check_hparams(cls, hparams: dict[str, Any]) -> None:
        """Raises the constructor's ValueError for a bad value; hparams may be absent here."""
        for name, takes in cls.takes.items():
            if name in hparams and not takes.fits(hparams[name]):
                raise ValueError(f"{cls.shown_name()}: {name} is {hparams[name]!r}; it takes "
                                 f"{takes.words}.")
        if hparams.get("mended") and not cls.mends:
            raise ValueError(f"{cls.shown_name()}: the hparam mended is true, but there is "
                             "nothing to fix in its numbers. Leave it out.")

    @classmethod
    def shown_name(cls) -> str:
        """Its name in tables and messages."""
        return cls.display_name or cls.__name__

    @property
    def total_steps(self) -> int:
        """The number of updates in the run; in a fork, which does not say it, DomainBed's."""
        steps: int = self.hparams.get("total_steps", MultipleDomainDataset.N_STEPS)
        return steps

    def count_updates(self, shape: tuple[int, ...] = ()) -> None:
        """Declares the buffer `update_count`, 0 at first, which survives a restart.

        The method adds 1 in `update`. DomainBed's methods have it in shape (1,).
        """
        self.register_buffer("update_count", torch.zeros(shape, dtype=torch.long))

    def part(self, name: str) -> Any:
        """The part of that name; None if there is none.

        Names are "network", which `predict` runs; its "featurizer" and "classifier"; "average", of
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
        """Logits (B, num_classes) of x (B, C, H, W): those of `network`, unless overridden."""
        logits: Tensor = self.network(x)
        return logits

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
        kind = "adam" if options else self.hparams.get("optimizer", "adam")
        if kind == "sgd":
            return self.sgd(*modules, lr=lr, weight_decay=weight_decay)
        optimizer = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
        return self._over(modules, optimizer, lr, weight_decay, **options)

    def sgd(self, *modules: nn.Module, lr: float | None = None,
            weight_decay: float | None = None) -> torch.optim.Optimizer:
        """SGD with momentum 0.9 over the modules' parameters, at the run's lr and decay."""
        return self._over(modules, torch.optim.SGD, lr, weight_decay, momentum=0.9)

    def _over(self, modules: Iterable[nn.Module], optimizer: Any, lr: float | None,
              weight_decay: float | None, **options: Any) -> torch.optim.Optimizer:
        """An optimiser over the modules' parameters, where None at the run's lr and decay."""
        made: torch.optim.Optimizer = optimizer(
            [p for module in modules for p in module.parameters()],
            lr=self.hparams["lr"] if lr is None else lr, weight_decay=(
                self.hparams["weight_decay"] if weight_decay is None else weight_decay), **options)
        return made

    def descend(self, loss: Tensor, **terms: Tensor | float) -> dict[str, Tensor | float]:
        """One step of `self.optimizer` on the loss; returns the loss and its terms."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return detached(loss=loss, **terms)

    def step(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """One step of these optimisers on the loss, for methods that have several."""
        self.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


class InTwoParts(Algorithm):
    """A base for methods that predict by `featurizer` and `classifier`; other parts only train.

    As in DomainBed, the state dict has the two under their own names alone, not as a `network` too.
    """

    featurizer: nn.Module
    classifier: nn.Module

    @property
    def network(self) -> nn.Module:  # type: ignore[override]
        """The two parts, one after the other."""
        return nn.Sequential(self.featurizer, self.classifier)
