"""SWAD: ERM with its weights averaged densely over the valley of the validation loss.

Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021,
https://arxiv.org/abs/2102.08604. Constants from the authors' code (github.com/khanrc/swad).
Departures: training goes on after the valley has ended; BatchNorm's statistics are re-estimated on
at most as many batches as there were updates (500 in longer runs); learning rate, dropout and
weight decay are drawn as DomainBed's, not from their grid.
On top of another algorithm: `--hparams '{"averaging": "swad"}'`.
"""

from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.averaging import WithLossValley


class SWAD(WithLossValley, ERM):
    """ERM, averaged over the loss valley; see `averaging.WithLossValley`."""
