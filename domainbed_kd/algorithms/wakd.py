"""WAKD: distillation without labels, evaluated with the mean of the student's weights.

Berezovskiy & Morozov, "Weight Averaging Improves Knowledge Distillation under Domain Shift", ICCV
2023 workshop on out-of-distribution generalization, https://arxiv.org/abs/2309.11446. Loss and
constants from the authors' code (github.com/vorobeevich/distillation-in-dg). As theirs, the average
starts after a tenth of the run.
Departures: the teacher is the sweep's ERM run; theirs is a SWAD run of a larger network, as the
hparam `teacher` asks for ("run:SWAD": one of the student's network); a run has DomainBed's length,
not 50,000 steps, and DomainBed's crops, not crops of 8 % of an image and more; BatchNorm learns,
and its statistics are averaged, unless `freeze_bn`; the temperature is drawn.
"""

from domainbed_kd.algorithms.base import above, at_least, fixed, or_null
from domainbed_kd.algorithms.taught import Taught
from domainbed_kd.averaging import MovingAverage, WithMovingAverage
from domainbed_kd.losses import kd_loss


class WAKD(WithMovingAverage, Taught):
    """Divergence from the teacher alone; predicts with the mean of nearly all its weights."""

    needs_same_view = "all that it learns is its teacher's predictions on the same crops"
    takes = Taught.takes | {"wakd_temperature": above(0), "wakd_start": or_null(at_least(1))}

    @staticmethod
    def search_space(dataset):
        """The temperature, and the student's first update in the average: null for a tenth."""
        return Taught.search_space(dataset) | {
            "wakd_temperature": (5.0, lambda r: r.choice([2.0, 3.0, 5.0])),
            "wakd_start": fixed(None),
        }

    def new_average(self):
        """The mean from the student's update `wakd_start` on."""
        start = self.hparams["wakd_start"]
        if start is None:
            start = max(1, (self.total_steps - self.averages_after) // 10)
        return MovingAverage(self.network, self.averages_after + start)

    def distill(self, x, y):
        """One step on KD alone."""
        loss = kd_loss(self.network(x), self.teacher_logits(x), self.hparams["wakd_temperature"], y)
        return self.descend(loss, distill=loss)
