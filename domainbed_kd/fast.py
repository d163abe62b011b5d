"""Fast mode: the same protocol at lower precision, without what no rule of selection reads."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def precision(device: torch.device, enabled: bool) -> Iterator[None]:
    """Inside, if enabled, layers compute in bfloat16, and what stays float32 may use TF32.

    Weights and optimiser states stay float32 (Micikevicius et al., "Mixed Precision Training",
    ICLR 2018, https://arxiv.org/abs/1710.03740, section 3.1); bfloat16 has float32's range, so
    that losses need no scaling.
    """
    if not enabled:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        # A kept cast of a weight would outlive the optimiser's step where an update takes several.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def laid_out(algorithm: nn.Module, enabled: bool) -> nn.Module:
    """The algorithm; if enabled, with convolutions' weights, (O, I, H, W), channels last."""
    return algorithm.to(memory_format=torch.channels_last) if enabled else algorithm
