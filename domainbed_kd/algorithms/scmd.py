"""SCMD: the student learns CLIP's view of the samples it finds hardest, in CLIP's space too.

Leng et al., "Choosing Wisely and Learning Deeply: Selective Cross-Modality Distillation via CLIP
for Domain Generalization", TMLR 2024, https://arxiv.org/abs/2311.15145.
Losses, schedule and constants from the authors' code.
Departures: CLIP gets its own normalization unless `clip_renormalize` is false; the selection phase
ends after its share of the run's steps, not of a literal 5,000; the logit scale has no weight
decay; everything runs in the precision of the inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import averaging, teachers
from domainbed_kd.algorithms.base import fixed, forked_rng
from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.losses import kd_loss

LARGEST_SCALE = torch.tensor(100.0).log().item()  # CLIP's own bound


def hardest(losses: Tensor, share: float) -> Tensor:
    """Indices of the `share` of losses (B,) that are largest, at least one."""
    return losses.topk(max(1, int(len(losses) * share))).indices


class SCMD(ERM):
    """Cross-entropy and two distillations, over the hardest samples for most of the run.

    One distillation is from CLIP's scores to the student's logits, the other to the cosines of
    the student's projected features with CLIP's text. Predicts with the moving average.
    """

    averages_weights = True

    @staticmethod
    def search_space(dataset):
        """The authors' ranges; lr and batch size stay within what DomainBed draws."""
        return {
            "clip_backbone": fixed("tiny" if dataset == "DigitsDG" else "ViT-B-32"),
            "clip_renormalize": fixed(True),
            "scmd_template": fixed("this is a photo of a {}"),
            "scmd_lambda1": (0.5, lambda r: r.uniform(0.5, 1)),
            "scmd_lambda2": (0.5, lambda r: r.uniform(0.5, 1)),
            "scmd_last_k": (0.25, lambda r: r.uniform(0.2, 0.4)),
            "scmd_worst_case": (0.2, lambda r: r.choice([0.2, 0.25, 0.3])),
            "scmd_temperature": (3.0, lambda r: r.uniform(2, 5)),
            "scmd_sma": fixed(True),
            "scmd_sma_start": fixed(300),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        teachers.check_class_names("SCMD", hparams, num_classes)
        with forked_rng():
            self.teacher = teachers.clip(hparams, input_shape)
            text = self.teacher.sentences([hparams["scmd_template"]], hparams["class_names"])
            self.register_buffer("text", F.normalize(text[:, 0], dim=-1))  # (C, D)
            self.projector = nn.Linear(
                self.featurizer.n_outputs, self.text.shape[1], bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's own start
        self.optimizer = self.adam(self.network)
        self.optimizer.add_param_group({"params": self.projector.parameters()})
        self.optimizer.add_param_group({"params": [self.log_scale], "lr": 1e-4, "weight_decay": 0})
        self.register_buffer("update_count", torch.tensor(0))
        # The authors fold update `start` into a copy of the one before it.
        self.average = averaging.MovingAverage(self.network, hparams["scmd_sma_start"] - 1)

    def selects(self) -> bool:
        """Whether the next update keeps only the hardest samples."""
        steps = self.hparams.get("total_steps", 5001) - 1
        return bool(self.update_count <= int(steps * (1 - self.hparams["scmd_last_k"])))

    def update(self, minibatches, unlabeled=None):
        """Selects, takes one step, and moves the average."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        n_rows, share = len(y), self.hparams["scmd_worst_case"]
        if share < 1 and self.selects():
            with torch.no_grad():
                kept = hardest(F.cross_entropy(self.network(x), y, reduction="none"), share)
            x, y = x[kept], y[kept]
        features = self.featurizer(x)
        logits = self.classifier(features)
        classify = F.cross_entropy(logits, y)
        loss, terms = classify, {"classify": classify}

        lambda1, lambda2 = self.hparams["scmd_lambda1"], self.hparams["scmd_lambda2"]
        temperature = self.hparams["scmd_temperature"]
        if lambda1 or lambda2:
            teacher = self.teacher.logits(x, self.text)
        if lambda1:
            terms["distill"] = kd_loss(logits, teacher, temperature)
            loss = loss + lambda1 * terms["distill"]
        if lambda2:
            projected = F.normalize(self.projector(features), dim=-1)
            cross_modal = self.log_scale.exp() * projected @ self.text.T
            terms["cross_modal"] = kd_loss(cross_modal, teacher, temperature)
            loss = loss + lambda2 * terms["cross_modal"]
        values = self.descend(loss, **terms)
        with torch.no_grad():
            self.log_scale.clamp_(0, LARGEST_SCALE)
        self.average.update(self.network)
        self.update_count += 1
        return values | {"selected": len(y) / n_rows, "scale": self.log_scale.exp().item()}

    def predict(self, x):
        """Logits (B, C) of the moving average or, with `scmd_sma` off, of the live student."""
        return (self.average if self.hparams["scmd_sma"] else self.network)(x)
