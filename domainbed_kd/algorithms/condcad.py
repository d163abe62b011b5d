"""CondCAD: an image's neighbours within its class shall not tell its domain.

Ruan, Dubois & Maddison, "Optimal Representations for Covariate Shift", ICLR 2022,
https://arxiv.org/abs/2201.00057 (conditional contrastive adversarial domain bottleneck). Constants
from DomainBed. Departure: `is_project`, which fails there, works.
"""

import torch

from domainbed_kd.algorithms.cad import CAD


class CondCAD(CAD):
    """Cross-entropy, and how surely a neighbour of the same class is of another domain."""

    mends = False

    def masks(self, same_class, same_domain):
        """Which rows count (B,), which neighbours are sought and among which; (B, B) each."""
        others = same_class & ~torch.eye(len(same_class), device=same_class.device).bool()
        part = others & (~same_domain if self.hparams["is_flipped"] else same_domain)
        return part.any(dim=1), part, others
