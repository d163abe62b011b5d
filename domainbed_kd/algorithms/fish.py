"""Fish: a step on each domain in turn, then a move part of the way to where that led.

Shi et al., "Gradient Matching for Domain Generalization", ICLR 2022,
https://arxiv.org/abs/2104.09937 (algorithm 1): steps in turn align the domains' gradients.
DomainBed builds a network in every update and overwrites it, which advances the random stream of
dropout and the loaders. So does this file; the hparam `mended`: true saves that time.
"""

import torch
import torch.nn.functional as F
from torch import nn

from domainbed_kd import networks
from domainbed_kd.algorithms.base import Algorithm


class Fish(Algorithm):
    """An Adam step on each domain in turn, then a share of the way from start to end.

    Adam's moments persist from pass to pass, as in DomainBed. They belong to `self.optimizer`, so
    that a restarted run goes on with them.
    """

    no_teachers = "it makes a step for each domain"
    mends = True

    @staticmethod
    def search_space(dataset):
        """`meta_lr`: the share of the way."""
        return {"meta_lr": (0.5, lambda r: r.choice([0.05, 0.1, 0.5]))}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.shape = input_shape, num_classes
        self.network = nn.Module()  # so named for DomainBed's checkpoints: network.net.0...
        self.network.net = self._build(hparams)
        self.network.forward = self.network.net.forward
        self.optimizer = self.adam(self.network)

    def _build(self, hparams) -> nn.Sequential:
        return nn.Sequential(*networks.featurizer_and_classifier(*self.shape, hparams))

    def update(self, minibatches, unlabeled=None):
        """One pass; the loss is that of the last domain."""
        if not self.hparams.get("mended"):
            self._build({**self.hparams, "weights": "none"})  # only for its random draws
        start = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        for x, y in minibatches:
            values = self.descend(F.cross_entropy(self.predict(x), y))
        with torch.no_grad():
            for name, tensor in self.network.state_dict().items():
                way = tensor - start[name]
                tensor.copy_(start[name] + self.hparams["meta_lr"] * way)
        return values
