"""What methods share whose penalty sets in later, with a fresh optimiser."""

import torch

from domainbed_kd.algorithms.erm import ERM


class Annealed(ERM):
    """ERM with a penalty whose weight changes at update `annealed_at`; Adam starts afresh then.

    The gradients' scale jumps there, and Adam's running moments would be those of the old one.
    """

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.register_buffer("update_count", torch.tensor([0]))

    def penalty_weight(self, annealed_at: int, before: float, after: float) -> float:
        """The weight for this update, counted from 0; resets Adam when it changes."""
        count = self.update_count.item()
        if count == annealed_at:
            self.optimizer = self.adam(self.network)
        return after if count >= annealed_at else before
