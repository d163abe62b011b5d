"""KDDG: distillation without the gradients of samples that the student has mastered.

Wang, Li, Chau & Kot, "Embracing the Dark Knowledge: Domain Generalization Using Regularized
Knowledge Distillation", ACM MM 2021, https://arxiv.org/abs/2107.02629.

The abstract names a "gradient filter" and calls it a regularizer. No code is public, and we could
not obtain the filter's definition. This is our reading: a sample is filtered where the student is
right and at least as sure of the label as the teacher. There it has nothing left to learn from the
teacher, and cross-entropy would only overfit. What the abstract leaves open is an hparam:
`kddg_filter`, `kddg_filter_on`, `kddg_norm`, `kddg_margin`, `kddg_filter_start`. All constants are
ours, and so is the teacher: ERM's network on the same training domains.

`--diagnostics` measures, by our definitions, what the paper analyses: how far the weights travel,
and `mutual_information`. A step whose samples are all filtered has no gradient, but Adam's
momentum and weight decay still move the weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.base import above, at_least, between, fixed, one_of
from domainbed_kd.algorithms.taught import Taught
from domainbed_kd.losses import kd_per_sample, mean_of_labelled
from domainbed_kd.tasks import IGNORED, n_labels

FILTERS = ("none", "correct", "confident", "both")


def keep_mask(student: Tensor, teacher: Tensor, y: Tensor, rule: str,
              margin: float = 0.0) -> Tensor:
    """1 where a sample is kept and 0 where it is filtered, (B, ...), without gradient.

    Logits are (B, C, ...), taken at temperature 1. A sample is an image or, in segmentation, a
    pixel. It is `correct` if the student's largest logit is the label's, `confident` if the student
    gives the label at least the teacher's probability plus `margin`. The rule, one of FILTERS,
    names the condition to filter by. Every rule filters the pixels that y (B, ...) ignores.
    """
    def of_label(logits):
        return logits.softmax(dim=1).gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)

    correct = student.argmax(dim=1) == y
    sure = of_label(student) >= of_label(teacher) + margin
    filtered = {"none": torch.zeros_like(correct), "correct": correct, "confident": sure,
                "both": correct & sure}[rule]
    return (~filtered & (y != IGNORED)).float()


def mutual_information(features: Tensor, labels: Tensor, held_out: Tensor,
                       held_out_labels: Tensor, ridge: float = 1e-4) -> float:
    """A lower bound, in nats, on what features (N, D) tell about labels (N,); at least 0.

    H(y) minus the cross-entropy of a linear probe, which is fitted to `features` and measured on
    `held_out`. The labels may be classes or domains. `ridge` weighs the probe's squared weights;
    any value gives a lower bound. Draws no random numbers.
    """
    n_classes = int(max(labels.max(), held_out_labels.max())) + 1
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    weights = torch.zeros(n_classes, features.shape[1] + 1, dtype=torch.float64,
                          device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def cross_entropy(x, y):
        x = F.pad(((x - mean) / std).double(), (0, 1), value=1)  # the bias
        return F.cross_entropy(x @ weights.T, y)

    def step():
        optimizer.zero_grad()
        loss = cross_entropy(features, labels) + ridge * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(step)
    entropy = torch.special.entr(held_out_labels.bincount() / len(held_out_labels)).sum()
    return max(0.0, (entropy - cross_entropy(held_out, held_out_labels)).item())


class KDDG(Taught):
    """Cross-entropy and distillation over the samples that the gradient filter lets through."""

    takes = Taught.takes | {
        "kddg_alpha": between(0, 1), "kddg_tau": above(0), "kddg_margin": between(-1, 1),
        "kddg_filter": one_of(*FILTERS), "kddg_filter_on": one_of("all", "ce", "kd"),
        "kddg_norm": one_of("batch", "kept"), "kddg_filter_start": at_least(0)}

    @staticmethod
    def search_space(dataset):
        """Weight and temperature of the distillation, and the variants of the filter."""
        return Taught.search_space(dataset) | {
            "kddg_alpha": (0.5, lambda r: r.uniform(0.1, 0.9)),
            "kddg_tau": (2.0, lambda r: r.choice([1.0, 2.0, 3.0, 4.0, 5.0])),
            "kddg_filter": ("both", lambda r: str(r.choice(["both", "confident"]))),
            "kddg_filter_on": ("all", lambda r: str(r.choice(["all", "ce"]))),
            "kddg_margin": (0.0, lambda r: r.choice([0.0, 0.05])),
            "kddg_norm": fixed("batch"),
            "kddg_filter_start": fixed(0),  # in steps of the student
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.count_updates()

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As nn.Module's; runs of earlier versions hold how far their weights have come too."""
        known = {name: value for name, value in state_dict.items() if name != "weight_distance"}
        return super().load_state_dict(known, *args, **kwargs)

    def distill(self, x, y):
        """One step on the filtered mix; its loss is 0 if the whole batch is filtered."""
        logits = self.network(x)
        teacher = self.teacher_logits(x)
        classify = F.cross_entropy(logits, y, reduction="none")
        distill = kd_per_sample(logits, teacher, self.hparams["kddg_tau"])

        started = self.update_count >= self.hparams["kddg_filter_start"]
        rule = self.hparams["kddg_filter"] if started else "none"
        keep = keep_mask(logits.detach(), teacher, y, rule, self.hparams["kddg_margin"])
        self.update_count += 1
        on, alpha = self.hparams["kddg_filter_on"], self.hparams["kddg_alpha"]
        loss = (1 - alpha) * classify * (keep if on in ("all", "ce") else 1)
        if alpha:
            loss = loss + alpha * distill * (keep if on in ("all", "kd") else y != IGNORED)
        # With "batch", filtering a sample does not change the gradient of another.
        divisor = n_labels(y) if self.hparams["kddg_norm"] == "batch" else keep.sum().clamp(min=1)
        return self.descend(
            loss.sum() / divisor, classify=mean_of_labelled(classify, y),
            distill=mean_of_labelled(distill, y), filtered=1 - mean_of_labelled(keep, y),
            teacher_correct=mean_of_labelled((teacher.argmax(dim=1) == y).float(), y))
