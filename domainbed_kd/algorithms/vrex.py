"""VREx: the domains shall have the same risk.

Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation", ICML 2021,
https://arxiv.org/abs/2003.00688. Annealing from DomainBed.
"""

import torch
import torch.nn.functional as F

from domainbed_kd.algorithms.annealed import Annealed


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
        logits = self.network(torch.cat([x for x, _ in minibatches]))
        losses = torch.stack([
            F.cross_entropy(z, y)
            for z, (_, y) in zip(logits.split([len(x) for x, _ in minibatches]), minibatches)])
        penalty = losses.var(correction=0)
        weight = self.penalty_weight(
            self.hparams["vrex_penalty_anneal_iters"], 1.0, self.hparams["vrex_lambda"])
        self.update_count += 1
        return self.descend(losses.mean() + weight * penalty, nll=losses[-1], penalty=penalty)
