"""SMA: ERM, evaluated with the simple moving average of its weights.

Arpit et al., "Ensemble of Averages: Improving Model Selection and Boosting Performance in Domain
Generalization", NeurIPS 2022, https://arxiv.org/abs/2110.10832. As in the authors' code
(github.com/salesforce/ensemble-of-averages), the mean includes the weights before its first update;
the paper's equation 1 leaves them out.
Departures: averaging starts after 2 % of the run, at update 100 of DomainBed's 5,001, where theirs
starts at update 100 of any run; BatchNorm's statistics are averaged too.
On top of another algorithm: `--hparams '{"averaging": "sma"}'`.
"""

from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.averaging import WithMovingAverage


class SMA(WithMovingAverage, ERM):
    """ERM that predicts with the mean of its weights since update `sma_start`."""
