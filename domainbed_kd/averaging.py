"""Averages of a network's weights over its training: running means, and SWAD's loss valley.

SMA: Arpit et al., "Ensemble of Averages: Improving Model Selection and Boosting Performance in
Domain Generalization", NeurIPS 2022, https://arxiv.org/abs/2110.10832.
SWAD: Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021,
https://arxiv.org/abs/2102.08604. Constants and the order of events from the authors' code
(github.com/khanrc/swad).
Beta: Shu et al., "CLIPood: Generalizing CLIP to Out-of-Distributions", ICML 2023,
https://arxiv.org/abs/2302.00864; positions and density from the authors' code
(github.com/thuml/CLIPood), which keeps the mean in half precision. Here it is float32.

Only `algorithm.network` is averaged, never optimisers or teachers. No gradient changes, so the live
network trains to the same bits as without an average. `averaged` puts one on top of any algorithm.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from domainbed_kd import networks
from domainbed_kd.loss_valley import LossValley, Segment, add_to_mean
from domainbed_kd.seeds import forked_rng


class MovingAverage(networks.CountsOnCPU):
    """The uniform mean of a network's weights after updates `start`, `start` + 1, ...

    Updates count from 1. Before `start` it is a copy of the live network; with `start` 0 the mean
    includes the network's weights as they are now (Arpit et al., equation 1). All floating-point
    entries of the state dict are averaged, BatchNorm's statistics too. Count and mean are in the
    state dict, so a resumed run ends in the same average.
    """

    def __init__(self, network: nn.Module, start: int = 1):
        super().__init__()
        self.start = start
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("n_updates", torch.tensor(0))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Adds the network's weights to the mean; call it once after each optimisation step."""
        self.n_updates += 1
        add_to_mean(self.network.state_dict(), network.state_dict(),
                    self.parts(self.n_updates.item()))

    def parts(self, n: int) -> float:
        """The inverse, at least 1, of the n-th update's weight in the mean so far."""
        return max(1, n - self.start + 1)

    def warn_if_late(self, method: str, n_steps: int) -> None:
        """Warns if a run of `n_steps` updates ends before a second one is averaged."""
        if 0 < n_steps <= self.start:
            warnings.warn(f"{method}: its average begins after update {self.start} of {n_steps}, "
                          "so nothing is averaged. Begin earlier, or train longer.",
                          stacklevel=2)

    def restart(self) -> None:
        """Forgets all updates: the next one is the first."""
        self.n_updates.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The averaged network's output for x."""
        return self.network(x)

    @contextlib.contextmanager
    def in_place_of(self, network: nn.Module) -> Iterator[None]:
        """Inside, `network` has the average's weights; afterwards its own again, to the bit.

        So `predict` runs with the average, whatever else it does besides calling its network.
        """
        # Swaps whole tensors, not their data: a graph built inside keeps them, so its gradients are
        # the average's even if they are computed after the swap back.
        def swap():
            for live, mean in zip(network.modules(), self.network.modules()):
                live._parameters, mean._parameters = mean._parameters, live._parameters
                live._buffers, mean._buffers = mean._buffers, live._buffers

        swap()
        try:
            yield
        finally:
            swap()


class BetaAverage(MovingAverage):
    """The mean of a network's weights over training, weighted by a Beta density.

    The weights after updates `start` to `n_steps` are placed at equal steps over (0, 1), and each
    has the density of Beta(`beta`, `beta`) there as its weight: with 0.5 the first and the last
    count most, with 1 all count the same. A `start` of 0 includes the network as it is now.
    """

    def __init__(self, network: nn.Module, n_steps: int, beta: float, start: int = 0):
        super().__init__(network, start)
        self.network.float()
        n = max(1, n_steps - start + 1)
        position = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        density = (position * (1 - position)) ** (beta - 1)
        self._parts = (density.cumsum(dim=0) / density).tolist()

    def parts(self, n: int) -> float:
        """The inverse, at least 1, of the n-th update's weight in the mean so far."""
        return self._parts[min(max(0, n - self.start), len(self._parts) - 1)]


class WithMovingAverage:
    """An Algorithm that predicts in eval mode with the moving average of its weights."""

    averages_weights = True
    #: {name: default} of the hparams that the average adds to the algorithm's.
    of_average: dict = {"sma_start": None}  # null: 2 % of the run, 100 of 5,001 updates

    @classmethod
    def search_space(cls, dataset: str) -> dict:
        """The algorithm's own hparams, and those of its average."""
        return super().search_space(dataset) | _fixed(**cls.of_average)

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.average = self.new_average()
        self.average.warn_if_late(self.shown_name(), self.total_steps)

    def new_average(self) -> MovingAverage:
        """The mean from update `sma_start` on, counted after the first `averages_after`.

        As in the authors' code, it includes the weights before that update.
        """
        start = self.start("sma_start", max(1, round(0.02 * self.total_steps)))
        return MovingAverage(self.network, self.averages_after + max(0, start - 1))

    def start(self, name: str, default: int) -> int:
        """The hparam `name`, an update or, if it is None or not given, the default.

        Raises:
            ValueError: if it is neither.
        """
        value = self.hparams.get(name)
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{name} is {value!r}; it takes a whole number, at least 0, or null.")
        return default if value is None else value

    def update(self, minibatches, unlabeled=None):
        """The algorithm's step; then updates the average."""
        values = super().update(minibatches, unlabeled)
        self.average.update(self.network)
        return values

    def predict(self, x):
        """Logits (B, C): the live network's in train mode, the average's in eval mode."""
        if self.training:
            return super().predict(x)
        with self.average.in_place_of(self.network):
            return super().predict(x)


