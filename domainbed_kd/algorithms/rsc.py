"""RSC: train on the features that are left when the most predictive ones are muted.

Huang et al., "Self-Challenging Improves Cross-Domain Generalization", ECCV 2020,
https://arxiv.org/abs/2007.02454. Constants from DomainBed.
Departures, as in DomainBed: muting is on the final feature vector only, not on positions of the
last feature map; images outside the batch percentage keep exactly the features of theirs that
muting leaves.
"""

import torch
import torch.nn.functional as F

from domainbed_kd.algorithms.erm import ERM


class RSC(ERM):
    """Cross-entropy with features muted where the true class's score is steepest.

    An image's `rsc_f_drop_factor` of features with the largest gradients are muted, in the
    `rsc_b_drop_factor` of the batch whose true class loses most probability by it.
    """

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
        steep = gradient.quantile(1 - self.hparams["rsc_f_drop_factor"], dim=1, keepdim=True)
        keep_feature = gradient < steep  # (B, D)

        with torch.no_grad():
            muted = self.classifier(features * keep_feature)
            loss_of_true = (logits.softmax(1) - muted.softmax(1)).gather(1, true)
        most = loss_of_true.quantile(1 - self.hparams["rsc_b_drop_factor"])
        keep = keep_feature | (loss_of_true < most)
        return self.descend(F.cross_entropy(self.classifier(features * keep), y))
