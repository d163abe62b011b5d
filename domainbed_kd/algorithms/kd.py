"""KD: cross-entropy with the labels and with a trained network's soft predictions.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", NIPS Deep Learning
Workshop 2014, https://arxiv.org/abs/1503.02531. The plain baseline of every distillation method
here: same teacher, same student, nothing else.
"""

import torch.nn.functional as F

from domainbed_kd.algorithms.base import above, between
from domainbed_kd.algorithms.taught import Taught
from domainbed_kd.losses import kd_loss


class KD(Taught):
    """A mix of cross-entropy with the labels and divergence from the teacher."""

    takes = Taught.takes | {"kd_alpha": between(0, 1), "kd_temperature": above(0)}

    @staticmethod
    def search_space(dataset):
        """Weight of the teacher's share, and the temperature that softens both predictions."""
        return Taught.search_space(dataset) | {
            "kd_alpha": (0.5, lambda r: r.uniform(0.1, 0.9)),
            "kd_temperature": (4.0, lambda r: r.choice([1.0, 2.0, 4.0, 8.0])),
        }

    def distill(self, x, y):
        """One step on (1 - alpha) CE + alpha KD."""
        logits = self.network(x)
        classify = F.cross_entropy(logits, y)
        alpha = self.hparams["kd_alpha"]
        if alpha == 0:
            return self.descend(classify, classify=classify)
        distill = kd_loss(logits, self.teacher_logits(x), self.hparams["kd_temperature"], y)
        return self.descend(
            (1 - alpha) * classify + alpha * distill, classify=classify, distill=distill)
