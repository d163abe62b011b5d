"""Measures of a run beyond accuracy, at each checkpoint: `train --diagnostics`.

KDDG's paper analyses it by cumulative weight distance and mutual information (Wang et al., ACM MM
2021, https://arxiv.org/abs/2107.02629; the definitions are ours, see docs/analysis.md).
Calibration error follows Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
https://arxiv.org/abs/1706.04599. No random stream advances: a run ends in the same bits with and
without diagnostics.
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_kd import checkpoints
from domainbed_kd.algorithms.kddg import mutual_information
from domainbed_kd.losses import calibration_error

#: How many batches of 64 are read from a domain's out-split, which is shuffled.
MOST_BATCHES = 16
# The probe's ridge. On digits a probe of a few hundred images overfits with 1e-4: it finds 1.6
# nats about the class instead of 1.2, out of 2.3.
RIDGE = 1e-2


class WeightDistance:
    """The cumulative distance of the student's weights: the sum of the steps' lengths.

    The student is `algorithm.network` or, without one, all that the algorithm trains; averages and
    teachers do not count. Sums are in double precision.
    """

    def __init__(self, algorithm: nn.Module):
        network = algorithm.part("network")
        self.student = network if isinstance(network, nn.Module) else algorithm
        self._total = 0.0
        self._by_layer: dict[str, float] = defaultdict(float)
        #: Steps not yet in the sums: the names of the layers, and their squared distances.
        self._steps: list[tuple[list[str], Tensor]] = []
        self.restart()
        self.initial_norm = sum(w.double().square().sum().item()
                                for w in self.before.values()) ** 0.5

    def restart(self) -> None:
        """Starts the next step from the current weights."""
        self.before = {name: w.detach().clone() for name, w in self._weights()}

    @torch.no_grad()
    def add_step(self) -> None:
        """Adds the distance from the weights of the last call to the current ones.

        It does not wait for a GPU: the sums are read when they are asked for.
        """
        squares: dict[str, Any] = defaultdict(float)
        for name, new in self._weights():
            squares[name.rpartition(".")[0]] += (
                new.double() - self.before[name].double()).square().sum()
            self.before[name].copy_(new)
        if squares:
            self._steps.append((list(squares), torch.stack(list(squares.values()))))

    @property
    def total(self) -> float:
        """The distance of all weights."""
        self._add_up()
        return self._total

    @property
    def by_layer(self) -> dict[str, float]:
        """The distance of each layer's weights."""
        self._add_up()
        return dict(self._by_layer)

    def _add_up(self) -> None:
        for layers, squares in self._steps:
            of_layers = squares.tolist()
            self._total += sum(of_layers) ** 0.5
            for layer, square in zip(layers, of_layers):
                self._by_layer[layer] += square ** 0.5
        self._steps = []

    def state_dict(self) -> dict:
        """The sums so far, as plain numbers."""
        return {"total": self.total, "by_layer": self.by_layer, "initial_norm": self.initial_norm}

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state` and the current weights."""
        self._total, self.initial_norm = state["total"], state["initial_norm"]
        self._by_layer = defaultdict(float, state["by_layer"])
        self.restart()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, w) for name, w in self.student.named_parameters() if w.requires_grad)


class Diagnostics:
    """All measures of one run, for its records.

    `out_splits` has one split for each environment, `training` the numbers of the training
    environments, and `read` yields a split's (x, y) in a fixed order, not augmented, on the
    algorithm's device.
    """

    def __init__(self, algorithm: nn.Module, out_splits: list, training: list[int],
                 read: Callable):
        self.algorithm, self.out_splits = algorithm, out_splits
        self.training, self.read = training, read
        self.distance = WeightDistance(algorithm)

    def state_dict(self) -> dict:
        """The sums so far, as plain numbers."""
        return self.distance.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state`; the algorithm must have been restored already."""
        self.distance.load_state_dict(state)

    def measure(self) -> dict:
        """The current measures, by the names that docs/analysis.md explains."""
        streams = checkpoints.random_state()
        self.algorithm.eval()
        with torch.no_grad():
            found = self._of_domains()
        self.algorithm.train()
        checkpoints.set_random_state(streams)
        if self.distance.before:
            found |= {"weight_distance": self.distance.total,
                      "weight_distance_relative": self.distance.total / self.distance.initial_norm,
                      "weight_distance_by_layer": self.distance.by_layer}
        return found

    def _of_domains(self) -> dict:
        found, features, classes, domains = {}, [], [], []
        taught = self.algorithm.teacher_is_ready()
        for i, split in enumerate(self.out_splits):
            seen = defaultdict(list)
            for x, y in itertools.islice(self.read(split), MOST_BATCHES):
                with _features(self.algorithm) as features_of_batch:
                    logits = self.algorithm.predict(x)
                seen["y"].append(y)
                seen["logits"].append(_of_classes(logits))
                seen["features"] += features_of_batch[-1:]
                if taught:
                    seen["teacher"].append(_of_classes(self.algorithm.teacher_logits(x)))
            seen = {name: torch.cat(parts) for name, parts in seen.items() if parts}
            guess = seen["logits"].argmax(dim=1)
            found[f"env{i}_acc"] = _share(guess == seen["y"])
            found[f"env{i}_ece"] = calibration_error(seen["logits"], seen["y"])
            if taught:
                teacher = seen["teacher"].argmax(dim=1)
                found[f"env{i}_teacher_acc"] = _share(teacher == seen["y"])
                found[f"env{i}_teacher_agreement"] = _share(teacher == guess)
            if i in self.training and "features" in seen:
                features.append(seen["features"])
                classes.append(seen["y"])
                domains.append(torch.full_like(seen["y"], len(domains)))
        if features:
            found |= {f"mutual_information_{name}": _information(features, labels)
                      for name, labels in (("class", classes), ("domain", domains))}
        return found


@torch.enable_grad()
def _information(features: list[Tensor], labels: list[Tensor]) -> float:
    """In nats, by a probe trained on every other image of each domain, tested on the rest."""
    def half(parts, start):
        return torch.cat([part[start::2] for part in parts])

    return mutual_information(half(features, 0), half(labels, 0),
                              half(features, 1), half(labels, 1), RIDGE)


@contextlib.contextmanager
def _features(algorithm: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, outputs of featurizers (modules with `n_outputs`) are added to the yielded list."""
    returned: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _, inputs, output: returned.append(output))
               for module in algorithm.modules() if hasattr(module, "n_outputs")]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()


def _of_classes(logits: Tensor) -> Tensor:
    """Logits (B, C); those of two classes, (B, 1), as (B, 2)."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def _share(true: Tensor) -> float:
    return true.double().mean().item()
