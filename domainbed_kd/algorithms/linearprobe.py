"""LinearProbe: a linear classifier on a frozen pretrained network.

Alain & Bengio, "Understanding Intermediate Layers Using Linear Classifier Probes", 2016,
https://arxiv.org/abs/1610.01644. It makes a teacher of any network: the hparam `teachers` takes
"timm:NAME" for the probe of that network.
Departures: Adam on minibatches, augmented as for every method. lr and its range are ours, the same
as CLIPLinearProbe's.
"""

from torch import nn

from domainbed_kd.algorithms.erm import ERM


class LinearProbe(ERM):
    """ERM of the classifier alone; the featurizer keeps its loaded weights and is in eval mode."""

    no_teachers = "its features are not trained"
    needs_image_labels = "its frozen network would have layers that nothing trained"

    @staticmethod
    def search_space(dataset):
        """A larger lr than for a whole network."""
        return {"lr": (1e-3, lambda r: 10 ** r.uniform(-4, -2))}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer.requires_grad_(False)
        self.optimizer = self.adam(self.classifier)
        self.train()

    def train(self, mode=True) -> nn.Module:
        """Leaves the featurizer in eval mode."""
        super().train(mode)
        self.featurizer.eval()
        return self
