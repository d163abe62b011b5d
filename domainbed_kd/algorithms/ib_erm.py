"""IB_ERM: ERM with an information bottleneck, features that vary little.

Ahuja et al., "Invariance Principle Meets Information Bottleneck for Out-of-Distribution
Generalization", NeurIPS 2021, https://arxiv.org/abs/2106.06607. Constants and annealing from
DomainBed, where the term `nll` equals `loss`, penalty included; with the hparam `mended`: true it
is the cross-entropy alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.annealed import Annealed
from domainbed_kd.losses import per_domain


def feature_variance(features: Tensor) -> Tensor:
    """Variance of features (B, D) over the batch, averaged over the features; a scalar."""
    return features.var(dim=0).mean()


class IB_ERM(Annealed):
    """Mean cross-entropy of the domains, and the mean variance of their features."""

    needs_image_labels = "it takes the variance of one vector per image"
    mends = True

    @staticmethod
    def search_space(dataset):
        """The variance's weight, and how many updates it stays at 0."""
        return {
            "ib_lambda": (1e2, lambda r: 10 ** r.uniform(-1, 5)),
            "ib_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
        }

    def update(self, minibatches, unlabeled=None):
        """One step on the penalized loss."""
        images, labels = zip(*minibatches)
        sizes = [len(y) for y in labels]
        features = self.featurizer(torch.cat(images))
        logits = self.classifier(features).split(sizes)
        nll = per_domain(F.cross_entropy, logits, labels).mean()
        bottleneck = per_domain(feature_variance, features.split(sizes)).mean()
        loss = nll + bottleneck * self.penalty_weight(
            self.hparams["ib_penalty_anneal_iters"], 0.0, self.hparams["ib_lambda"])
        self.update_count += 1
        return self.descend(
            loss, nll=nll if self.hparams.get("mended") else loss, IB_penalty=bottleneck)
