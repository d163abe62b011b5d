"""EQRM: minimise a quantile of the risk over domains, so that it is small in most of them.

Eastwood et al., "Probable Domain Generalization via Quantile Risk Minimization", NeurIPS 2022,
https://arxiv.org/abs/2207.09944. Constants from DomainBed. There, Adam starts afresh, with
`eqrm_lr`, at the update that equals `eqrm_burnin_iters`. Random draws of that are not integers, so
it never does. With the hparam `mended`: true it starts afresh at the next integer.
Departure: the quantile of one domain's risk is that risk, where DomainBed's is NaN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.annealed import Annealed
from domainbed_kd.algorithms.base import at_least

BISECTIONS = 32


def kde_quantile(risks: Tensor, alpha: Tensor) -> Tensor:
    """The alpha-quantile of a Gaussian kernel density estimate of risks (D,), D >= 2.

    The bandwidth is 1.06 std D^(-1/5), Silverman's rule. The quantile, float64, is found by
    bisection. Its gradient is that of the interval's ends; the bisection's decisions are constant.
    """
    risks = risks.sort().values
    bandwidth = (1.06 * risks.std() * len(risks) ** -0.2).double()
    risks = risks.double()
    reach = bandwidth * math.sqrt(2) * torch.erfinv(2 * alpha - 1)
    low, high = risks[0] + reach, risks[-1] + reach
    with torch.no_grad():
        left, right = torch.zeros_like(low), torch.ones_like(low)
        for _ in range(BISECTIONS):
            middle = (left + right) / 2
            z = (torch.lerp(low, high, middle) - risks) / bandwidth
            beyond = torch.special.ndtr(z).mean() > alpha
            left, right = torch.where(beyond, left, middle), torch.where(beyond, middle, right)
    return torch.lerp(low, high, (left + right) / 2)


class EQRM(Annealed):
    """The mean risk of the domains, and after some updates the quantile of their risks."""

    mends = True

    takes = Annealed.takes | {"eqrm_burnin_iters": at_least(0)}

    @staticmethod
    def search_space(dataset):
        """Which quantile, from which update on, and Adam's learning rate from there."""
        return {
            "eqrm_quantile": (0.75, lambda r: r.uniform(0.5, 0.99)),
            "eqrm_burnin_iters": (2500, lambda r: 10 ** r.uniform(2.5, 3.5)),
            "eqrm_lr": (1e-6, lambda r: 10 ** r.uniform(-7, -5)),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.register_buffer("alpha", torch.tensor(hparams["eqrm_quantile"], dtype=torch.float64))

    def update(self, minibatches, unlabeled=None):
        """One step on the mean or on the quantile."""
        risks = torch.stack([F.cross_entropy(self.network(x), y) for x, y in minibatches])
        burnin = self.hparams["eqrm_burnin_iters"]
        if self.hparams.get("mended"):
            burnin = math.ceil(burnin)
        burnt_in = self.has_begun(burnin, lr=self.hparams["eqrm_lr"])
        self.update_count += 1
        if burnt_in and len(risks) > 1:
            return self.descend(kde_quantile(risks, self.alpha))
        return self.descend(risks.mean())
