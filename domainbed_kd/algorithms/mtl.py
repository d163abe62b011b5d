"""MTL: a classifier that also sees the mean feature of the image's domain.

Blanchard et al., "Domain Generalization by Marginal Transfer Learning", JMLR 2021,
https://arxiv.org/abs/1711.07910. Constants from DomainBed.
Departures, as in DomainBed: the marginal's kernel embedding is the mean of learned features, in
training an exponential moving average over a domain's batches; the loss is summed over domains; and
instead of the embedding the classifier sees N(0, 1) noise, in evaluation too. The hparam `mended`:
true gives it the embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd import networks
from domainbed_kd.algorithms.base import InTwoParts


class MTL(InTwoParts):
    """Cross-entropy of a classifier on [features, domain embedding].

    In `predict` the embedding is the mean feature of the given images. So mended predictions depend
    on the batch, as the method intends: give it images of one domain, as the training loop does.
    Unless mended, predictions draw noise. `network` is what is trained, without the embedding.
    """

    mends = True

    @staticmethod
    def search_space(dataset):
        """`mtl_ema`: the share of the newest batch in a domain's embedding."""
        return {"mtl_ema": (0.99, lambda r: r.choice([0.5, 0.9, 0.99, 1.0]))}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer = networks.Featurizer(input_shape, hparams)
        n_features = self.featurizer.n_outputs
        self.classifier = networks.Classifier(
            2 * n_features, num_classes, hparams["nonlinear_classifier"])
        self.optimizer = self.adam(self.network)
        self.register_buffer("embeddings", torch.zeros(num_domains, n_features))

    def update(self, minibatches, unlabeled=None):
        """One step on the sum over domains of the mean cross-entropy."""
        return self.descend(sum(
            F.cross_entropy(self._classify(x, domain), y)
            for domain, (x, y) in enumerate(minibatches)))

    def predict(self, x):
        """Logits (B, C) of images (B, ...) of one domain."""
        return self._classify(x)

    def _classify(self, x: Tensor, domain: int | None = None) -> Tensor:
        features = self.featurizer(x)
        embedding = self._embed(features, domain).expand_as(features)
        if not self.hparams.get("mended"):
            embedding = torch.randn_like(features)
        return self.classifier(torch.cat((features, embedding), dim=1))

    def _embed(self, features: Tensor, domain: int | None) -> Tensor:
        """The mean (D,) of features (B, D); updates a training domain's moving average by it."""
        embedding = features.mean(dim=0)
        if domain is not None:
            share = self.hparams["mtl_ema"]
            embedding = share * embedding + (1 - share) * self.embeddings[domain]
            self.embeddings[domain] = embedding.detach()
        return embedding
