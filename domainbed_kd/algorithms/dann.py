"""DANN: features from which a discriminator cannot tell the domain.

Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016,
https://arxiv.org/abs/1505.07818. Constants and the order of turns from DomainBed.
Departures, as in DomainBed: discriminator and student take steps in turn, instead of a
gradient-reversal layer; the discriminator tells all training domains apart, and unlabeled images of
the target are not used; the discriminator's input gradients can be penalized (Mescheder et al.,
"Which Training Methods for GANs do actually Converge?", ICML 2018).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import datasets, networks
from domainbed_kd.algorithms.base import InTwoParts, detached, domain_labels, fixed


def gradient_penalty(logits: Tensor, domains: Tensor, features: Tensor) -> Tensor:
    """Mean over images of |d cross-entropy / d features|^2; differentiable, >= 0.

    Args:
        logits: (B, n_domains), computed from the features.
        domains: (B,), the images' own domains.
        features: (B, D).
    """
    loss = F.cross_entropy(logits, domains, reduction="sum")
    gradient, = torch.autograd.grad(loss, features, create_graph=True)
    return gradient.square().sum(dim=1).mean()


class DANN(InTwoParts):
    """The student minimises its cross-entropy minus the discriminator's, which minimises its own.

    Of 1 + `d_steps_per_g_step` updates one is the student's, the others are the discriminator's.
    """

    no_teachers = "its student and its discriminator take turns"

    @staticmethod
    def search_space(dataset):
        """Weights, turns and shapes of the discriminator, and both players' optimisers."""
        small = datasets.facts(dataset).SMALL_IMAGES
        if small:
            lr = 1e-3, lambda r: 10 ** r.uniform(-4.5, -2.5)
        else:
            lr = 5e-5, lambda r: 10 ** r.uniform(-5, -3.5)
        return {
            "lambda": (1.0, lambda r: 10 ** r.uniform(-2, 2)),
            "weight_decay_d": (0.0, lambda r: 10 ** r.uniform(-6, -2)),
            "d_steps_per_g_step": (1, lambda r: int(2 ** r.uniform(0, 3))),
            "grad_penalty": (0.0, lambda r: 10 ** r.uniform(-2, 1)),
            "beta1": (0.5, lambda r: r.choice([0.0, 0.5])),
            "mlp_width": (256, lambda r: int(2 ** r.uniform(6, 10))),
            "mlp_depth": (3, lambda r: int(r.choice([3, 4, 5]))),
            "mlp_dropout": (0.0, lambda r: r.choice([0.0, 0.1, 0.5])),
            "lr_g": lr,
            "lr_d": lr,
            "weight_decay_g": fixed(0.0) if small else (0.0, lambda r: 10 ** r.uniform(-6, -2)),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.count_updates(shape=(1,))
        self.featurizer, self.classifier = networks.featurizer_and_classifier(
            input_shape, num_classes, hparams)
        self.discriminator = networks.MLP(self.featurizer.n_outputs, num_domains, hparams)
        # Only CDANN uses it; DomainBed's checkpoints have it in both.
        self.class_embeddings = nn.Embedding(num_classes, self.featurizer.n_outputs)
        betas = (hparams["beta1"], 0.9)
        self.disc_opt = self.adam(
            self.discriminator, self.class_embeddings,
            lr=hparams["lr_d"], weight_decay=hparams["weight_decay_d"], betas=betas)
        self.gen_opt = self.adam(
            self.network, lr=hparams["lr_g"], weight_decay=hparams["weight_decay_g"], betas=betas)

    def discriminator_input(self, features: Tensor, y: Tensor) -> Tensor:
        """The discriminator's input, (B, D)."""
        return features

    def discriminator_loss(self, logits: Tensor, domains: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of the domains, a scalar."""
        return F.cross_entropy(logits, domains)

    def update(self, minibatches, unlabeled=None):
        """One step of the player whose turn it is; returns its loss, `disc_loss` or `gen_loss`."""
        self.update_count += 1
        x, y = (torch.cat(part) for part in zip(*minibatches))
        domains = domain_labels(minibatches)
        features = self.featurizer(x)
        seen = self.discriminator_input(features, y)
        logits = self.discriminator(seen)
        disc_loss = self.discriminator_loss(logits, domains, y)
        if self.hparams["grad_penalty"]:
            disc_loss = disc_loss + (
                self.hparams["grad_penalty"] * gradient_penalty(logits, domains, seen))

        n_turns = self.hparams["d_steps_per_g_step"]
        if self.update_count.item() % (1 + n_turns) < n_turns:
            self.step(disc_loss, self.disc_opt)
            return detached(disc_loss=disc_loss)
        classify = F.cross_entropy(self.classifier(features), y)
        gen_loss = classify - self.hparams["lambda"] * disc_loss
        self.step(gen_loss, self.gen_opt)
        return detached(gen_loss=gen_loss)
