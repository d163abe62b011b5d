"""IRM: one classifier that is optimal for every domain at once.

Arjovsky et al., "Invariant Risk Minimization", 2019, https://arxiv.org/abs/1907.02893 (IRMv1).
The unbiased penalty and the annealing are the authors' and DomainBed's.
"""

import torch
import torch.nn.functional as F

from domainbed_kd.algorithms.annealed import Annealed
from domainbed_kd.losses import invariance_penalty, per_domain


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
        images, labels = zip(*minibatches)
        logits = self.network(torch.cat(images)).split([len(y) for y in labels])
        nll = per_domain(F.cross_entropy, logits, labels).mean()
        penalty = per_domain(invariance_penalty, logits, labels).mean()
        weight = self.penalty_weight(
            self.hparams["irm_penalty_anneal_iters"], 1.0, self.hparams["irm_lambda"])
        self.update_count += 1
        return self.descend(nll + weight * penalty, nll=nll, penalty=penalty)
