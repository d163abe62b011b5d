"""RISE: the student learns CLIP's scores and the geometry of CLIP's sentence embeddings.

Huang et al., "A Sentence Speaks a Thousand Images: Domain Generalization through Distilling
CLIP with Language Guidance", ICCV 2023, https://arxiv.org/abs/2309.12530.
Losses from the paper, constants from the authors' code (github.com/OoDBag/RISE).
Departures: DomainBed's student, Adam, lr and batches, not BiT and SGD (`rise_optimizer` "sgd" is
theirs: momentum 0.9, lr divided by 10 at 80 % of the steps; their lr is 1e-3, their weight decay
5e-4); the temperature is drawn from [2, 4] (theirs is 3) and the weights from ranges around their
grids; class names are in the labels' order (theirs are not on OfficeHome and TerraIncognita) and
have no underscores; CLIP's scores have its own scale, not a literal 100 (the same for OpenAI's
weights); CLIP gets its own normalization unless `clip_renormalize` is false. On TerraIncognita they
distil a CLIP that was fine-tuned on the task: name the file of one in `clip_backbone`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import datasets, networks, teachers
from domainbed_kd.algorithms.base import (
    Algorithm,
    above,
    at_least,
    between,
    fixed,
    forked_rng,
    one_of,
    or_null,
)
from domainbed_kd.losses import kd_loss

NEUTRAL = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
           "a {} in a video game.", "art of the {}.", "a photo of the small {}.")
# The authors' anchors where the domains' names say nothing (VLCS, TerraIncognita).
STYLED = ("a bright photo of a {}", "a corrupted photo of a {}",
          "a dark photo of a {}", "a good photo of a {}")


def absolute_distance(image: Tensor, text: Tensor, y: Tensor) -> Tensor:
    """Mean cosine distance, in [0, 2], from images (B, D) to their classes' rows of text (C, D)."""
    return 1 - F.cosine_similarity(image, text[y]).mean()


def relative_distance(image: Tensor, text: Tensor, styled: Tensor, y: Tensor,
                      temperature: float = 1.0) -> Tensor:
    """How much an image's similarities to styled sentences differ from its class's.

    The similarities of an image (B, D), and of its class's neutral text (C, D), to the S styled
    sentences (C, S, D) of class y are a softmax over cosines. Returns their mean squared
    difference, in [0, 2 / S].
    """
    seen = F.cosine_similarity(image[:, None], styled[y], dim=-1)
    wanted = F.cosine_similarity(text[:, None], styled, dim=-1)
    return F.mse_loss((seen / temperature).softmax(dim=1),
                      (wanted / temperature).softmax(dim=1)[y])


def anchors(domain_names: Sequence[str] | None) -> list[str]:
    """Templates that name the training domains, and never the test domain.

    They name ways to photograph instead if the domains' names say nothing, or if there is only one
    domain, as every relative distance would be 0.
    """
    if domain_names is None or len(domain_names) < 2:
        return list(STYLED)
    return [f"a {name} of a {{}}" for name in domain_names]


def sentences(teacher: teachers.CLIP, templates: Sequence[str], hparams: dict
              ) -> tuple[Tensor, Tensor]:
    """Each class's mean neutral sentence at unit length (C, D), and its styled ones (C, S, D)."""
    names = hparams["class_names"]
    neutral = teacher.sentences(templates, names).mean(dim=1)
    return (F.normalize(neutral, dim=-1),
            teacher.sentences(anchors(hparams.get("domain_names")), names))


