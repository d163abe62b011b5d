"""XDED: every image learns from the mean logits of its class's images in all domains.

Lee, Kim & Kwak, "Cross-Domain Ensemble Distillation for Domain Generalization", ECCV 2022,
https://arxiv.org/abs/2211.14058. Losses and constants from the authors' code
(github.com/leekyungmoon/XDED).
Departures: batches are DomainBed's, with as many images of each domain; theirs hold 16 images of
each of 4 classes (`class_groups` 4 restores that). So an ensemble is all images of a class in the
batch, in any order, and a class of which the batch shows one domain only has no ensemble
(`xded_min_domains` 1 gives it one). With many classes and small batches few images have an
ensemble; `covered` logs their share. DomainBed's Adam and augmentation; weight and temperature are
drawn.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd.algorithms.base import above, at_least, fixed
from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.losses import kd_per_sample


def class_means(logits: Tensor, y: Tensor) -> Tensor:
    """For each row of the logits (B, C), the mean of the rows with the same label, (B, C)."""
    members = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return (members.T @ logits / members.sum(dim=0).clamp(min=1)[:, None])[y]


def domains_of_class(labels: list[Tensor], n_classes: int) -> Tensor:
    """For each image of all domains, in their order, the number of domains with its class."""
    shown = [F.one_hot(y, n_classes).amax(dim=0) for y in labels]
    return sum(shown)[torch.cat(labels)]


def standardized(x: Tensor) -> Tensor:
    """Feature maps (B, c, h, w) with mean 0 and variance 1 in each channel of each image.

    The variance is the sample's, over h w - 1, as in the authors' code; torch's fused kernel
    divides by h w, so its epsilon and its result are scaled.
    """
    n_channels, ratio = x.shape[1], 1 - 1 / x[0, 0].numel()
    scale = x.new_full((n_channels,), ratio ** 0.5)
    return F.group_norm(x, n_channels, scale, eps=1e-6 * ratio)  # 1e-6: authors' value


class UniStyle(nn.Module):
    """A featurizer whose feature maps are standardized after some of its stages, from 1.

    Raises:
        ValueError: if it lacks these stages, or, like a transformer, has no maps.
    """

    def __init__(self, featurizer: nn.Module, after: list[int]):
        super().__init__()
        stages = featurizer.stages() if hasattr(featurizer, "stages") else []
        if len(stages) < 2 or not set(after) <= set(range(1, len(stages) + 1)):
            raise ValueError(
                f"XDED: xded_unistyle is {after}, and this {type(featurizer).__name__} has "
                f"{len(stages)} stages of feature maps. Name some of them, or pass [].")
        self.featurizer, self.after = featurizer, set(after)
        self.n_outputs = featurizer.n_outputs

    def forward(self, x):
        """Features (B, n_outputs) of images (B, C, H, W)."""
        for i, stage in enumerate(self.featurizer.stages(), start=1):
            x = stage(x)
            if i in self.after:
                x = standardized(x)
        return self.featurizer.pool(x)


class XDED(ERM):
    """Cross-entropy, and the divergence from the mean logits of the class across domains."""

    needs_image_labels = "it averages predictions of images of one class"
    takes = ERM.takes | {
        "xded_weight": at_least(0), "xded_temperature": above(0), "xded_min_domains": at_least(1)}

    @staticmethod
    def search_space(dataset):
        """Weight and temperature of the ensembles, and the stages whose style is removed."""
        return {
            "xded_weight": (5.0, lambda r: r.choice([1.0, 3.0, 5.0])),
            "xded_temperature": (4.0, lambda r: r.choice([2.0, 4.0, 8.0])),
            "xded_unistyle": fixed([1, 2]),
            "xded_min_domains": fixed(2),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["xded_unistyle"]:
            self.featurizer = UniStyle(self.featurizer, hparams["xded_unistyle"])
            self.network = nn.Sequential(self.featurizer, self.classifier)
        others = hparams["batch_size"] * (num_domains - 1)
        expected = 1 - (1 - 1 / num_classes) ** others
        grouped = num_domains > 1 and hparams.get("class_groups")
        if hparams["xded_min_domains"] > 1 and expected < 0.5 and not grouped:
            remedy = ('Raise batch_size or, in this package\'s own loop, pass "class_groups": 4'
                      if num_domains > 1 else 'Pass "xded_min_domains": 1')
            warnings.warn(f"XDED: about {expected:.0%} of a batch's images will have one of their "
                          f"class from another domain to learn from. {remedy}.", stacklevel=2)

    def update(self, minibatches, unlabeled=None):
        """One step on CE + weight KL, where only images with an ensemble have a KL."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        logits = self.network(x)
        classify = F.cross_entropy(logits, y)
        weight = self.hparams["xded_weight"]
        if not weight:
            return self.descend(classify, classify=classify)
        n_domains = domains_of_class([y for _, y in minibatches], logits.shape[1])
        covered = n_domains >= self.hparams["xded_min_domains"]
        divergence = kd_per_sample(
            logits, class_means(logits.detach(), y), self.hparams["xded_temperature"])
        distill = (divergence * covered).mean()
        return self.descend(classify + weight * distill, classify=classify, distill=distill,
                            covered=covered.float().mean())
