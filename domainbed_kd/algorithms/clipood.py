"""CLIPood: CLIP's image network, fine-tuned with larger margins between more distant classes.

Shu et al., "CLIPood: Generalizing CLIP to Out-of-Distributions", ICML 2023,
https://arxiv.org/abs/2302.00864. Loss, average, optimiser and constants from the authors' code
(github.com/thuml/CLIPood). It has no teacher: the student starts as CLIP itself.
Departures: DomainBed's augmentation, steps and held-out images, not theirs; float32, where they
keep the average in half precision; CLIP's scores have its own scale, not a literal 100; margin,
density and lr are drawn.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import averaging, datasets, networks, teachers
from domainbed_kd.algorithms.base import (
    Algorithm,
    above,
    at_least,
    fixed,
    forked_rng,
    or_null,
)


def margin_logits(image: Tensor, text: Tensor, y: Tensor, margin: float,
                  scale: float | Tensor) -> Tensor:
    """Scaled cosines (B, C) of images (B, D) and sentences (C, D), with a margin for training.

    The sentences have unit length. `margin` times the sentence of its own class is subtracted from
    each image first, so other classes gain the more, the less their sentences resemble that one.
    """
    return scale * (F.normalize(image, dim=-1) - margin * text[y]) @ text.T


class CLIPood(Algorithm):
    """Cross-entropy of CLIP's scores with a margin; predicts with a mean of all its weights.

    The mean is that of `averaging` "beta" and includes CLIP's own weights. With `clipood_beta` null
    the live network predicts.
    """

    no_teachers = "its student is CLIP's own image network"
    network_is_clips = True
    averages_weights = True
    takes = Algorithm.takes | {
        "batch_size": at_least(1), "clipood_lambda": at_least(0),
        "clipood_beta": or_null(above(0))}

    @staticmethod
    def search_space(dataset):
        """The authors' optimiser, margin and density, and values of lr that do not destroy CLIP."""
        space = {
            "clip_backbone": fixed(datasets.facts(dataset).CLIP_BACKBONE or "ViT-B-16"),
            "clip_renormalize": fixed(True),
            "clipood_template": fixed("a photo of a {}."),
            "clipood_lambda": (0.3, lambda r: r.choice([0.0, 0.1, 0.3, 0.5])),
            "clipood_beta": (0.5, lambda r: r.choice([0.1, 0.5, 1.0])),
            "weight_decay": fixed(0.1),
        }
        if datasets.facts(dataset).SMALL_IMAGES:
            return space | {"lr": (1e-4, lambda r: 10 ** r.uniform(-5, -3.5))}
        lr = 1e-5 if dataset in ("OfficeHome", "DomainNet") else 5e-6
        return space | {"lr": (lr, lambda r: 10 ** r.uniform(-6, -4.5)), "batch_size": fixed(12)}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        teachers.check_class_names("CLIPood", hparams, num_classes)
        with forked_rng():
            clip = teachers.clip(hparams, input_shape)
            text = clip.sentences([hparams["clipood_template"]], hparams["class_names"])[:, 0]
        self.network = nn.Sequential(
            teachers.ImageTower(clip), networks.CosineClassifier(text, clip.scale))
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), hparams["lr"], weight_decay=hparams["weight_decay"])
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, max(1, self.total_steps))
        if hparams["clipood_beta"] is not None:
            self.average = averaging.BetaAverage(
                self.network, self.total_steps, hparams["clipood_beta"])
        self.train()

    def train(self, mode=True):
        """Leaves the network in eval mode, as the authors do."""
        super().train(mode)
        self.network.eval()
        return self

    def update(self, minibatches, unlabeled=None):
        """One step on the cross-entropy with the margin; then updates the average."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        tower, head = self.network
        logits = margin_logits(
            tower(x), head.text, y, self.hparams["clipood_lambda"], head.scale)
        values = self.descend(F.cross_entropy(logits, y))
        self.scheduler.step()
        if self.hparams["clipood_beta"] is not None:
            self.average.update(self.network)
        return values

    def predict(self, x):
        """Logits (B, C) without a margin, in eval mode by the average if there is one."""
        if self.training or self.hparams["clipood_beta"] is None:
            return self.network(x)
        return self.average(x)
