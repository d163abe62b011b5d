"""What methods share whose penalty sets in later, with a fresh optimiser."""

from domainbed_kd.algorithms.erm import ERM


class Annealed(ERM):
    """ERM with a penalty whose weight changes at update `annealed_at`; Adam starts afresh then.

    The gradients' scale jumps there, and Adam's running moments would be those of the old one.
    """

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.count_updates(shape=(1,))

    def has_begun(self, annealed_at: float, lr: float | None = None) -> bool:
        """Whether this update, counted from 0, is `annealed_at` or later.

        When it is `annealed_at`, Adam starts afresh: at `lr`, or without one at that of the run.
        A number that is not an integer is passed over.
        """
        count = self.update_count.item()
        if count == annealed_at:
            self.optimizer = self.adam(self.network, lr=lr)
        return count >= annealed_at

    def penalty_weight(self, annealed_at: int, before: float, after: float) -> float:
        """The weight for this update; Adam starts afresh when it changes."""
        return after if self.has_begun(annealed_at) else before
