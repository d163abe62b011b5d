"""ERM++: ERM with its head warmed up and its weights averaged.

Teterwak et al., "ERM++: An Improved Baseline for Domain Generalization", WACV 2025,
https://arxiv.org/abs/2304.01973. Constants from DomainBed.
Departures, as in DomainBed: all weights from update 599 on are averaged; the number of steps and
the learning rate are given, unless `train --auto_lr` chooses them on held-out images.
"""

import copy

import torch
import torch.nn.functional as F

from domainbed_kd import averaging
from domainbed_kd.algorithms.base import detached
from domainbed_kd.algorithms.erm import ERM

AVERAGED_FROM = 599  # the first update, counted from 1, whose weights are averaged


class ERMPlusPlus(ERM):
    """ERM that trains its classifier alone at first, and predicts with its averaged weights."""

    no_teachers = "its classifier is trained alone first"

    averages_weights = True
    takes_auto_lr = True

    @staticmethod
    def search_space(dataset):
        """`linear_lr`: the learning rate while the classifier trains alone."""
        return {"linear_lr": (5e-5, lambda r: 10 ** r.uniform(-5, -3.5))}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        if hparams["lars"]:
            raise ValueError(
                "ERMPlusPlus: the hparam lars is true, but DomainBed's LARS optimiser never ran, "
                "so there are no numbers to match. Leave it false: the optimiser is Adam.")
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.linear_optimizer = self.adam(self.classifier, lr=hparams["linear_lr"])
        self.network_sma = copy.deepcopy(self.network).requires_grad_(False)
        self.register_buffer("global_iter", torch.tensor(0))

    @property
    def in_warm_up(self) -> bool:
        """Whether the next update trains the classifier alone."""
        return self.global_iter.item() <= self.hparams["linear_steps"]

    def update(self, minibatches, unlabeled=None):
        """One step, of the classifier alone in the first `linear_steps` + 1 updates."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        all_parts = not self.in_warm_up
        with torch.set_grad_enabled(all_parts):
            features = self.featurizer(x)
        loss = F.cross_entropy(self.classifier(features), y)
        self.step(loss, self.optimizer if all_parts else self.linear_optimizer)
        self._average(x)
        return detached(loss=loss)

    @torch.no_grad()
    def _average(self, x):
        self.global_iter += 1
        n = max(1, self.global_iter.item() - AVERAGED_FROM + 1)
        averaging.add_to_mean(self.network_sma.state_dict(), self.network.state_dict(), n)
        if not self.hparams["freeze_bn"]:
            self.network_sma.train()
            self.network_sma(x)  # updates its BatchNorm statistics by its own features

    def predict(self, x):
        """Logits (B, C) of images (B, ...), by the averaged weights."""
        return self.network_sma(x)
