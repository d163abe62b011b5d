"""CDANN: within each class, features from which a discriminator cannot tell the domain.

Li et al., "Deep Domain Generalization via Conditional Invariant Adversarial Networks", ECCV 2018,
https://openaccess.thecvf.com/content_ECCV_2018/html/Ya_Li_Deep_Domain_Generalization_ECCV_2018_paper.html.
Constants and the order of turns from DomainBed.
Departures, as in DomainBed: one discriminator, which gets the class as a learned embedding added to
the features, instead of one discriminator per class and one for all classes.
"""

import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.dann import DANN


def class_balanced_cross_entropy(logits: Tensor, domains: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the domains, to which each class in the batch contributes equally.

    It is the mean of the classes' means if all classes up to the highest label are present.

    Args:
        logits: (B, n_domains).
        domains: (B,), the images' own domains.
        y: (B,), the images' classes.
    """
    in_class = (y[:, None] == y).sum(dim=1)  # a bincount would wait for a GPU
    weights = 1 / (in_class * (y.max() + 1))
    return (weights * F.cross_entropy(logits, domains, reduction="none")).sum()


class CDANN(DANN):
    """DANN with a discriminator that knows the class and weighs classes equally."""

    def discriminator_input(self, features, y):
        """Features plus their class's embedding, (B, D)."""
        return features + self.class_embeddings(y)

    def discriminator_loss(self, logits, domains, y):
        """Class-balanced cross-entropy of the domains, a scalar."""
        return class_balanced_cross_entropy(logits, domains, y)
