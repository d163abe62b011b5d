"""Fishr: gives the classifier's gradients the same variance in every domain.

Rame et al., "Fishr: Invariant Gradient Variances for Out-of-Distribution Generalization",
ICML 2022, https://arxiv.org/abs/2109.02934. Constants from the authors' code.
Departure: the variances of a linear classifier are computed in closed form instead of from stored
per-sample gradients; their running means are in the checkpoint.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from domainbed_kd.algorithms.annealed import Annealed


def gradient_variance(features: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Variance over samples of the cross-entropy's gradient by a linear classifier; (C * D + C,).

    Features are (B, D), logits (B, C). The gradient by the weights is the outer product of
    softmax(logits) - onehot(y) and the features, so its moments are matrix products; the gradient
    by the bias is the first factor. Differentiable in features and logits.
    """
    error = logits.softmax(dim=1) - F.one_hot(y, logits.shape[1])
    inputs = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)  # 1: the bias's input
    mean = error.T @ inputs / len(y)
    return (error.square().T @ inputs.square() / len(y) - mean.square()).flatten()


def per_sample_gradient_variance(classifier: nn.Module, features: Tensor, y: Tensor) -> Tensor:
    """The same for any classifier of features (B, D): a value per parameter, (P,)."""
    def loss(parameters, feature, label):
        return F.cross_entropy(functional_call(classifier, parameters, (feature,)), label)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(
        dict(classifier.named_parameters()), features, y)  # {name: (B, *its shape)}
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1).var(
        dim=0, correction=0)


class Fishr(Annealed):
    """Cross-entropy, and the distance of the domains' gradient variances from their mean."""

    needs_image_labels = "it takes the classifier's gradient for each image"

    @staticmethod
    def search_space(dataset):
        """The penalty's weight, its first update, and the decay of the variances' running means."""
        return {
            "lambda": (1000.0, lambda r: 10 ** r.uniform(1, 4)),
            "penalty_anneal_iters": (1500, lambda r: int(r.uniform(0, 5000))),
            "ema": (0.95, lambda r: r.uniform(0.90, 0.99)),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        n_parameters = sum(p.numel() for p in self.classifier.parameters())
        self.register_buffer("mean_variance", torch.zeros(num_domains, n_parameters))

    def update(self, minibatches, unlabeled=None):
        """One step on the penalized loss."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        sizes = [len(domain_y) for _, domain_y in minibatches]
        features = self.featurizer(x)
        logits = self.classifier(features)
        nll = F.cross_entropy(logits, y)

        parts = zip(features.split(sizes), logits.split(sizes), y.split(sizes))
        variances = torch.stack([
            gradient_variance(f, z, label) if isinstance(self.classifier, nn.Linear)
            else per_sample_gradient_variance(self.classifier, f, label) for f, z, label in parts])
        # As in the authors' code, the new variances have weight 1, and so does their gradient.
        ema = self.hparams["ema"]
        smoothed = variances + ema / (1 - ema) * self.mean_variance
        self.mean_variance.copy_((1 - ema) * smoothed.detach())
        penalty = (smoothed - smoothed.mean(dim=0)).square().mean()

        annealed_at = self.hparams["penalty_anneal_iters"]
        weight = self.penalty_weight(annealed_at, 0.0, self.hparams["lambda"])
        self.update_count += 1
        return self.descend(nll + weight * penalty, nll=nll, penalty=penalty)
