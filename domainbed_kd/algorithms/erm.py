"""ERM: minimise the mean error over all training images, whatever their domain.

Vapnik, "Statistical Learning Theory", 1998; the baseline of Gulrajani & Lopez-Paz, "In Search of
Lost Domain Generalization", ICLR 2021, https://arxiv.org/abs/2007.01434.
"""

import torch
import torch.nn.functional as F
from torch import nn

from domainbed_kd import networks
from domainbed_kd.algorithms.base import Algorithm, between


class ERM(Algorithm):
    """Cross-entropy on all domains' images, concatenated.

    The hparam `label_smoothing` spreads that share of each label over all classes. It is meant for
    teachers. Methods that define their own `update` ignore it, so they refuse it.
    """

    takes = Algorithm.takes | {"label_smoothing": between(0, 1)}

    needs_image_labels = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "update" in vars(cls):
            cls.takes = {name: takes for name, takes in cls.takes.items()
                         if name != "label_smoothing"}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer, self.classifier = networks.featurizer_and_classifier(
            input_shape, num_classes, hparams)
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.optimizer = self.adam(self.network)

    def update(self, minibatches, unlabeled=None):
        """One step on the mean cross-entropy."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        smoothing = self.hparams.get("label_smoothing", 0.0)
        return self.descend(F.cross_entropy(self.predict(x), y, label_smoothing=smoothing))
