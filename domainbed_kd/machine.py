"""The cores and GPUs that this process and its jobs may use, and advice where they fail."""

import functools
import os
import re
import subprocess
import sys
import warnings

# Parts of torch's messages about the machine, and advice.
_ADVICE = {
    "out of memory|STATUS_ALLOC_FAILED":
        "the GPU's memory ran out; lower batch_size, jobs_per_device or gpu_image_gb",
    "can't allocate memory": "memory ran out; lower batch_size or jobs_per_device",
    "CU(BLAS|DNN)_STATUS_NOT_INITIALIZED":
        "cuBLAS or cuDNN cannot start, usually because the GPU's memory is full; see what else "
        "runs there, and lower batch_size, jobs_per_device or gpu_image_gb",
    "no kernel image": "this PyTorch was not built for this GPU; install a build that was, or set "
                       "CUDA_VISIBLE_DEVICES to nothing to train on the CPU",
    "driver version is insufficient|driver on your system is too old":
        "the GPU's driver is too old for this PyTorch; update it, install a PyTorch for an older "
        "CUDA, or set CUDA_VISIBLE_DEVICES to nothing to train on the CPU",
}


def advice_on(message: str) -> str | None:
    """What to do about a message of torch's, if the machine is its cause."""
    return next((advice for pattern, advice in _ADVICE.items() if re.search(pattern, message)),
                None)


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

    Raises:
        OSError: if torch cannot use a GPU that is there, as with a driver that is too old.
    """
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; "
         "print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"],
        capture_output=True, text=True)
    for line in asked.stderr.splitlines():
        _refuse_unusable(line)
    return int(asked.stdout) if asked.stdout.strip().isdecimal() else 0


def device():
    """The device of a run: a GPU if torch can use one, else the CPU.

    Raises:
        OSError: if torch cannot use a GPU that is there; torch itself only warns of that.
    """
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for each in said:
        _refuse_unusable(str(each.message))
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return found


def _refuse_unusable(warning: str) -> None:
    is_cpu_chosen = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not is_cpu_chosen and (advice := advice_on(warning)):
        raise OSError(f"{advice} ({' '.join(warning.split())[:200]}).")


def gpus() -> list[str]:
    """The GPUs that torch can use here, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(i) for i in range(n_gpus())]
    return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()][:n_gpus()]
