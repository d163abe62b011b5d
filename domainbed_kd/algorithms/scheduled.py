"""A learning rate that falls over the run, on top of any algorithm: the hparam `schedule`.

step: divided by 10 after each share of the run in `schedule_drops`, by default after four fifths.
cosine: Loshchilov & Hutter, "SGDR", ICLR 2017, https://arxiv.org/abs/1608.03983, equation 5
without restarts, down to 0 at the end of the run.
"""

import math
from collections.abc import Sequence

import torch

from domainbed_kd import checkpoints, networks
from domainbed_kd.algorithms.base import Takes, between

DROPS = (0.8,)
TAKES = {"schedule_drops": Takes(
    lambda value: isinstance(value, list) and all(map(between(0, 1).fits, value)),
    "a list of shares of the run, such as [0.8]")}


def factor(kind: str, step: int, n_steps: int, drops: Sequence[float] = DROPS) -> float:
    """The factor of lr, in [0, 1], in update `step` of a run, counted from 0."""
    if kind == "cosine":
        return (1 + math.cos(math.pi * min(step / n_steps, 1))) / 2
    return 0.1 ** sum(step >= int(drop * n_steps) for drop in drops) if kind == "step" else 1.0


class Scheduled:
    """An Algorithm whose every optimiser follows the schedule; mixed in by `composed.assembled`.

    Raises:
        ValueError: if it has a schedule of its own.
    """

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.drops = hparams.get("schedule_drops", DROPS)
        if any(isinstance(found, torch.optim.lr_scheduler.LRScheduler)
               for found in checkpoints.optimizers(self).values()):
            raise ValueError(f"{self.shown_name()} has a schedule of its own: leave out the hparam "
                             "schedule.")
        self.schedule = networks.CountsOnCPU()
        self.schedule.register_buffer("steps", torch.tensor(0))

    def update(self, minibatches, unlabeled=None):
        """The algorithm's update at the learning rate of its step."""
        share = factor(self.hparams["schedule"], self.schedule.steps.item(), self.total_steps,
                       self.drops)
        for found in checkpoints.optimizers(self).values():
            for group in found.param_groups:
                group["lr"] = share * group.setdefault("initial_lr", group["lr"])
        self.schedule.steps += 1
        return super().update(minibatches, unlabeled)
