"""MMD: equalises the mean of the domains' features in a Gaussian kernel's space.

Li et al., "Domain Generalization with Adversarial Feature Learning", CVPR 2018, for the maximum
mean discrepancy of Gretton et al., "A Kernel Two-Sample Test", JMLR 2012. Bandwidths from
DomainBed; no adversary.
"""

from domainbed_kd.algorithms.coral import CORAL
from domainbed_kd.losses import squared_mmd


class MMD(CORAL):
    """Mean cross-entropy of the domains, and the discrepancy of their features."""

    distance = staticmethod(squared_mmd)
