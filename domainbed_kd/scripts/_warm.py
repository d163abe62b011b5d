"""What the fork server imports: all that a run needs.

Nothing here may ask CUDA anything: if the server has, its children cannot use a GPU.
"""

from tensorboard.plugins.hparams import metadata  # noqa: F401 - for a run's first record

# Each child imports again what sweep.py imports.
from domainbed_kd import command_launchers, extensions  # noqa: F401
from domainbed_kd.run import training  # noqa: F401
from domainbed_kd.sweep import flags, jobs, launch, plan, status  # noqa: F401
