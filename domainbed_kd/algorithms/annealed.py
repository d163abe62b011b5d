"""The base of methods whose penalty sets in later, with a fresh optimiser."""

from domainbed_kd.algorithms.erm import ERM


class Annealed(ERM):
    """ERM with a penalty whose weight changes at update `annealed_at`, where Adam starts afresh.

    The scale of the gradients jumps there, and Adam's moments would still be of the old scale.
    """

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.count_updates(shape=(1,))

    def has_begun(self, annealed_at: float, lr: float | None = None) -> bool:
        """Whether this update, counted from 0, is `annealed_at` or later.

        When it is `annealed_at`, Adam starts afresh, at `lr` if given, else at the run's. That
        never happens if `annealed_at` is not an integer.
        """
        count = self.update_count.item()
        if count == annealed_at:
            self.optimizer = self.adam(self.network, lr=lr)
        return count >= annealed_at

    def penalty_weight(self, annealed_at: int, before: float, after: float) -> float:
        """The weight for this update; Adam starts afresh when it changes."""
        return after if self.has_begun(annealed_at) else before
