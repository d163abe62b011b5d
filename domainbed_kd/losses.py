"""Losses and measures that two methods or more share: pure functions of tensors."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.tasks import IGNORED

BANDWIDTHS = (0.001, 0.01, 0.1, 1, 10, 100, 1000)  # of Gaussian kernels, DomainBed's
N_BINS = 15  # of confidence; Guo et al.'s number


def kd_per_sample(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row, in nats; (B, ...), >= 0.

    Both are logits (B, C, ...). The factor T^2 keeps the gradient's scale when T grows (Hinton et
    al., "Distilling the Knowledge in a Neural Network", 2015, section 2).
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1),
        reduction="none", log_target=True)
    return temperature**2 * divergence.sum(dim=1)


def kd_loss(student: Tensor, teacher: Tensor, temperature: float, y: Tensor | None = None
            ) -> Tensor:
    """Mean of `kd_per_sample` over the batch or, for maps, over the pixels that y does not ignore.

    Without labels y (B, ...) all pixels count.
    """
    divergence = kd_per_sample(student, teacher, temperature)
    return divergence.mean() if y is None else mean_of_labelled(divergence, y)


def mean_of_labelled(values: Tensor, y: Tensor) -> Tensor:
    """Mean of values (B,), or of maps (B, H, W) or (B, C, H, W) where labels y are not ignored.

    It is 0 if all labels are ignored.
    """
    if y.dim() == 1:
        return values.mean()
    counts = y != IGNORED
    if values.dim() > y.dim():
        counts = counts.unsqueeze(1).expand_as(values)
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


def per_domain(measure: Callable[..., Tensor], *parts: Iterable[Any]) -> Tensor:
    """A scalar measure of each of D domains, (D,); each part, such as logits, has D items."""
    return torch.stack([measure(*of_domain) for of_domain in zip(*parts)])


def moment_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of two batches' (B, D) means plus that of their covariances."""
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(dim=0, keepdim=True)
        centred = x - mean
        return mean, centred.T @ centred / (len(x) - 1)

    (mean_a, covariance_a), (mean_b, covariance_b) = moments(a), moments(b)
    return (mean_a - mean_b).square().mean() + (covariance_a - covariance_b).square().mean()


def gaussian_kernel(a: Tensor, b: Tensor, bandwidths: tuple[float, ...] = BANDWIDTHS) -> Tensor:
    """Sum over the bandwidths g of exp(-g |a_i - b_j|^2); (A, B) of (A, D) and (B, D)."""
    aa, bb = a.square().sum(dim=1, keepdim=True), b.square().sum(dim=1)
    # |b|^2 - 2ab + |a|^2 can fall below 0 by rounding.
    squared = (torch.addmm(bb, a, b.T, alpha=-2) + aa).clamp(min=1e-30)
    return functools.reduce(torch.add, (torch.exp(-gamma * squared) for gamma in bandwidths))


def squared_mmd(a: Tensor, b: Tensor, bandwidths: tuple[float, ...] = BANDWIDTHS) -> Tensor:
    """The biased estimate of the squared maximum mean discrepancy of (A, D) and (B, D)."""
    return (gaussian_kernel(a, a, bandwidths).mean() + gaussian_kernel(b, b, bandwidths).mean()
            - 2 * gaussian_kernel(a, b, bandwidths).mean())


def invariance_penalty(logits: Tensor, y: Tensor) -> Tensor:
    """An unbiased estimate of the loss's squared gradient by a scale of the logits (IRM).

    It is the product of the gradients on even and on odd rows of logits (B, C); it may be negative.
    """
    scale = torch.ones((), device=logits.device, requires_grad=True)
    gradients = [
        torch.autograd.grad(
            F.cross_entropy(logits[half::2] * scale, y[half::2]), scale, create_graph=True)[0]
        for half in (0, 1)]
    return gradients[0] * gradients[1]


def calibration_error(logits: Tensor, y: Tensor) -> float:
    """Expected calibration error in [0, 1], of logits (N, C) and labels (N,).

    The mean, over 15 bins of equal width and weighted by their number of samples, of the difference
    between accuracy and the mean probability of the predicted class (Guo et al., equation 3).
    """
    confidence, guess = logits.double().softmax(dim=1).max(dim=1)
    bins = (confidence * N_BINS).ceil().long().clamp(1, N_BINS)
    gaps = torch.bincount(bins, weights=(guess == y).double() - confidence)
    return gaps.abs().sum().item() / len(y)
