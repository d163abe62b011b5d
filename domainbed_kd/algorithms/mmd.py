"""MMD: the domains' features shall have the same mean in a Gaussian kernel's space.

Li et al., "Domain Generalization with Adversarial Feature Learning", CVPR 2018, for the maximum
mean discrepancy of Gretton et al., "A Kernel Two-Sample Test", JMLR 2012. Bandwidths from
DomainBed; no adversary.
"""

import torch
from torch import Tensor

from domainbed_kd.algorithms.coral import CORAL

BANDWIDTHS = (0.001, 0.01, 0.1, 1, 10, 100, 1000)


def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the bandwidths g of exp(-g |a_i - b_j|^2); (A, B) of (A, D) and (B, D)."""
    aa, bb = a.square().sum(dim=1, keepdim=True), b.square().sum(dim=1)
    # |b|^2 - 2ab + |a|^2 can fall below 0 by rounding.
    squared = (torch.addmm(bb, a, b.T, alpha=-2) + aa).clamp(min=1e-30)
    return sum(torch.exp(-gamma * squared) for gamma in BANDWIDTHS)


def squared_mmd(a: Tensor, b: Tensor) -> Tensor:
    """The biased estimate of the squared maximum mean discrepancy of (A, D) and (B, D)."""
    return (gaussian_kernel(a, a).mean() + gaussian_kernel(b, b).mean()
            - 2 * gaussian_kernel(a, b).mean())


class MMD(CORAL):
    """Mean cross-entropy of the domains, and the discrepancy of their features."""

    distance = staticmethod(squared_mmd)
