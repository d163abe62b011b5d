"""Launchers: functions that run the command lines of a sweep's jobs.

A launcher is `fn(commands)`, as in DomainBed. It may return the commands' exit statuses, from which
a sweep learns what failed. `local` and `multi_gpu` are in workers.py, `slurm` and `ray` in
clusters.py.
"""

import importlib
from collections.abc import Callable

from domainbed_kd.console import did_you_mean
from domainbed_kd.sweep.clusters import ray, slurm
from domainbed_kd.sweep.workers import dummy, local, multi_gpu

REGISTRY: dict[str, Callable] = {"local": local, "dummy": dummy, "multi_gpu": multi_gpu,
                                "slurm": slurm, "ray": ray}
# Launchers that block until their jobs end; an untouched folder is then not queued.
BLOCKING = (local, multi_gpu, slurm, ray)


def get_launcher(name: str) -> Callable:
    """The launcher of that name; "package.module:function" imports one.

    Raises:
        NotImplementedError: if there is none.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise NotImplementedError(
            f"Launcher not found: {name}.{did_you_mean(name, REGISTRY)} Known: "
            f"{', '.join(REGISTRY)}, package.module:function.")
    try:
        launcher = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"Launcher not found: {name} ({error}).") from error
    if not callable(launcher):
        raise NotImplementedError(f"Launcher not found: {name} is not a function.")
    return launcher
