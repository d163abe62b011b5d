"""CAD: features whose neighbours do not reveal the domain.

Ruan, Dubois & Maddison, "Optimal Representations for Covariate Shift", ICLR 2022,
https://arxiv.org/abs/2201.00057 (contrastive adversarial domain bottleneck). Constants from
DomainBed. There, an image counts as its own neighbour if `is_flipped` is false; with the hparam
`mended`: true it does not.
Departures: `is_project`, which fails in DomainBed, works. With one training domain, where
DomainBed's gradient is NaN, the bottleneck is 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import networks
from domainbed_kd.algorithms.base import InTwoParts, above, detached, domain_labels

BASE_TEMPERATURE = 0.07


def similarities(features: Tensor, temperature: float) -> Tensor:
    """Inner products of features (B, D) by the temperature, (B, B); 0 on the diagonal.

    Each row is shifted by a constant, so that its largest entry is 0.
    """
    scores = features @ features.T / temperature
    scores = scores.masked_fill(torch.eye(len(scores), device=scores.device).bool(), 0)
    return scores - scores.max(dim=1, keepdim=True).values.detach()


def log_share(scores: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    """Log of the sum of exp(scores) over `part` divided by that over `whole`, for each row; (B,).

    Scores and the two boolean masks are (B, B). A row with an empty part has -infinity and no
    gradient.
    """
    def sum_over(values, mask):
        return values.masked_fill(~mask, float("-inf")).logsumexp(dim=1)

    return sum_over(scores - sum_over(scores, whole)[:, None], part)


class CAD(InTwoParts):
    """Cross-entropy, and the probability that a neighbour is of another domain.

    With `is_flipped` that probability is raised; without, that of the same domain is lowered.
    """

    mends = True
    takes = InTwoParts.takes | {"temperature": above(0)}

    @staticmethod
    def search_space(dataset):
        """The bottleneck's weight, temperature, features and form."""
        return {
            "lmbda": (0.1, lambda r: r.choice([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0])),
            "temperature": (0.1, lambda r: r.choice([0.05, 0.1])),
            "is_normalized": (False, lambda r: False),
            "is_project": (False, lambda r: False),
            "is_flipped": (True, lambda r: True),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer, self.classifier = networks.featurizer_and_classifier(
            input_shape, num_classes, hparams)
        self.project = nn.Identity()
        if hparams["is_project"]:
            n_features = self.featurizer.n_outputs
            self.project = nn.Sequential(
                nn.Linear(n_features, n_features), nn.ReLU(), nn.Linear(n_features, 128))
        self.optimizer = self.adam(self.network, self.project)

    def masks(self, same_class: Tensor, same_domain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that count (B,), the neighbours sought (B, B) and those compared (B, B)."""
        others = ~torch.eye(len(same_class), device=same_class.device).bool()
        rows = (same_class & others).any(dim=1)
        if self.hparams["is_flipped"]:
            return rows, ~same_domain, others
        return rows, same_domain & others if self.hparams.get("mended") else same_domain, others

    def bottleneck(self, features: Tensor, y: Tensor, domains: Tensor) -> Tensor:
        """The bottleneck of features (B, D): a mean over the images that count, 0 without any."""
        if self.hparams["is_normalized"]:
            features = F.normalize(features, dim=1)
        temperature = self.hparams["temperature"]
        rows, part, whole = self.masks(y[:, None] == y, domains[:, None] == domains)
        share = log_share(similarities(features, temperature), part, whole)
        rows = rows & share.isfinite()
        sign = -1 if self.hparams["is_flipped"] else 1
        losses = sign * (temperature / BASE_TEMPERATURE) * share
        return torch.where(rows, losses, 0).sum() / rows.sum().clamp(min=1)

    def update(self, minibatches, unlabeled=None):
        """One step on the cross-entropy and the weighted bottleneck."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        domains = domain_labels(minibatches)
        features = self.featurizer(x)
        bottleneck = self.bottleneck(self.project(features), y, domains)
        classify = F.cross_entropy(self.classifier(features), y)
        loss = classify + self.hparams["lmbda"] * bottleneck
        self.descend(loss)
        return detached(clf_loss=classify, bn_loss=bottleneck, total_loss=loss)