class Student(nn.Module):
    """An image network that embeds at CLIP's width and classifies by CLIP's sentences."""

    def __init__(self, input_shape, num_classes, hparams, teacher: teachers.CLIP):
        super().__init__()
        with forked_rng():
            text, styled = sentences(teacher, hparams["rise_templates"], hparams)
        self.register_buffer("text", text)
        # Not saved, as `predict` does not need it: a model loads whatever its domains' names are.
        self.register_buffer("styled", styled, persistent=False)  # (C, S, D)

        self.featurizer = networks.Featurizer(input_shape, hparams)
        self.embed = nn.Linear(self.featurizer.n_outputs, self.text.shape[1])
        self.classifier = nn.Linear(self.text.shape[1], num_classes)
        for layer in (self.embed, self.classifier):
            nn.init.normal_(layer.weight, std=0.01)  # 0.01: the authors'
            nn.init.zeros_(layer.bias)
        if hparams["rise_text_init"]:
            self.classifier.weight.data.copy_(self.text)
        # As the authors do where zero-shot CLIP is weak (TerraIncognita); CLIP itself is not run.
        self.text_at_test = hparams["rise_clip_head_at_test"]

    def embedding(self, x: Tensor) -> Tensor:
        """Embeddings (B, D) of images, not normalized."""
        return self.embed(self.featurizer(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C); with the text head at test, the log of the sum of both probabilities."""
        image = self.embedding(x)
        logits = self.classifier(image)
        if self.training or not self.text_at_test:
            return logits
        zero_shot = 100 * F.normalize(image, dim=-1) @ self.text.T
        return torch.log(logits.softmax(dim=1) + zero_shot.softmax(dim=1))


class Ensemble(nn.ModuleList):
    """Students that predict the log of their mean probabilities; one alone, its own logits."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C)."""
        if len(self) == 1:
            return self[0](x)
        return torch.stack([student(x).softmax(dim=1) for student in self]).mean(dim=0).log()


class RISE(Algorithm):
    """Cross-entropy, distillation, and two distances to CLIP's text embeddings.

    The student embeds images at CLIP's width and its classifier starts as CLIP's zero-shot one.
    Only `update` needs CLIP. With several `rise_teachers` there is a student for each, as in the
    paper's mix of teachers; `predict` averages them.
    """

    takes = Algorithm.takes | {
        "rise_temperature": above(0), "rise_distill": between(0, 1), "rise_distance": at_least(0),
        "rise_relative": or_null(at_least(0)), "rise_relative_temperature": above(0),
        "rise_optimizer": one_of("adam", "sgd")}

    @staticmethod
    def search_space(dataset):
        """The teacher, the weights of its terms, and switches for the authors' variants."""
        low, high = {  # the two values of the authors' grid, where there is one
            "PACS": (0.8, 0.9), "VLCS": (0.8, 0.9), "OfficeHome": (0.1, 0.2),
            "TerraIncognita": (0.2, 0.3)}.get(dataset, (0.1, 0.3))
        return {
            "clip_backbone": fixed(datasets.facts(dataset).CLIP_BACKBONE or "ViT-B-16"),
            "clip_renormalize": fixed(True),
            # Null, or a list. An entry is a value of clip_backbone, or an object with that and what
            # else differs: clip_renormalize, or the student's lr.
            "rise_teachers": fixed(None),
            "rise_templates": fixed(list(NEUTRAL)),
            "rise_text_init": fixed(True),
            "rise_temperature": (3.0, lambda r: r.uniform(2, 4)),
            "rise_distill": (high, lambda r: r.uniform(low, high)),
            "rise_distance": (1.0, lambda r: 2 ** r.uniform(-1, 1)),
            "rise_relative": fixed(None),  # null: both distances have the same weight
            # At 1, the authors' value, the relative distance has almost no effect: its gradient is
            # a hundredth of the absolute one's. At 0.05 to 0.1 they are of the same size.
            "rise_relative_temperature": fixed(1.0),
            "rise_clip_head_at_test": fixed(dataset == "TerraIncognita"),
            "rise_optimizer": fixed("adam"),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        teachers.check_class_names("RISE", hparams, num_classes)
        with forked_rng():
            self.teachers = nn.ModuleList(
                teachers.clip(hparams | teacher, input_shape) for teacher in self._mix())
        self.network = Ensemble(
            Student(input_shape, num_classes, hparams, teacher) for teacher in self.teachers)
        self.optimizer = self._optimizer()

    def _mix(self) -> list[dict]:
        """The hparams in which teachers differ; in Python an entry may also be a CLIP object."""
        def own(teacher):
            if isinstance(teacher, str):
                teacher = {"clip_backbone": teacher}
            return {"clip_model": None} | (
                teacher if isinstance(teacher, dict) else {"clip_model": teacher})

        return [own(teacher) for teacher in self.hparams["rise_teachers"] or ()] or [{}]

    def _optimizer(self):
        sgd = self.hparams["rise_optimizer"] == "sgd"
        optimizer = (self.sgd if sgd else self.adam)(self.network)
        lrs = [teacher.get("lr", self.hparams["lr"]) for teacher in self._mix()]
        if len(set(lrs)) > 1:
            optimizer.param_groups.clear()
            for student, lr in zip(self.network, lrs):
                optimizer.add_param_group({"params": student.parameters(), "lr": lr})
        if sgd:
            steps = int(0.8 * self.total_steps)  # 0.8: the authors' drop
            self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps), gamma=0.1)
        return optimizer

    def update(self, minibatches, unlabeled=None):
        """One step of every student on its own loss."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        loss, terms = 0, {}
        for student, teacher in zip(self.network, self.teachers):
            loss_of_one, terms_of_one = self._loss(student, teacher, x, y)
            loss = loss + loss_of_one
            for name, term in terms_of_one.items():
                terms[name] = terms.get(name, 0) + term / len(self.network)
        values = self.descend(loss, **terms)
        if self.hparams["rise_optimizer"] == "sgd":
            self.scheduler.step()
        return values

    def _loss(self, student, teacher, x, y):
        image = student.embedding(x)
        logits = student.classifier(image)
        share, weight = self.hparams["rise_distill"], self.hparams["rise_distance"]
        relative_weight = self.hparams["rise_relative"]
        if relative_weight is None:
            relative_weight = weight if len(self.network) == 1 else 0  # 0: authors' mix
        classify = F.cross_entropy(logits, y)
        loss, terms = (1 - share) * classify, {"classify": classify}
        if share:
            terms["distill"] = kd_loss(
                logits, teacher.logits(x, student.text), self.hparams["rise_temperature"])
            loss = loss + share * terms["distill"]
        if weight:
            terms["absolute"] = absolute_distance(image, student.text, y)
            loss = loss + weight * terms["absolute"]
        if relative_weight:
            terms["relative"] = 10 * relative_distance(  # 10: authors' scale
                image, student.text, student.styled, y, self.hparams["rise_relative_temperature"])
            loss = loss + relative_weight * terms["relative"]
        return loss, terms

    @property
    def teacher(self) -> teachers.CLIP:
        """The first teacher; without a mix, the only one."""
        return self.teachers[0]

    def teacher_logits(self, x):
        """The first teacher's zero-shot logits (B, C) of the student's images."""
        return self.teacher.logits(x, self.network[0].text)