class WithBetaAverage(WithMovingAverage):
    """The same with the mean of all weights, also the initial ones, weighted by a Beta density.

    `beta_average` is the density's parameter. Before the run's end, the mean is that so far.

    Raises:
        ValueError: if the number of steps is not known, or `beta_average` is not above 0.
    """

    of_average = {"beta_average": 0.5, "beta_start": 0}

    def new_average(self):
        """The mean from update `beta_start` on, counted after the first `averages_after`."""
        if "total_steps" not in self.hparams:
            raise ValueError("hparams['averaging'] is 'beta', which needs the run's number of "
                             "steps: pass it as hparams['total_steps'].")
        beta = self.hparams.get("beta_average", 0.5)
        if not beta > 0:
            raise ValueError(f"beta_average is {beta}; it takes a number above 0.")
        return BetaAverage(self.network, self.hparams["total_steps"], beta,
                           self.averages_after + self.start("beta_start", 0))


class WithLossValley:
    """An Algorithm whose result is the mean of its weights over the loss valley.

    During training it predicts with the live network. At the run's last step it becomes the SWAD
    model, so model selection takes a run's last record. `swad_interval` is the length of a segment
    in steps; a validation of the live network ends each.
    """

    averages_weights = True
    selects_last = True

    @classmethod
    def search_space(cls, dataset: str) -> dict:
        """The algorithm's own hparams, and SWAD's at its authors' values."""
        return super().search_space(dataset) | _fixed(**_of_swad(dataset))

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        hparams = _of_swad(hparams.get("dataset")) | hparams
        self.interval = hparams["swad_interval"]
        if self.interval < 1:
            raise ValueError(f"SWAD: swad_interval is {self.interval}; give a number of steps, "
                             "at least 1.")
        # The current segment's mean; after the run's last step, the SWAD model.
        self.average = MovingAverage(self.network)
        self.valley = LossValley(hparams["swad_n_converge"], hparams["swad_n_tolerance"],
                                 hparams["swad_tolerance_ratio"])
        self.register_buffer("finished", torch.tensor(False))

    def update(self, minibatches, unlabeled=None):
        """The algorithm's step; then updates the current segment's mean."""
        values = super().update(minibatches, unlabeled)
        if not self.valley.dead:
            self.average.update(self.network)
        return values

    def checkpoint(self, step: int, last: bool, validate, batches) -> None:
        """Ends a segment at step 0, every `swad_interval` steps, and at the last step."""
        super().checkpoint(step, last, validate, batches)
        if step < self.averages_after and not last:
            self.average.restart()
            return
        if (last or step % self.interval == 0) and not self.valley.dead:
            n = self.average.n_updates.item()
            with forked_rng():  # MTL draws when it predicts
                loss = validate(super().predict)
            self.valley.add(Segment(
                {name: tensor.to("cpu", copy=True)
                 for name, tensor in self.average.network.state_dict().items()},
                step - n + 1, step, loss))
            self.average.restart()
        if last:
            self.average.network.load_state_dict(self.valley.finish())
            self._estimate_batch_norm(batches(min(500, step + 1)))  # 500: authors' number
            self.finished.fill_(True)

    def predict(self, x):
        """Logits (B, C) of the live network; after the run's last step, of the SWAD model."""
        if self.training or not self.finished:
            return super().predict(x)
        with self.average.in_place_of(self.network):
            return super().predict(x)

    def _estimate_batch_norm(self, batches) -> None:
        """Re-estimates the SWAD model's BatchNorm statistics, unless they are frozen."""
        predictor = nn.Module()
        predictor.network = self.network
        predictor.forward = super().predict
        predictor.train()
        learning = [module for module in self.network.modules()
                    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training]
        if learning:
            images = (torch.cat([x for x, _ in minibatches]) for minibatches in batches)
            with forked_rng(), self.average.in_place_of(self.network):
                update_bn(images, predictor)


KINDS = {"sma": WithMovingAverage, "swad": WithLossValley, "beta": WithBetaAverage}


def averaged(algorithm_class: type, kind: str | None) -> type:
    """The algorithm with averaged weights; `kind` is one of KINDS, or None for no average.

    Raises:
        ValueError: if the kind is unknown, or the algorithm already averages its weights.
    """
    if kind is None:
        return algorithm_class
    if kind not in list(KINDS):  # a list, as it may be of any type
        raise ValueError(f"hparams['averaging'] is {kind!r}; known are {', '.join(KINDS)}.")
    if algorithm_class.averages_weights:
        raise ValueError(
            f"{algorithm_class.__name__} averages its weights already: leave out the hparam "
            f"'averaging' ({kind!r}).")
    return type(algorithm_class.__name__, (KINDS[kind], algorithm_class), {})


def _of_swad(dataset: str | None) -> dict:
    """SWAD's hparams as its authors set them for a dataset; None if it is not known."""
    return {"swad_n_converge": 3, "swad_n_tolerance": 6,
            "swad_tolerance_ratio": 0.2 if dataset == "VLCS" else 0.3,
            "swad_interval": {"VLCS": 50, "DomainNet": 500}.get(dataset, 100)}


def _fixed(**values) -> dict:
    """Search-space entries of which every draw is this value."""
    return {name: (value, lambda r, value=value: value) for name, value in values.items()}
