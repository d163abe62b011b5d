"""GroupDRO: the domain with the largest loss counts most.

Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020,
https://arxiv.org/abs/1911.08731 (algorithm 1).
"""

import torch
import torch.nn.functional as F

from domainbed_kd.algorithms.erm import ERM


class GroupDRO(ERM):
    """Cross-entropies of the domains, weighted by q, which grows with a domain's loss.

    Departure from DomainBed: q has its full size from the start, so checkpoints can be loaded.
    """

    @staticmethod
    def search_space(dataset):
        """The step size of q."""
        return {"groupdro_eta": (1e-2, lambda r: 10 ** r.uniform(-3, -1))}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.register_buffer("q", torch.ones(num_domains))

    def update(self, minibatches, unlabeled=None):
        """One exponentiated-gradient step of q, then one step of the network."""
        losses = torch.stack([F.cross_entropy(self.predict(x), y) for x, y in minibatches])
        self.q *= (self.hparams["groupdro_eta"] * losses.detach()).exp()
        self.q /= self.q.sum()
        return self.descend(self.q @ losses)
