"""SANDMask: ANDMask with a smooth mask that also asks for a small variance of the gradients.

Shahtalebi et al., "SAND-mask: An Enhanced Gradient Masking Strategy for the Discovery of
Invariances in Domain Generalization", ICML 2021 Workshop on Uncertainty and Robustness in Deep
Learning, https://arxiv.org/abs/2106.02266. Constants from DomainBed, whose default `tau`, 1, masks
everything: without weight decay nothing is learned. Random draws of `tau` are below 1.
"""

import torch
from torch import Tensor

from domainbed_kd.algorithms.andmask import ANDMask, agreement


def smooth_mask(gradients: Tensor, tau: float, k: float) -> Tensor:
    """max(0, tanh(k / variance * (agreement in sign - tau))); (...) of (D, ...)."""
    tiny = 1e-17  # DomainBed's value for the variance of one domain, and for 0 times infinity
    variance = gradients.var(dim=0) if len(gradients) > 1 else gradients.new_full((), tiny)
    mask = torch.tanh(k * (1 / variance) * (agreement(gradients) - tau)).clamp(min=0)
    return mask.nan_to_num(nan=tiny)


class SANDMask(ANDMask):
    """ANDMask with entries weighted by how strongly the domains agree."""

    @staticmethod
    def search_space(dataset):
        """`tau`: the least agreement in sign; `k`: how steeply the mask rises from there."""
        return {
            "tau": (1.0, lambda r: r.uniform(0.0, 1.0)),
            "k": (10.0, lambda r: 10 ** r.uniform(-3, 5)),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        # Nothing reads it; DomainBed's checkpoints have it.
        self.count_updates(shape=(1,))

    def mask(self, gradients):
        """A weight in [0, 1] for each entry (...) of the domains' gradients (D, ...)."""
        return smooth_mask(gradients, self.hparams["tau"], self.hparams["k"])

    def update(self, minibatches, unlabeled=None):
        """One step on the masked gradient."""
        self.update_count += 1
        return super().update(minibatches, unlabeled)
