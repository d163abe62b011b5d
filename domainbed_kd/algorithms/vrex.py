"""VREx: equalises the risk across domains.

Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation", ICML 2021,
https://arxiv.org/abs/2003.00688. Annealing from DomainBed.
"""

import torch
import torch.nn.functional as F

from domainbed_kd.algorithms.annealed import Annealed
from domainbed_kd.losses import per_domain


class VREx(Annealed):
    """Mean cross-entropy of the domains, and its variance over them."""

    @staticmethod
    def search_space(dataset):
        """The variance's weight, and how many updates it stays at 1."""
        return {
            "vrex_lambda": (1e1, lambda r: 10 ** r.uniform(-1, 5)),
            "vrex_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
        }

    def update(self, minibatches, unlabeled=None):
        """One step; as in DomainBed, `nll` is that of the last domain."""
        images, labels = zip(*minibatches)
        logits = self.network(torch.cat(images)).split([len(y) for y in labels])
        losses = per_domain(F.cross_entropy, logits, labels)
        penalty = losses.var(correction=0)
        weight = self.penalty_weight(
            self.hparams["vrex_penalty_anneal_iters"], 1.0, self.hparams["vrex_lambda"])
        self.update_count += 1
        return self.descend(losses.mean() + weight * penalty, nll=losses[-1], penalty=penalty)
