"""SCMD: the student copies CLIP's scores, in its own and in CLIP's space, on hard samples.

Leng et al., "Choosing Wisely and Learning Deeply: Selective Cross-Modality Distillation via CLIP
for Domain Generalization", TMLR 2024, https://arxiv.org/abs/2311.15145.
Losses, schedule and constants from the authors' code.
Departures that `scmd_published` undoes: CLIP gets its own normalization (`clip_renormalize` undoes
this alone); selection ends and the average begins after shares of the run's steps, not of a literal
5,000; the logit scale has no weight decay. Other departures: everything runs in the precision of
the inputs, not in half; lr, weight decay, batch size and the student are DomainBed's, so BatchNorm
learns unless `freeze_bn`, and its ImageNet weights are timm's AugMix ones. Theirs are torchvision's
second: `weights` IMAGENET1K_V2 with `resnet50_augmix` false.
As in their code, the pass that finds the hardest samples runs in train mode. So BatchNorm, unless
frozen, learns from the whole batch in that pass and from the kept samples in the step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import averaging, datasets, teachers
from domainbed_kd.algorithms.base import above, at_least, between, fixed, forked_rng, or_null
from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.losses import kd_loss

LARGEST_SCALE = torch.tensor(100.0).log().item()  # CLIP's own bound


def hardest(losses: Tensor, share: float) -> Tensor:
    """Indices of the largest losses (B,): the given share of them, at least one."""
    return losses.topk(max(1, int(len(losses) * share))).indices


def cross_modal_logits(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Scaled cosines (B, C) of projected features (B, D) with text (C, D) of unit length."""
    return log_scale.exp() * F.normalize(image, dim=-1) @ text.T


class SCMD(ERM):
    """Cross-entropy and two distillations, over the hardest samples for most of the run.

    CLIP's scores are distilled into the student's logits, and into the cosines of its projected
    features with CLIP's text. In eval mode it predicts with the mean of the student's weights since
    one update before `scmd_sma_start`. Only `update` needs CLIP.
    """

    needs_image_labels = "its sentences describe one class per image"
    averages_weights = True
    takes = ERM.takes | {
        "scmd_lambda1": at_least(0), "scmd_lambda2": at_least(0), "scmd_last_k": between(0, 1),
        "scmd_worst_case": above(0, up_to=1), "scmd_temperature": above(0),
        "scmd_sma_start": or_null(at_least(1))}  # updates count from 1

    @staticmethod
    def search_space(dataset):
        """The authors' ranges; lr and batch size stay within what DomainBed draws."""
        return {
            "clip_backbone": fixed(datasets.facts(dataset).CLIP_BACKBONE or "ViT-B-32"),
            "clip_renormalize": fixed(True),
            "scmd_template": fixed("this is a photo of a {}"),
            "scmd_lambda1": (0.5, lambda r: r.uniform(0.5, 1)),
            "scmd_lambda2": (0.5, lambda r: r.uniform(0.5, 1)),
            "scmd_last_k": (0.25, lambda r: r.uniform(0.2, 0.4)),
            "scmd_worst_case": (0.2, lambda r: r.choice([0.2, 0.25, 0.3])),
            "scmd_temperature": (3.0, lambda r: r.uniform(2, 5)),
            "scmd_sma": fixed(True),
            "scmd_sma_start": fixed(None),  # null: 6 % of the run, 300 of 5,001 updates
            "scmd_published": fixed(False),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        teachers.check_class_names("SCMD", hparams, num_classes)
        published = hparams["scmd_published"]
        renormalize = hparams["clip_renormalize"] and not published
        with forked_rng():
            self.teacher = teachers.clip(hparams | {"clip_renormalize": renormalize}, input_shape)
            text = self.teacher.sentences([hparams["scmd_template"]], hparams["class_names"])
            self.register_buffer("text", F.normalize(text[:, 0], dim=-1))  # (C, D)
            self.projector = nn.Linear(
                self.featurizer.n_outputs, self.text.shape[1], bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's own start
        self.optimizer = self.adam(self.network)
        self.optimizer.add_param_group({"params": self.projector.parameters()})
        self.optimizer.add_param_group({
            "params": [self.log_scale], "lr": 1e-4,
            "weight_decay": hparams["weight_decay"] if published else 0})
        self.count_updates()
        start = hparams["scmd_sma_start"]
        if start is None:
            start = 300 if published else max(1, round(0.06 * self.total_steps))
        # The authors' mean begins with a copy of the weights before update `start`.
        self.average = averaging.MovingAverage(self.network, start - 1)
        if hparams["scmd_sma"]:
            self.average.warn_if_late("SCMD", self.total_steps)

    def selects(self) -> bool:
        """Whether the next update keeps only the hardest samples."""
        steps = self.total_steps - 1
        if self.hparams["scmd_published"]:
            steps = 5000
        return bool(self.update_count <= int(steps * (1 - self.hparams["scmd_last_k"])))

    def update(self, minibatches, unlabeled=None):
        """Selects, takes one step, and moves the average."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        n_rows, share = len(y), self.hparams["scmd_worst_case"]
        if share < 1 and self.selects():
            with torch.no_grad():
                kept = hardest(F.cross_entropy(self.network(x), y, reduction="none"), share)
            x, y = x[kept], y[kept]
            self.teacher.keep(kept)
        features = self.featurizer(x)
        logits = self.classifier(features)
        classify = F.cross_entropy(logits, y)
        loss, terms = classify, {"classify": classify}

        lambda1, lambda2 = self.hparams["scmd_lambda1"], self.hparams["scmd_lambda2"]
        temperature = self.hparams["scmd_temperature"]
        if lambda1 or lambda2:
            teacher = self.teacher_logits(x)
        if lambda1:
            terms["distill"] = kd_loss(logits, teacher, temperature)
            loss = loss + lambda1 * terms["distill"]
        if lambda2:
            logits = cross_modal_logits(self.projector(features), self.text, self.log_scale)
            terms["cross_modal"] = kd_loss(logits, teacher, temperature)
            loss = loss + lambda2 * terms["cross_modal"]
        values = self.descend(loss, **terms)
        with torch.no_grad():
            self.log_scale.clamp_(0, LARGEST_SCALE)
        if self.hparams["scmd_sma"]:
            self.average.update(self.network)
        self.update_count += 1
        return values | {"selected": len(y) / n_rows, "scale": self.log_scale.detach().exp()}

    def teacher_logits(self, x):
        """CLIP's zero-shot logits (B, C) of the student's images."""
        return self.teacher.logits(x, self.text)

    def predict(self, x):
        """Logits (B, C) of the live student or, in eval mode with `scmd_sma`, of the average."""
        averaged = self.hparams["scmd_sma"] and not self.training
        return (self.average if averaged else self.network)(x)
