"""SD: penalises large logits, so that no feature starves.

Pezeshki et al., "Gradient Starvation: A Learning Proclivity in Neural Networks", NeurIPS 2021,
https://arxiv.org/abs/2011.09468 (spectral decoupling).
"""

import torch
import torch.nn.functional as F

from domainbed_kd.algorithms.base import detached
from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.losses import mean_of_labelled


class SD(ERM):
    """Cross-entropy, and the mean square of the logits instead of weight decay."""

    @staticmethod
    def search_space(dataset):
        """The weight of the logits' square."""
        return {"sd_reg": (0.1, lambda r: 10 ** r.uniform(-5, -1))}

    def update(self, minibatches, unlabeled=None):
        """One step; as in DomainBed, the returned loss is the cross-entropy alone."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        logits = self.predict(x)
        loss = F.cross_entropy(logits, y)
        penalty = mean_of_labelled(logits.square(), y)
        self.descend(loss + self.hparams["sd_reg"] * penalty)
        return detached(loss=loss, penalty=penalty)
