"""What the fork server imports: all that a run would import for itself.

Nothing here may ask CUDA anything: no child of a process that has asked can use a GPU.
"""

from tensorboard.plugins.hparams import metadata  # noqa: F401 - needed with a run's first record

# What sweep.py imports each child imports again.
from domainbed_kd import command_launchers, extensions  # noqa: F401
from domainbed_kd.run import training  # noqa: F401
from domainbed_kd.sweep import flags, jobs, launch, plan, status  # noqa: F401
