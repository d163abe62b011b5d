"""Transfer: features on which even an adversarial classifier has the same risk in all domains.

Zhang et al., "Quantifying and Improving Transferability in Domain Generalization", NeurIPS 2021,
https://arxiv.org/abs/2106.03632. Constants from DomainBed. There, `gda` (gradient descent ascent,
true in every random draw) leaves featurizer and classifier at their initial weights, as its SGD has
only the adversary's parameters. With the hparam `mended`: true it has theirs instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import networks
from domainbed_kd.algorithms.base import InTwoParts, between, detached
from domainbed_kd.losses import per_domain


def risk_gap(logits: list[Tensor], labels: list[Tensor]) -> Tensor:
    """The largest cross-entropy of a domain minus the smallest, of logits (B, C) per domain."""
    risks = per_domain(F.cross_entropy, logits, labels)
    return risks.max(dim=0).values - risks.min(dim=0).values


@torch.no_grad()
def project(module: nn.Module, centre: nn.Module, radius: float) -> None:
    """Moves a module's weights to within `radius` of those of another with the same shapes."""
    pairs = list(zip(module.parameters(), centre.parameters()))
    distance = sum((p - c).square().sum() for p, c in pairs).sqrt()
    for p, c in pairs:
        p.copy_(torch.where(distance > radius, c + radius / distance * (p - c), p))


class Transfer(InTwoParts):
    """A step on the cross-entropy, one on an adversary's risk gap, then steps of the adversary.

    The adversary starts from the classifier, stays within `delta` of it, and maximises the gap
    between the domains' risks.
    """

    no_teachers = "it makes steps against an adversary"
    mends = True

    takes = InTwoParts.takes | {"d_steps_per_g": between(0, 1000)}

    @staticmethod
    def search_space(dataset):
        """The gap's weight; the adversary's radius, steps and learning rate; the optimiser."""
        return {
            "t_lambda": (1.0, lambda r: 10 ** r.uniform(-2, 1)),
            "delta": (2.0, lambda r: r.uniform(0.1, 3.0)),
            "d_steps_per_g": (10, lambda r: int(r.choice([1, 2, 5]))),
            "weight_decay_d": (0.0, lambda r: 10 ** r.uniform(-6, -2)),  # unused, as is beta1
            "gda": (False, lambda r: True),
            "beta1": (0.5, lambda r: r.choice([0.0, 0.5])),
            "lr_d": (1e-3, lambda r: 10 ** r.uniform(-4.5, -2.5)),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        # Nothing reads it; DomainBed's checkpoints have it.
        self.count_updates(shape=(1,))
        self.featurizer, self.classifier = networks.featurizer_and_classifier(
            input_shape, num_classes, hparams)
        self.adv_classifier = networks.Classifier(
            self.featurizer.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.adv_classifier.load_state_dict(self.classifier.state_dict())
        if hparams["gda"]:
            player = self.network if hparams.get("mended") else self.adv_classifier
            self.optimizer = torch.optim.SGD(player.parameters(), lr=hparams["lr"])
        else:
            self.optimizer = self.adam(self.network)
        self.adv_opt = torch.optim.SGD(self.adv_classifier.parameters(), lr=hparams["lr_d"])

    def update(self, minibatches, unlabeled=None):
        """Returns `loss`, and the weighted `gap` before the adversary's last step."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        loss = F.cross_entropy(self.predict(x), y)
        self.step(loss, self.optimizer)

        gap = self._gap([self.featurizer(x) for x, _ in minibatches], minibatches)
        self.step(gap, self.optimizer)

        self.adv_classifier.load_state_dict(self.classifier.state_dict())
        for _ in range(self.hparams["d_steps_per_g"]):
            with torch.no_grad():
                features = [self.featurizer(x) for x, _ in minibatches]
            gap = self._gap(features, minibatches)
            self.step(-gap, self.adv_opt)
            project(self.adv_classifier, self.classifier, self.hparams["delta"])
        return detached(loss=loss, gap=gap)

    def _gap(self, features: list[Tensor], minibatches) -> Tensor:
        logits = [self.adv_classifier(f) for f in features]
        return self.hparams["t_lambda"] * risk_gap(logits, [y for _, y in minibatches])
