"""Losses that two methods or more share: pure functions of tensors."""

import torch.nn.functional as F
from torch import Tensor


def kd_per_sample(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row, in nats; (B,), >= 0.

    Both are logits (B, C). The factor T^2 keeps the gradient's scale when T grows (Hinton et al.,
    "Distilling the Knowledge in a Neural Network", 2015, section 2).
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1),
        reduction="none", log_target=True)
    return temperature**2 * divergence.sum(dim=1)


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean of `kd_per_sample` over the batch."""
    return kd_per_sample(student, teacher, temperature).mean()
