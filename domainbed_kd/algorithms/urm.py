"""URM: features with a uniform distribution.

Krishnamachari, Ng & Foo, "Uniformly Distributed Feature Representations for Fair and Robust
Learning", TMLR 2024, https://openreview.net/forum?id=PgLbS5yp8n. Constants from DomainBed.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import datasets
from domainbed_kd.algorithms.base import between, fixed, one_of
from domainbed_kd.algorithms.erm import ERM

WIDTH = 100  # of the discriminator's layers
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def discriminator(n_features: int, n_hidden: int) -> nn.Sequential:
    """From features (B, n_features) to a logit (B, 1), high for noise; layers as DomainBed's."""
    layers = {"dense1": nn.Linear(n_features, WIDTH), "act1": nn.LeakyReLU()}
    for i in range(2, n_hidden + 2):
        layers |= {f"dense{i}": nn.Linear(WIDTH, WIDTH), f"act2{i}": nn.LeakyReLU()}
    return nn.Sequential(OrderedDict(layers, output=nn.Linear(WIDTH, 1)))


def uniform_noise(features: Tensor, lowest: float) -> Tensor:
    """Noise of features' shape and device, uniform from `lowest` to 1."""
    noise = torch.rand(features.shape, device=features.device).to(features.dtype)
    return noise * (1 - lowest) + lowest


class URM(ERM):
    """Cross-entropy, and an adversarial loss: a discriminator takes features for uniform noise.

    The featurizer ends in an activation, `urm_generator_output`, in `predict` too.
    """

    needs_image_labels = "its discriminator takes one vector per image"
    takes = ERM.takes | {
        "urm": one_of("adversarial"), "urm_generator_output": one_of(*ACTIVATIONS),
        "urm_discriminator_optimizer": one_of("adam", "sgd"),
        "urm_discriminator_label_smoothing": between(0, 1)}

    @staticmethod
    def search_space(dataset):
        """The adversary's weight; the discriminator's labels, optimiser, layers and noise."""
        if datasets.facts(dataset).SMALL_IMAGES:
            lr = 1e-3, lambda r: 10 ** r.uniform(-5.5, -3.5)
        else:
            lr = 5e-5, lambda r: 10 ** r.uniform(-6, -4.5)
        return {
            "urm": fixed("adversarial"),
            "urm_adv_lambda": (0.1, lambda r: r.uniform(0, 0.2)),
            "urm_discriminator_label_smoothing": fixed(0),
            "urm_discriminator_optimizer": fixed("adam"),
            "urm_discriminator_hidden_layers": (1, lambda r: int(r.choice([1, 2, 3]))),
            "urm_generator_output": ("tanh", lambda r: str(r.choice(["tanh", "relu"]))),
            "urm_discriminator_lr": lr,
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer.activation = ACTIVATIONS[hparams["urm_generator_output"]]()
        self.discriminator = discriminator(
            self.featurizer.n_outputs, hparams["urm_discriminator_hidden_layers"])
        lr = hparams["urm_discriminator_lr"]
        build = self.adam if hparams["urm_discriminator_optimizer"] == "adam" else self.sgd
        self.discriminator_opt = build(self.discriminator, lr=lr)

    def update(self, minibatches, unlabeled=None):
        """One step of the network, then one of the discriminator; returns the network's loss."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        features, weight = self.featurizer(x), self.hparams["urm_adv_lambda"]
        seen = self.discriminator(features)
        loss = F.cross_entropy(self.classifier(features), y)
        loss = loss + weight * F.binary_cross_entropy_with_logits(seen, torch.ones_like(seen))
        values = self.descend(loss)

        features = features.detach()
        lowest = -1.0 if self.hparams["urm_generator_output"] == "tanh" else 0.0
        noise = uniform_noise(features, lowest)
        smoothing = self.hparams["urm_discriminator_label_smoothing"]
        ones, zeros = torch.ones_like(seen), torch.zeros_like(seen)
        if smoothing:
            ones = 1 - smoothing + smoothing * torch.rand(seen.shape, device=seen.device)
            zeros = smoothing * torch.rand(seen.shape, device=seen.device)
        # As in DomainBed, the second term has the adversary's weight here too.
        told_apart = (
            F.binary_cross_entropy_with_logits(self.discriminator(noise), ones)
            + weight * F.binary_cross_entropy_with_logits(self.discriminator(features), zeros))
        self.step(told_apart, self.discriminator_opt)
        return values
