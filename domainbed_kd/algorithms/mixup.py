"""Mixup: train on weighted means of images from two domains.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
https://arxiv.org/abs/1710.09412; between domains, as in Yan et al., "Improve Unsupervised Domain
Adaptation with Mixup Training", 2020, https://arxiv.org/abs/2001.00677.
"""

import numpy as np
import torch
import torch.nn.functional as F

from domainbed_kd.algorithms.erm import ERM


def cyclic_pairs(minibatches: list) -> list:
    """Pairs of each minibatch with the next, in a random cyclic order."""
    order = torch.randperm(len(minibatches)).tolist()
    return [(minibatches[i], minibatches[j]) for i, j in zip(order, order[1:] + order[:1])]


class Mixup(ERM):
    """Cross-entropy of mixed images with both labels, weighted in the images' proportion."""

    rearranges_images = True

    @staticmethod
    def search_space(dataset):
        """Alpha of the Beta distribution that proportions are drawn from."""
        return {"mixup_alpha": (0.2, lambda r: 10 ** r.uniform(-1, 1))}

    def update(self, minibatches, unlabeled=None):
        """One step on the mean over the pairs."""
        loss = 0
        for (xi, yi), (xj, yj) in cyclic_pairs(minibatches):
            n = min(len(xi), len(xj))
            share = np.random.beta(self.hparams["mixup_alpha"], self.hparams["mixup_alpha"])
            logits = self.predict(share * xi[:n] + (1 - share) * xj[:n])
            loss += share * F.cross_entropy(logits, yi[:n])
            loss += (1 - share) * F.cross_entropy(logits, yj[:n])
        return self.descend(loss / len(minibatches))
