"""CondCAD: features whose neighbours within the class do not reveal the domain.

Ruan, Dubois & Maddison, "Optimal Representations for Covariate Shift", ICLR 2022,
https://arxiv.org/abs/2201.00057 (conditional contrastive adversarial domain bottleneck). Constants
from DomainBed. Departure: `is_project`, which fails there, works.
"""

import torch

from domainbed_kd.algorithms.cad import CAD


class CondCAD(CAD):
    """Cross-entropy, and the probability that a neighbour of the class is of another domain."""

    mends = False

    def masks(self, same_class, same_domain):
        """The rows that count (B,), the neighbours sought (B, B) and those compared (B, B)."""
        others = same_class & ~torch.eye(len(same_class), device=same_class.device).bool()
        part = others & (~same_domain if self.hparams["is_flipped"] else same_domain)
        return part.any(dim=1), part, others
