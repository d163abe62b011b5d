"""Fishr: the gradients of the classifier shall vary alike in every domain.

Rame et al., "Fishr: Invariant Gradient Variances for Out-of-Distribution Generalization",
ICML 2022, https://arxiv.org/abs/2109.02934. Constants from the authors' code.
Departure: the variances are computed in closed form instead of from stored per-sample gradients;
their running means are in the checkpoint.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd.algorithms.annealed import Annealed


def gradient_variance(features: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Variance over samples of the cross-entropy's gradient by a linear classifier; (C * D + C,).

    Of features (B, D) and logits (B, C). The gradient by the weights is the outer product of
    softmax(logits) - onehot(y) and the features, so its moments are matrix products; that by the
    bias is the first factor. Differentiable in both.
    """
    error = logits.softmax(dim=1) - F.one_hot(y, logits.shape[1])
    inputs = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)  # 1: the bias's input
    mean = error.T @ inputs / len(y)
    return (error.square().T @ inputs.square() / len(y) - mean.square()).flatten()


class Fishr(Annealed):
    """Cross-entropy, and how far the domains' gradient variances are from their mean.

    Raises:
        ValueError: if the classifier is not linear.
    """

    @staticmethod
    def search_space(dataset):
        """The penalty's weight, when it sets in, and how slowly the variances' means move."""
        return {
            "lambda": (1000.0, lambda r: 10 ** r.uniform(1, 4)),
            "penalty_anneal_iters": (1500, lambda r: int(r.uniform(0, 5000))),
            "ema": (0.95, lambda r: r.uniform(0.90, 0.99)),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["nonlinear_classifier"]:
            raise ValueError("Fishr: its penalty is that of a linear classifier; found "
                             "nonlinear_classifier true. Leave it false.")
        n_parameters = sum(p.numel() for p in self.classifier.parameters())
        self.register_buffer("mean_variance", torch.zeros(num_domains, n_parameters))

    def update(self, minibatches, unlabeled=None):
        """One step on the penalized loss."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        sizes = [len(domain_y) for _, domain_y in minibatches]
        features = self.featurizer(x)
        logits = self.classifier(features)
        nll = F.cross_entropy(logits, y)

        variances = torch.stack([gradient_variance(*parts) for parts in zip(
            features.split(sizes), logits.split(sizes), y.split(sizes))])
        # The new share counts in full, as in the authors' code, so that its gradient does too.
        ema = self.hparams["ema"]
        smoothed = variances + ema / (1 - ema) * self.mean_variance
        self.mean_variance.copy_((1 - ema) * smoothed.detach())
        penalty = (smoothed - smoothed.mean(dim=0)).square().mean()

        annealed_at = self.hparams["penalty_anneal_iters"]
        weight = self.penalty_weight(annealed_at, 0.0, self.hparams["lambda"])
        self.update_count += 1
        return self.descend(nll + weight * penalty, nll=nll, penalty=penalty)
