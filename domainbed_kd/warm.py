"""What the fork server imports: all that a run would import or look up for itself."""

import torch
from tensorboard.plugins.hparams import metadata  # noqa: F401 - needed with a run's first record

# costs, jobs and command_launchers are for scripts/sweep.py, which each child imports again.
from domainbed_kd import command_launchers, costs, extensions, jobs, training  # noqa: F401

torch.backends.cudnn.version()  # loads the library, if there is one; a run's record names it
