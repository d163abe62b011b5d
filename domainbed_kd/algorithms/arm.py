"""ARM: a network that adapts to a batch through an additional input channel, its context.

Zhang et al., "Adaptive Risk Minimization: Learning to Adapt to Domain Shift", NeurIPS 2021,
https://arxiv.org/abs/2007.02931; the contextual variant, ARM-CML. Constants from DomainBed.
Departure, as in DomainBed: the context network keeps its initial weights, as no optimiser has its
parameters.
"""

import torch

from domainbed_kd import datasets, networks
from domainbed_kd.algorithms.base import fixed
from domainbed_kd.algorithms.erm import ERM


class ARM(ERM):
    """ERM on images with a context channel, averaged over each support set.

    A support set is `batch_size` successive images, so a training domain's minibatch is one. If
    that does not divide a batch's size, the batch is a single support set. Predictions depend on
    their batch, which should hold images of one domain.
    """

    no_teachers = "its network sees images together with a context"
    needs_image_labels = "its support sets are batches of images"

    @staticmethod
    def search_space(dataset):
        """Large images come in batches of 8."""
        return {} if datasets.facts(dataset).SMALL_IMAGES else {"batch_size": fixed(8)}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        n_channels, *size = input_shape
        super().__init__((n_channels + 1, *size), num_classes, num_domains, hparams)
        self.context_net = networks.ContextNet(input_shape)
        self.support_size = hparams["batch_size"]

    def predict(self, x):
        """Logits (B, C) of images (B, c, h, w), each support set of one domain."""
        size = self.support_size if len(x) % self.support_size == 0 else len(x)
        context = self.context_net(x)  # (B, 1, h, w)
        means = context.unflatten(0, (-1, size)).mean(dim=1)
        return self.network(torch.cat((x, means.repeat_interleave(size, dim=0)), dim=1))
