"""CLIP: zero-shot, the class whose sentences are nearest to the image. Nothing is trained.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
2021, https://arxiv.org/abs/2103.00020. A reference for the methods that learn from it. With several
templates a class is the mean of its normalized sentences, as in the authors' notebook. One step of
a run is enough: `--steps 1`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from domainbed_kd import datasets, teachers
from domainbed_kd.algorithms.base import Algorithm, fixed, forked_rng


class ZeroShot(nn.Module):
    """Scaled cosines (B, C) of images with the classes' sentences."""

    def __init__(self, teacher: teachers.CLIP, templates: list[str], names: list[str]):
        super().__init__()
        self.teacher = teacher
        sentences = F.normalize(teacher.sentences(templates, names), dim=-1)
        self.register_buffer("text", sentences.mean(dim=1))  # (C, D)

    def forward(self, x):
        """Logits (B, C)."""
        return self.teacher.logits(x, self.text)


class CLIP(Algorithm):
    """Zero-shot CLIP, as a row of its own in tables."""

    no_teachers = "it does not learn"
    network_is_clips = True

    @staticmethod
    def search_space(dataset):
        """Which CLIP, and its sentences; nothing is drawn."""
        return {
            "clip_backbone": fixed(datasets.facts(dataset).CLIP_BACKBONE or "ViT-B-16"),
            "clip_renormalize": fixed(True),
            "clip_templates": fixed(["a photo of a {}"]),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        teachers.check_class_names("CLIP", hparams, num_classes)
        with forked_rng():
            self.network = ZeroShot(teachers.clip(hparams, input_shape),
                                    hparams["clip_templates"], hparams["class_names"])

    def update(self, minibatches, unlabeled=None):
        """The zero-shot cross-entropy; no step is taken."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        return {"loss": F.cross_entropy(self.predict(x), y)}
