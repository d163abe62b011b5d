"""SWAD's loss valley: which segments of training are averaged.

Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021,
https://arxiv.org/abs/2102.08604. Constants and the order of events from the authors' code
(github.com/khanrc/swad).
"""

import warnings
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def add_to_mean(mean: dict[str, Tensor], new: dict[str, Tensor], n: float) -> None:
    """Turns the mean of n - 1 state dicts into that of n, in place; integers are the new ones."""
    moved = [name for name, tensor in new.items() if n > 1 and tensor.is_floating_point()]
    if moved:  # a few kernels on a GPU
        torch._foreach_lerp_([mean[name] for name in moved],
                             [new[name].to(mean[name].dtype) for name in moved], 1 / n)
    for name in new.keys() - set(moved):
        mean[name].copy_(new[name])


# The version of the rules by which segments are averaged; no run may mix two.
_RULES = 2


@dataclass
class Segment:
    """The mean weights after steps `start` to `end`, and the live network's loss after `end`."""

    weights: dict[str, Tensor]
    start: int
    end: int
    loss: float


class LossValley(nn.Module):
    """Finds the segments that SWAD averages, by their validation losses, during training.

    Training has converged at the end of a segment if none of the next `n_converge` - 1 has a lower
    loss. The valley lasts until the lowest of `n_tolerance` successive losses is above
    1 + `tolerance_ratio` times the mean loss at convergence. All segments have the same weight,
    whatever their length. As in the authors' code, segments around convergence can count more than
    once, and the segment that converged is the result only if none is added after it. `averaged`
    lists the (start, end) steps of all that were added, in order.

    It holds at most `n_tolerance` segments and their average, on the CPU. Its whole state is in the
    state dict, as plain numbers and tensors.

    Raises:
        ValueError: if not 1 <= n_converge <= n_tolerance, or if tolerance_ratio is negative.
    """

    def __init__(self, n_converge: int = 3, n_tolerance: int = 6, tolerance_ratio: float = 0.3):
        super().__init__()
        if not 1 <= n_converge <= n_tolerance or tolerance_ratio < 0:
            raise ValueError(
                f"SWAD: n_converge is {n_converge}, n_tolerance {n_tolerance}, tolerance_ratio "
                f"{tolerance_ratio}. Choose 1 <= n_converge <= n_tolerance and a ratio >= 0.")
        self.n_converge = n_converge
        self.n_tolerance = n_tolerance
        self.tolerance_ratio = tolerance_ratio
        self.segments: deque[Segment] = deque(maxlen=n_tolerance)
        self.converged_at: int | None = None
        self.threshold: float | None = None
        self.dead = False
        self.mean: dict[str, Tensor] = {}
        self.averaged: list[tuple[int, int]] = []

    def add(self, segment: Segment) -> None:
        """Takes the next segment; a valley that has ended ignores it."""
        if self.dead:
            return
        self.segments.append(segment)
        if self.converged_at is None:
            self._try_to_converge()
        elif self.segments[0].end >= self.converged_at:
            if self._lowest_loss() > self.threshold:
                self.dead = True
            else:
                self._average(self.segments[0])

    def finish(self) -> dict[str, Tensor]:
        """Returns the averaged weights at the end of training, and releases all segments.

        Without convergence they are the last segment's, with a warning.
        """
        if self.converged_at is None:
            warnings.warn(
                "SWAD: the validation loss never converged, so the last segment is the model. "
                "Train longer or lower swad_interval.", stacklevel=2)
            self._average(self.segments[-1])
        elif not self.dead:
            self.segments.popleft()
            while self.segments and self._lowest_loss() <= self.threshold:
                self._average(self.segments.popleft())
        self.segments.clear()
        mean, self.mean = self.mean, {}
        return mean

    def _try_to_converge(self) -> None:
        latest = list(self.segments)[-self.n_converge:]
        losses = [segment.loss for segment in latest]
        if len(latest) < self.n_converge or losses[0] > min(losses):
            return
        self.converged_at = latest[0].end
        self.threshold = sum(losses) / len(losses) * (1 + self.tolerance_ratio)
        self.mean = {name: tensor.clone() for name, tensor in latest[0].weights.items()}
        before = list(self.segments)[:self.n_tolerance - self.n_converge + 1]
        above = [i for i, segment in enumerate(before) if segment.loss > self.threshold]
        first = above[-1] + 1 if above else 0
        for segment in before[first + 1:]:
            self._average(segment)

    def _lowest_loss(self) -> float:
        return min(segment.loss for segment in self.segments)

    def _average(self, segment: Segment) -> None:
        self.averaged.append((segment.start, segment.end))
        if len(self.averaged) == 1:  # replaces the segment that converged
            self.mean = {name: tensor.clone() for name, tensor in segment.weights.items()}
        else:
            add_to_mean(self.mean, segment.weights, len(self.averaged))

    def get_extra_state(self) -> dict:
        """Everything that a resumed run needs, for torch to save."""
        return {
            "rules": _RULES,
            "segments": [dict(vars(segment)) for segment in self.segments],
            "converged_at": self.converged_at,
            "threshold": self.threshold,
            "dead": self.dead,
            "mean": dict(self.mean),
            "averaged": list(self.averaged),
        }

    def set_extra_state(self, state: dict) -> None:
        """The inverse of `get_extra_state`."""
        finished = state["averaged"] and not state["segments"]
        if state.get("rules") != _RULES and not finished:
            raise ValueError("SWAD: this run was begun by a version that averaged other segments, "
                             "so it cannot continue. Start it again: --resume never.")
        self.segments = deque(
            (Segment(**segment) for segment in state["segments"]), maxlen=self.n_tolerance)
        self.converged_at = state["converged_at"]
        self.threshold = state["threshold"]
        self.dead = state["dead"]
        self.mean = {name: tensor.clone() for name, tensor in state["mean"].items()}
        self.averaged = list(state["averaged"])
