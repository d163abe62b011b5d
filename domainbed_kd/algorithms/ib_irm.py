"""IB_IRM: IRM with an information bottleneck, features that vary little.

Ahuja et al., "Invariance Principle Meets Information Bottleneck for Out-of-Distribution
Generalization", NeurIPS 2021, https://arxiv.org/abs/2106.06607. Constants and annealing from
DomainBed, where the term `nll` equals `loss`, penalties included; with the hparam `mended`: true
it is the cross-entropy alone.
"""

import torch
import torch.nn.functional as F

from domainbed_kd.algorithms.annealed import Annealed
from domainbed_kd.algorithms.ib_erm import IB_ERM, feature_variance
from domainbed_kd.algorithms.irm import IRM
from domainbed_kd.losses import invariance_penalty, per_domain


class IB_IRM(Annealed):
    """Cross-entropy, invariance penalty and feature variance, each the mean over the domains."""

    needs_image_labels = "it takes the variance of one vector per image"
    mends = True

    @staticmethod
    def search_space(dataset):
        """Weight and start of the invariance penalty (IRM's) and of the variance (IB_ERM's)."""
        return IRM.search_space(dataset) | IB_ERM.search_space(dataset)

    def update(self, minibatches, unlabeled=None):
        """One step on the penalized loss."""
        images, labels = zip(*minibatches)
        sizes = [len(y) for y in labels]
        features = self.featurizer(torch.cat(images))
        logits = self.classifier(features).split(sizes)
        nll = per_domain(F.cross_entropy, logits, labels).mean()
        invariance = per_domain(invariance_penalty, logits, labels).mean()
        bottleneck = per_domain(feature_variance, features.split(sizes)).mean()
        loss = nll + invariance * self.penalty_weight(
            self.hparams["irm_penalty_anneal_iters"], 1.0, self.hparams["irm_lambda"])
        loss = loss + bottleneck * self.penalty_weight(
            self.hparams["ib_penalty_anneal_iters"], 0.0, self.hparams["ib_lambda"])
        self.update_count += 1
        return self.descend(loss, nll=nll if self.hparams.get("mended") else loss,
                            IRM_penalty=invariance, IB_penalty=bottleneck)
