"""How many cores this process and how many GPUs its jobs may use."""

import functools
import os
import subprocess
import sys


def available() -> int:
    """The number of cores that this process is bound to; all where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def n_gpus() -> int:
    """How many GPUs torch can use here.

    Asks in a separate process, which takes a few seconds: once a process has used CUDA, none of its
    forked children can use a GPU.
    """
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True, text=True)
    return int(asked.stdout) if asked.stdout.strip().isdecimal() else 0


def gpus() -> list[str]:
    """The GPUs that torch can use here, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(i) for i in range(n_gpus())]
    return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()][:n_gpus()]
