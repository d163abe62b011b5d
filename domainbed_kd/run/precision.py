"""Fast mode's precision and memory layout."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


@contextlib.contextmanager
def autocast(device: torch.device, enabled: bool) -> Iterator[None]:
    """Inside, if enabled, layers compute in bfloat16, and float32 products may use TF32.

    Weights and optimiser states stay float32 (Micikevicius et al., "Mixed Precision Training",
    ICLR 2018, https://arxiv.org/abs/1710.03740, section 3.1). bfloat16 has float32's range, so
    losses need no scaling. Optimisers use their fused step if they have one.
    """
    if not enabled:
        yield
        return
    hook = register_optimizer_step_pre_hook(_fuse)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        # A weight's cached cast would be stale after the first optimiser step of an update.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
    finally:
        hook.remove()
        torch.backends.cuda.matmul.allow_tf32 = before


def laid_out(algorithm: nn.Module, enabled: bool) -> nn.Module:
    """The algorithm; if enabled, with convolution weights (O, I, H, W) stored channels last."""
    return algorithm.to(memory_format=torch.channels_last) if enabled else algorithm


def _fuse(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    for group in optimizer.param_groups:
        if group.get("fused", True) is None and not group.get("foreach"):
            group["fused"] = True


def compile_featurizer(algorithm: nn.Module) -> None:
    """Makes torch.compile compile the student's featurizer at its first call."""
    if algorithm.part("featurizer") is None:
        raise ValueError(f"--compile: {type(algorithm).__name__} has no featurizer to compile. "
                         "Leave the flag out.")
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise ValueError(f"--compile: there is no C++ compiler ({' or '.join(names)}) on this "
                         "machine. Install one, or leave the flag out.")
    algorithm.featurizer.compile()
