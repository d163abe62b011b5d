"""How many cores this process may use, and how many GPUs its jobs."""

import functools
import os
import subprocess
import sys


def available() -> int:
    """Those that it is bound to, where the system knows that; else all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def n_gpus() -> int:
    """How many torch can use here.

    A process of its own asks, which takes a few seconds: no child of one that has asked CUDA
    anything can use a GPU.
    """
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True, text=True)
    return int(asked.stdout) if asked.stdout.strip().isdecimal() else 0


def gpus() -> list[str]:
    """Those that torch can use here, each as CUDA_VISIBLE_DEVICES names it."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(i) for i in range(n_gpus())]
    return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()][:n_gpus()]
