"""VL2V-ADiP and VL2V-SD: a student learns CLIP's image embeddings and its classes' sentences.

Addepalli et al., "Leveraging Vision-Language Models for Improving Domain Generalization in Image
Classification", CVPR 2024, https://arxiv.org/abs/2310.08255. Losses, stages and constants from the
authors' code (github.com/val-iisc/VL2V-ADiP). There is no cross-entropy, and no weight makes either
of them ERM.
Departures: both stages are one run, so the second goes on from the first one's last projector, not
from that with the best validation accuracy, and each takes half of the steps (double them for
theirs); CLIP gets its own normalization unless `clip_renormalize` is false; weights are averaged
only if `averaging` says so, where theirs are always, by SWAD with overlapping segments; lambda is
drawn. The lr of VL2V-SD is ours, as the published one is not known.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import datasets, networks, teachers
from domainbed_kd.algorithms.base import (
    Algorithm,
    at_least,
    between,
    fixed,
    forked_rng,
    or_null,
)


def alignment_loss(image: Tensor, seen: Tensor | None, text: Tensor, share: float) -> Tensor:
    """How far images are from CLIP's embeddings and from their classes' sentences, in [-1, 1].

    Minus `share` times the mean cosine of each image (B, D) with CLIP's embedding of it, `seen`
    (B, D), minus 1 - `share` times that with its sentence, `text` (B, D). If `share` is 0, `seen`
    may be None.
    """
    loss = 0
    if share > 0:
        loss = loss - share * F.cosine_similarity(image, seen, dim=-1).mean()
    if share < 1:
        loss = loss - (1 - share) * F.cosine_similarity(image, text, dim=-1).mean()
    return loss


class VL2VADiP(Algorithm):
    """Aligns a projector of the student's features with CLIP, then the student through it.

    It predicts by CLIP's zero-shot classifier on the projected features. Only `update` needs CLIP.
    """

    display_name = "VL2V-ADiP"
    takes = Algorithm.takes | {
        "vl2v_lambda": between(0, 1), "vl2v_align_steps": or_null(at_least(0))}

    @staticmethod
    def search_space(dataset):
        """The teacher, its share of the loss, and the length of the first stage."""
        return {
            "clip_backbone": fixed(datasets.facts(dataset).CLIP_BACKBONE or "ViT-B-16"),
            "clip_renormalize": fixed(True),
            "vl2v_template": fixed("a photo of a {}"),
            "vl2v_lambda": (0.5, lambda r: r.uniform(0.1, 0.9)),
            "vl2v_align_steps": fixed(None),  # null: half of the run
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        teachers.check_class_names(self.display_name, hparams, num_classes)
        with forked_rng():
            self.teacher = teachers.clip(hparams, input_shape)
            text = self.teacher.sentences([hparams["vl2v_template"]], hparams["class_names"])
        self.featurizer, self.projector = self.student(input_shape, text.shape[-1])
        head = networks.CosineClassifier(text[:, 0], self.teacher.scale)
        self.network = nn.Sequential(self.featurizer, self.projector, head)
        # In each stage only one of the two has gradients and is trained.
        self.optimizer = self.adam(self.projector, self.featurizer)
        self.count_updates()

    def student(self, input_shape, width: int) -> tuple[nn.Module, nn.Module]:
        """The network that learns, and the projector of its features to CLIP's width."""
        steps = self.hparams["vl2v_align_steps"]
        self.averages_after = self.total_steps // 2 if steps is None else steps
        featurizer = networks.Featurizer(input_shape, self.hparams)
        with forked_rng():
            return featurizer, nn.Linear(featurizer.n_outputs, width)

    def update(self, minibatches, unlabeled=None):
        """One step of the projector alone or, in the second stage, of the student alone."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        aligns = bool(self.update_count < self.averages_after)
        self.projector.requires_grad_(aligns)
        self.featurizer.train(self.training and not aligns)
        with torch.set_grad_enabled(not aligns):
            features = self.featurizer(x)
        self.featurizer.train(self.training)
        image, share = self.projector(features), self.hparams["vl2v_lambda"]
        loss = alignment_loss(
            image, self.teacher(x) if share else None, self.network[-1].text[y], share)
        self.update_count += 1
        return self.descend(loss, stage=float(not aligns))

    def teacher_logits(self, x):
        """CLIP's zero-shot logits (B, C) of the student's images."""
        return self.teacher.logits(x, self.network[-1].text)


class VL2VSD(VL2VADiP):
    """The same without a projector: the student starts as CLIP's own image network."""

    display_name = "VL2V-SD"
    network_is_clips = True
    takes = Algorithm.takes | {"vl2v_lambda": between(0, 1)}

    @staticmethod
    def search_space(dataset):
        """As VL2V-ADiP's without a first stage, with values of lr that do not destroy CLIP."""
        space = VL2VADiP.search_space(dataset)
        del space["vl2v_align_steps"]
        if datasets.facts(dataset).SMALL_IMAGES:
            return space | {"lr": (1e-4, lambda r: 10 ** r.uniform(-5, -3.5))}
        return space | {"lr": (1e-5, lambda r: r.choice([5e-6, 1e-5, 5e-5]))}

    def student(self, input_shape, width):
        """A copy of CLIP's image network, whose embeddings need no projector."""
        return teachers.ImageTower(self.teacher), nn.Identity()
