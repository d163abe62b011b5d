"""RSC: train on the features that remain when the most predictive ones are muted.

Huang et al., "Self-Challenging Improves Cross-Domain Generalization", ECCV 2020,
https://arxiv.org/abs/2007.02454. Constants from DomainBed.
Departure, as in DomainBed: features of the final vector are muted, not positions of the last
feature map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.base import between
from domainbed_kd.algorithms.erm import ERM


def percentile(values: Tensor, q: float) -> Tensor:
    """The q-th percentile of each row of values (..., N), linearly interpolated; (..., 1).

    As NumPy does for float32, the rank is computed in double precision. `torch.quantile` rounds it
    to float32, and then misses values that it should hit exactly, for example with 64 images.
    """
    ordered = values.sort(dim=-1).values
    rank = (values.shape[-1] - 1) * (q / 100)
    below = math.floor(rank)
    low = ordered[..., below:below + 1]
    high = ordered[..., below + 1:below + 2] if below + 1 < values.shape[-1] else low
    share = rank - below
    if share < 0.5:
        return low + (high - low) * share
    return high - (high - low) * (1 - share)


class RSC(ERM):
    """Cross-entropy without the features by which the true class's score grows fastest.

    Muted are the `rsc_f_drop_factor` of an image's features with the largest gradients, in the
    `rsc_b_drop_factor` of the batch whose true class loses the most probability by it.
    """

    no_teachers = "its classifier looks at each image more than once"
    needs_image_labels = "it mutes features by the score of an image's class"
    takes = ERM.takes | {"rsc_f_drop_factor": between(0, 1), "rsc_b_drop_factor": between(0, 1)}

    @staticmethod
    def search_space(dataset):
        """Shares, in [0, 1], of features and of images to mute."""
        return {
            "rsc_f_drop_factor": (1 / 3, lambda r: r.uniform(0, 0.5)),
            "rsc_b_drop_factor": (1 / 3, lambda r: r.uniform(0, 0.5)),
        }

    def update(self, minibatches, unlabeled=None):
        """One step on the cross-entropy of the muted features."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        features = self.featurizer(x)
        logits = self.classifier(features)
        true = y[:, None]

        score = logits.gather(1, true).sum()
        gradient, = torch.autograd.grad(score, features, retain_graph=True)
        steep = percentile(gradient, (1 - self.hparams["rsc_f_drop_factor"]) * 100)
        keep_feature = gradient < steep  # (B, D)

        with torch.no_grad():
            muted = self.classifier(features * keep_feature)
            loss_of_true = (logits.softmax(1) - muted.softmax(1)).gather(1, true)  # (B, 1)
        most = percentile(loss_of_true.T, (1 - self.hparams["rsc_b_drop_factor"]) * 100)
        keep = keep_feature | (loss_of_true < most)
        return self.descend(F.cross_entropy(self.classifier(features * keep), y))
