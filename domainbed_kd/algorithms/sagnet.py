"""SagNet: classify by content, with features that tell a style classifier nothing.

Nam et al., "Reducing Domain Gap by Reducing Style Bias", CVPR 2021,
https://arxiv.org/abs/1910.11645. Constants and the order of the three steps from DomainBed.
Departure, as in DomainBed: style is the mean and variance of the final feature vector, where the
paper has those of each channel of a feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import networks
from domainbed_kd.algorithms.base import Algorithm, detached


def randomize_style(features: Tensor) -> Tensor:
    """Gives each row of features (B, D) a mix of its own and a random row's mean and variance."""
    content, mean, variance = _normalize(features)
    share = networks.sent(torch.rand(len(features), 1), features.device)
    other = networks.sent(torch.randperm(len(features)), features.device)
    mean = share * mean + (1 - share) * mean[other]
    variance = share * variance + (1 - share) * variance[other]
    return content * (variance + 1e-5).sqrt() + mean


def randomize_content(features: Tensor) -> Tensor:
    """Gives each row of features (B, D) a random row's detached content; keeps its style."""
    content, mean, variance = _normalize(features)
    torch.rand(len(features), 1)  # DomainBed draws a mix here too; this keeps its random stream
    other = networks.sent(torch.randperm(len(features)), features.device)
    return content[other].detach() * (variance + 1e-5).sqrt() + mean


def _normalize(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at mean 0 and variance 1, (B, D), and their former means and variances, (B, 1)."""
    variance, mean = torch.var_mean(features, dim=1, keepdim=True)
    return (features - mean) / (variance + 1e-5).sqrt(), mean, variance


class SagNet(Algorithm):
    """Three steps per update: on content, on style, and of the featurizer against style."""

    no_teachers = "it makes steps on content and on style in turn"

    @staticmethod
    def search_space(dataset):
        """`sag_w_adv`: weight of the step against style."""
        return {"sag_w_adv": (0.1, lambda r: 10 ** r.uniform(-2, 1))}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.network_f = networks.Featurizer(input_shape, hparams)
        self.network_c = networks.Classifier(
            self.network_f.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.network_s = networks.Classifier(
            self.network_f.n_outputs, num_classes, hparams["nonlinear_classifier"])
        self.optimizer_f = self.adam(self.network_f)
        self.optimizer_c = self.adam(self.network_c)
        self.optimizer_s = self.adam(self.network_s)

    @property
    def network(self):
        """Featurizer and content classifier; the style classifier only trains."""
        return nn.Sequential(self.network_f, self.network_c)

    def update(self, minibatches, unlabeled=None):
        """Returns `loss_c` of content, `loss_s` of style, and the weighted `loss_adv`."""
        x, y = (torch.cat(part) for part in zip(*minibatches))

        loss_c = F.cross_entropy(self.network_c(randomize_style(self.network_f(x))), y)
        self.step(loss_c, self.optimizer_f, self.optimizer_c)

        loss_s = F.cross_entropy(self.network_s(randomize_content(self.network_f(x))), y)
        self.step(loss_s, self.optimizer_s)

        style = self.network_s(randomize_content(self.network_f(x)))
        loss_adv = self.hparams["sag_w_adv"] * -F.log_softmax(style, dim=1).mean()
        self.step(loss_adv, self.optimizer_f)
        return detached(loss_c=loss_c, loss_s=loss_s, loss_adv=loss_adv)
