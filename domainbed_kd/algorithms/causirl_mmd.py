"""CausIRL with MMD's distance: features that do not depend on the mix of domains.

Chevalley et al., "Invariant Causal Mechanisms through Distribution Matching", 2022,
https://arxiv.org/abs/2206.11646. Constants from DomainBed.
"""

from domainbed_kd.algorithms.causirl_coral import CausIRL_CORAL
from domainbed_kd.losses import squared_mmd


class CausIRL_MMD(CausIRL_CORAL):
    """Mean cross-entropy of the domains, and the MMD of two random mixtures of them."""

    distance = staticmethod(squared_mmd)
