"""SelfReg: similar logits and features for a class's images, whatever their domain.

Kim et al., "SelfReg: Self-Supervised Contrastive Regularization for Domain Generalization",
ICCV 2021, https://arxiv.org/abs/2104.09841. Constants from DomainBed, whose projection head keeps
its random weights; with the hparam `mended`: true it is trained.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd.algorithms.erm import ERM

FEATURE_WEIGHT = 0.3  # of the features' distances; the logits' weigh 1


def projection(n: int) -> nn.Sequential:
    """From features (B, n) to features (B, n), B > 1 in training."""
    width = n if n == 2048 else 2 * n
    return nn.Sequential(
        nn.Linear(n, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, n), nn.BatchNorm1d(n))


def two_partners(class_sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Two random permutations (B,) of rows sorted by class; both stay within the classes."""
    first, second, start = [], [], 0
    for size in class_sizes:
        first.append(start + torch.randperm(size))
        second.append(start + torch.randperm(size))
        start += size
    return torch.cat(first), torch.cat(second)


class SelfReg(ERM):
    """Cross-entropy, and distances to another image of the class and to a mixture of two.

    As in DomainBed, images are sorted by label with an unstable sort, so the pairs depend on how
    the device orders equal labels.
    """

    rearranges_images = True
    needs_image_labels = "it pairs images of one class"
    mends = True

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.cdpl = projection(self.featurizer.n_outputs)
        if hparams.get("mended"):
            self.optimizer = self.adam(self.network, self.cdpl)
        else:
            self.cdpl.requires_grad_(False)

    def update(self, minibatches, unlabeled=None):
        """One step on CE + min(CE, 1) times the distances."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        share = np.random.beta(0.5, 0.5)
        y, order = y.sort()
        class_sizes = y.bincount().tolist()
        features = self.featurizer(x[order])
        projected, logits = self.cdpl(features), self.classifier(features)
        first, second = (partner.to(y.device) for partner in two_partners(class_sizes))

        def distance(partners):
            """The distance of logits and features to the partners'; a scalar."""
            return (F.mse_loss(logits, partners(logits))
                    + FEATURE_WEIGHT * F.mse_loss(features, partners(projected)))

        in_class = distance(lambda rows: rows[first])
        mixed = distance(lambda rows: share * rows[first] + (1 - share) * rows[second])
        classify = F.cross_entropy(logits, y)
        scale = classify.detach().clamp(max=1)
        return self.descend(classify + scale * (share * in_class + (1 - share) * mixed))
