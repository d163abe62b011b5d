"""CORAL: equalises mean and covariance of the domains' features.

Sun & Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation", ECCV 2016 Workshops,
https://arxiv.org/abs/1607.01719. Departures, as in DomainBed: means are aligned too, and all pairs
of training domains are.
"""

import itertools

import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.base import detached
from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.losses import moment_distance


class CORAL(ERM):
    """Mean cross-entropy of the domains, and the distance of their features' moments."""

    needs_image_labels = "it compares the moments of one vector per image"
    distance = staticmethod(moment_distance)

    @staticmethod
    def search_space(dataset):
        """The weight of the distance."""
        return {"mmd_gamma": (1.0, lambda r: 10 ** r.uniform(-1, 1))}

    def penalty(self, features: list[Tensor]) -> Tensor:
        """The mean distance over all pairs of domains' features (B, D); 0 for one domain."""
        distances = [self.distance(a, b) for a, b in itertools.combinations(features, 2)]
        return sum(distances) / len(distances) if distances else features[0].new_zeros(())

    def update(self, minibatches, unlabeled=None):
        """One step; as in DomainBed, the returned loss is the cross-entropy alone."""
        features = [self.featurizer(x) for x, _ in minibatches]
        loss = sum(F.cross_entropy(self.classifier(f), y)
                   for f, (_, y) in zip(features, minibatches)) / len(minibatches)
        penalty = self.penalty(features)
        self.descend(loss + self.hparams["mmd_gamma"] * penalty)
        return detached(loss=loss, penalty=penalty)
