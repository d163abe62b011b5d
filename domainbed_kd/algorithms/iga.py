"""IGA: makes the domains' gradients the same.

Koyama & Yamaguchi, "When Is Invariance Useful in an Out-of-Distribution Generalization Problem?",
2020, https://arxiv.org/abs/2008.01883 (inter-environmental gradient alignment). Constants from
DomainBed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.base import at_least, detached
from domainbed_kd.algorithms.erm import ERM


def gradient_spread(gradients: list[tuple[Tensor, ...]], mean: tuple[Tensor, ...]) -> Tensor:
    """Sum of the squared distances of the domains' gradients to their mean.

    A gradient is a tuple of tensors, one per parameter. The mean may be detached: the gradient of
    the sum is the same.
    """
    return sum((g - m).square().sum() for of_domain in gradients for g, m in zip(of_domain, mean))


class IGA(ERM):
    """Mean cross-entropy of the domains, and the spread of its gradients."""

    takes = ERM.takes | {"penalty": at_least(0)}

    @staticmethod
    def search_space(dataset):
        """`penalty`: weight of the spread."""
        return {"penalty": (1000, lambda r: 10 ** r.uniform(1, 5))}

    def update(self, minibatches, unlabeled=None):
        """One step; as in DomainBed, the returned loss is the cross-entropy alone."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        losses = [F.cross_entropy(self.network(x), y) for x, y in minibatches]
        gradients = [torch.autograd.grad(
            of_domain, parameters, create_graph=True, materialize_grads=True)
            for of_domain in losses]
        loss = sum(losses) / len(losses)
        mean = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        penalty = gradient_spread(gradients, mean)
        self.descend(loss + self.hparams["penalty"] * penalty)
        return detached(loss=loss, penalty=penalty)
