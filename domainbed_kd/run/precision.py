"""Fast mode: the same protocol at lower precision, without what no rule of selection reads."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


@contextlib.contextmanager
def autocast(device: torch.device, enabled: bool) -> Iterator[None]:
    """Inside, if enabled, layers compute in bfloat16, and what stays float32 may use TF32.

    Weights and optimiser states stay float32 (Micikevicius et al., "Mixed Precision Training",
    ICLR 2018, https://arxiv.org/abs/1710.03740, section 3.1); bfloat16 has float32's range, so
    that losses need no scaling. Optimisers that have a fused step take it.
    """
    if not enabled:
        yield
        return
    hook = register_optimizer_step_pre_hook(_fuse)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        # A kept cast of a weight would outlive the optimiser's step where an update takes several.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
    finally:
        hook.remove()
        torch.backends.cuda.matmul.allow_tf32 = before


def laid_out(algorithm: nn.Module, enabled: bool) -> nn.Module:
    """The algorithm; if enabled, with convolutions' weights, (O, I, H, W), channels last."""
    return algorithm.to(memory_format=torch.channels_last) if enabled else algorithm


def _fuse(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    for group in optimizer.param_groups:
        if group.get("fused", True) is None and not group.get("foreach"):
            group["fused"] = True


def compile_featurizer(algorithm: nn.Module) -> None:
    """Has torch.compile translate the student's featurizer at its first call.

    Raises:
        ValueError: if the algorithm has none, or no compiler is installed.
    """
    if not hasattr(algorithm, "featurizer"):
        raise ValueError(f"--compile: {type(algorithm).__name__} has no featurizer to compile. "
                         "Leave the flag out.")
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise ValueError(f"--compile: there is no C++ compiler ({' or '.join(names)}) on this "
                         "machine. Install one, or leave the flag out.")
    algorithm.featurizer.compile()
