"""ANDMask: step only where the domains' gradients agree in sign.

Parascandolo et al., "Learning Explanations that Are Hard to Vary", ICLR 2021,
https://arxiv.org/abs/2009.00329. Constants from DomainBed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.base import between
from domainbed_kd.algorithms.erm import ERM


def agreement(gradients: Tensor) -> Tensor:
    """How far gradients (D, ...) of D domains agree in sign, entry by entry; in [0, 1]."""
    return gradients.sign().mean(dim=0).abs()


def masked_mean(gradients: Tensor, mask: Tensor) -> Tensor:
    """The domains' mean gradient, masked, and rescaled by the share of entries that are left.

    Args:
        gradients: (D, ...), one per domain.
        mask: (...), in [0, 1].
    """
    return mask * gradients.mean(dim=0) * (1 / (1e-10 + mask.mean()))


class ANDMask(ERM):
    """Mean cross-entropy of the domains, whose gradient is 0 where too few domains agree."""

    no_teachers = "it masks the domains' gradients, and descends no loss"

    takes = ERM.takes | {"tau": between(0, 1)}

    @staticmethod
    def search_space(dataset):
        """`tau`: the least agreement in sign of an entry that is kept."""
        return {"tau": (1, lambda r: r.uniform(0.5, 1.0))}

    def mask(self, gradients: Tensor) -> Tensor:
        """Which entries (...) of the domains' gradients (D, ...) are kept."""
        return (agreement(gradients) >= self.hparams["tau"]).to(gradients.dtype)

    def update(self, minibatches, unlabeled=None):
        """One step on the masked gradient."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        losses, gradients = [], []
        for x, y in minibatches:
            loss = F.cross_entropy(self.network(x), y)
            gradients.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
            losses.append(loss.detach())
        self.optimizer.zero_grad()
        for parameter, *of_domains in zip(parameters, *gradients):
            stacked = torch.stack(of_domains)
            parameter.grad = masked_mean(stacked, self.mask(stacked))
        self.optimizer.step()
        return {"loss": sum(loss.double() for loss in losses) / len(losses)}
