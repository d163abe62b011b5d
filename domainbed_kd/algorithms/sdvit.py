"""SDViT: a vision transformer's early blocks learn from its own last one.

Sultana et al., "Self-Distilled Vision Transformer for Domain Generalization", ACCV 2022,
https://arxiv.org/abs/2207.12392. Loss, constants and grid from the authors' code
(github.com/maryam089/SDViT). As in their code, the term is divided by the number of classes, so the
same weight has less effect with more classes, and its gradient also reaches the last prediction
(`sdvit_detach` stops that).
Departures: Adam, not AdamW, which is the same at their weight decay of 0; lr, weight decay and
batch size are drawn as DomainBed's, where they search only weight and temperature; blocks are drawn
from a random stream of the method's own.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import backbones, datasets
from domainbed_kd.algorithms.base import above, at_least, fixed, forked_rng
from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.losses import kd_loss


def block_features(featurizer: nn.Module, x: Tensor, blocks: list[int]) -> list[Tensor]:
    """Features (B, D) of images as if the transformer ended after each of `blocks`, then in full.

    Blocks count from 1. Each output goes through the network's last normalization and pooling.
    """
    final, tokens = featurizer.network.forward_intermediates(
        x, indices=[block - 1 for block in blocks], norm=True, output_fmt="NLC",
        return_prefix_tokens=True)
    early = [torch.cat([prefix, patches], dim=1) for patches, prefix in tokens]
    return [featurizer.pool(tokens) for tokens in (*early, final)]


class SDViT(ERM):
    """Cross-entropy, and the divergence of a random block's prediction from the last block's.

    The block's prediction uses the last block's normalization and classifier, so nothing is added
    to the network.
    """

    no_teachers = "its classifier looks at each image twice"
    needs_image_labels = "its transformer has one class token per image"
    takes = ERM.takes | {"sdvit_weight": at_least(0), "sdvit_temperature": above(0)}

    @staticmethod
    def search_space(dataset):
        """A transformer as the student, and the authors' grid as draws."""
        return {
            "backbone": fixed(
                backbones.SMALL_VIT if datasets.facts(dataset).SMALL_IMAGES
                else "deit_small_patch16_224"),
            "sdvit_weight": (0.5, lambda r: r.choice([0.1, 0.2, 0.5])),
            "sdvit_temperature": (3.0, lambda r: r.choice([3.0, 5.0])),
            "sdvit_detach": fixed(False),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        network = getattr(self.featurizer, "network", None)
        features = getattr(network, "forward_intermediates", None)
        if not features or "return_prefix_tokens" not in inspect.signature(features).parameters:
            raise ValueError(
                "SDViT needs a vision transformer, whose blocks share one width and one "
                "classifier. Pass timm's name of one: --hparams "
                "'{\"backbone\": \"deit_small_patch16_224\"}'.")
        self.n_blocks = len(network.blocks)
        with forked_rng():
            self.generator = torch.Generator().manual_seed(torch.randint(2**31, (1,)).item())

    def update(self, minibatches, unlabeled=None):
        """One step on CE + weight KL / C, where KL is that of a newly drawn block."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        weight = self.hparams["sdvit_weight"]
        if not weight:
            classify = F.cross_entropy(self.network(x), y)
            return self.descend(classify, classify=classify)
        block = 1 + torch.randint(self.n_blocks, (1,), generator=self.generator).item()
        early, final = map(self.classifier, block_features(self.featurizer, x, [block]))
        classify = F.cross_entropy(final, y)
        target = final.detach() if self.hparams["sdvit_detach"] else final
        distill = kd_loss(early, target, self.hparams["sdvit_temperature"]) / final.shape[1]
        return self.descend(
            classify + weight * distill, classify=classify, distill=distill, block=float(block))

    def predict_blocks(self, x: Tensor) -> Tensor:
        """Logits (K, B, C) of images as predicted by each of the K blocks."""
        blocks = list(range(1, self.n_blocks + 1))
        features = block_features(self.featurizer, x, blocks)[:-1]
        return torch.stack([self.classifier(feature) for feature in features])

    def get_extra_state(self) -> Tensor:
        """The state of the stream that blocks are drawn from, for torch to save."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        self.generator.set_state(state.cpu())
