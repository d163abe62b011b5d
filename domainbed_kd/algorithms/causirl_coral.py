"""CausIRL with CORAL's distance: features that do not depend on the mix of domains.

Chevalley et al., "Invariant Causal Mechanisms through Distribution Matching", 2022,
https://arxiv.org/abs/2206.11646. Constants from DomainBed.
"""

import numpy as np
import torch
from torch import Tensor

from domainbed_kd.algorithms.coral import CORAL


def random_mixtures(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Cuts each domain's features (B, D) at a random row; joins the first parts, and the others.

    The cuts, one per domain, are drawn from NumPy's global stream, from 0 to B - 1.
    """
    cuts = [np.random.randint(0, len(f)) for f in features]
    return (torch.cat([f[:cut] for f, cut in zip(features, cuts)]),
            torch.cat([f[cut:] for f, cut in zip(features, cuts)]))


class CausIRL_CORAL(CORAL):
    """Mean cross-entropy of the domains, and the distance between two random mixtures of them."""

    def penalty(self, features):
        """The distance between two random mixtures; 0 if one of them has fewer than two rows."""
        a, b = random_mixtures(features)
        return self.distance(a, b) if min(len(a), len(b)) > 1 else a.new_zeros(())
