"""IRM: one classifier that is the best for every domain at once.

Arjovsky et al., "Invariant Risk Minimization", 2019, https://arxiv.org/abs/1907.02893 (IRMv1).
The unbiased penalty and the annealing are the authors' and DomainBed's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.annealed import Annealed


def invariance_penalty(logits: Tensor, y: Tensor) -> Tensor:
    """The squared gradient of the loss by a scale of the logits, estimated without bias.

    The product of the gradients on even and odd rows of logits (B, C); it may be negative.
    """
    scale = torch.ones((), device=logits.device, requires_grad=True)
    gradients = [
        torch.autograd.grad(
            F.cross_entropy(logits[half::2] * scale, y[half::2]), scale, create_graph=True)[0]
        for half in (0, 1)]
    return gradients[0] * gradients[1]


class IRM(Annealed):
    """Mean cross-entropy of the domains, and the mean of their invariance penalties."""

    @staticmethod
    def search_space(dataset):
        """The penalty's weight, and how many updates it stays at 1."""
        return {
            "irm_lambda": (1e2, lambda r: 10 ** r.uniform(-1, 5)),
            "irm_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
        }

    def update(self, minibatches, unlabeled=None):
        """One step on the penalized loss."""
        logits = self.network(torch.cat([x for x, _ in minibatches]))
        per_domain = logits.split([len(x) for x, _ in minibatches])
        labels = [y for _, y in minibatches]
        nll = torch.stack(
            [F.cross_entropy(z, y) for z, y in zip(per_domain, labels)]).mean()
        penalty = torch.stack(
            [invariance_penalty(z, y) for z, y in zip(per_domain, labels)]).mean()
        weight = self.penalty_weight(
            self.hparams["irm_penalty_anneal_iters"], 1.0, self.hparams["irm_lambda"])
        self.update_count += 1
        return self.descend(nll + weight * penalty, nll=nll, penalty=penalty)
