"""CLIPLinearProbe: a linear classifier on CLIP's frozen image embeddings.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
2021, https://arxiv.org/abs/2103.00020, section 3.2.
Departures: Adam on minibatches, augmented as for every method, not L-BFGS; the embeddings after
CLIP's projection, as in the other methods here. lr and its range are ours.
"""

import torch
import torch.nn.functional as F
from torch import nn

from domainbed_kd import datasets, teachers
from domainbed_kd.algorithms.base import Algorithm, fixed, forked_rng


class CLIPLinearProbe(Algorithm):
    """Cross-entropy on a linear head; CLIP stays frozen, and `predict` needs it too."""

    no_teachers = "its features are not trained"
    network_is_clips = True

    @staticmethod
    def search_space(dataset):
        """Which CLIP, and a larger lr than for a whole network."""
        return {
            "clip_backbone": fixed(datasets.facts(dataset).CLIP_BACKBONE or "ViT-B-16"),
            "clip_renormalize": fixed(True),
            "lr": (1e-3, lambda r: 10 ** r.uniform(-4, -2)),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        with forked_rng():
            teacher = teachers.clip(hparams, input_shape)
            width = teacher(torch.zeros(1, *input_shape)).shape[1]
        self.network = nn.Sequential(teacher, nn.Linear(width, num_classes))
        self.optimizer = self.adam(self.network)

    def update(self, minibatches, unlabeled=None):
        """One step of the head on the mean cross-entropy."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        return self.descend(F.cross_entropy(self.predict(x), y))
