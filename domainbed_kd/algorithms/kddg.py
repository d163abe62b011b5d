"""KDDG: distillation in which the samples that a student has already mastered are silent.

Wang, Li, Chau & Kot, "Embracing the Dark Knowledge: Domain Generalization Using Regularized
Knowledge Distillation", ACM MM 2021, https://arxiv.org/abs/2107.02629.

The abstract names a "gradient filter" and calls it a regularizer; no code is public, and the
filter's definition could not be had. This is a reading of it: a sample is filtered where the
student is right and at least as sure of the label as the teacher, since nothing is left to
learn from it there and cross-entropy would only overfit. What the source leaves open is an
hparam: `kddg_filter`, `kddg_filter_on`, `kddg_norm`, `kddg_margin`. All constants are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.base import fixed
from domainbed_kd.algorithms.taught import Taught
from domainbed_kd.losses import kd_per_sample

FILTERS = ("none", "correct", "confident", "both")


def keep_mask(student: Tensor, teacher: Tensor, y: Tensor, rule: str,
              margin: float = 0.0) -> Tensor:
    """1 where a sample still teaches, 0 where it is filtered; (B,), without gradient.

    From logits (B, C), at temperature 1: a sample is `correct` if the student's largest logit is
    the label's, `confident` if the student gives the label at least the teacher's probability
    plus `margin`. The rule names the condition to filter by: one of FILTERS.
    """
    row = torch.arange(len(y), device=y.device)
    correct = student.argmax(dim=1) == y
    sure = (student.softmax(dim=1) - teacher.softmax(dim=1))[row, y] >= margin
    filtered = {"none": torch.zeros_like(correct), "correct": correct, "confident": sure,
                "both": correct & sure}[rule]
    return (~filtered).float()


class KDDG(Taught):
    """Cross-entropy and distillation over the samples that the gradient filter lets through."""

    @staticmethod
    def search_space(dataset):
        """Weight and temperature of the distillation, and the readings of the filter."""
        return Taught.search_space(dataset) | {
            "kddg_alpha": (0.5, lambda r: r.uniform(0.1, 0.9)),
            "kddg_tau": (2.0, lambda r: r.choice([1.0, 2.0, 3.0, 4.0, 5.0])),
            "kddg_filter": ("both", lambda r: str(r.choice(["both", "confident"]))),
            "kddg_filter_on": ("all", lambda r: str(r.choice(["all", "ce"]))),
            "kddg_margin": (0.0, lambda r: r.choice([0.0, 0.05])),
            "kddg_norm": fixed("batch"),
            "kddg_filter_start": fixed(0),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        for name, known in (("kddg_filter", FILTERS), ("kddg_filter_on", ("all", "ce", "kd")),
                            ("kddg_norm", ("batch", "kept"))):
            if hparams[name] not in known:
                raise ValueError(
                    f"KDDG: {name} is {hparams[name]!r}; it takes one of {', '.join(known)}.")
        self.register_buffer("update_count", torch.tensor(0))

    def distill(self, x, y):
        """One step on the filtered mix; a batch that is filtered whole has loss 0."""
        logits = self.network(x)
        teacher = self.teacher_logits(x)
        classify = F.cross_entropy(logits, y, reduction="none")
        distill = kd_per_sample(logits, teacher, self.hparams["kddg_tau"])

        started = self.update_count >= self.hparams["kddg_filter_start"]
        rule = self.hparams["kddg_filter"] if started else "none"
        keep = keep_mask(logits.detach(), teacher, y, rule, self.hparams["kddg_margin"])
        self.update_count += 1
        on, alpha = self.hparams["kddg_filter_on"], self.hparams["kddg_alpha"]
        loss = ((1 - alpha) * classify * (keep if on in ("all", "ce") else 1)
                + alpha * distill * (keep if on in ("all", "kd") else 1))
        # By the whole batch: filtering a sample must not change the gradient of another.
        divisor = len(y) if self.hparams["kddg_norm"] == "batch" else keep.sum().clamp(min=1)
        return self.descend(
            loss.sum() / divisor, classify=classify.mean(), distill=distill.mean(),
            filtered=1 - keep.mean(),
            teacher_accuracy=(teacher.argmax(dim=1) == y).float().mean())
