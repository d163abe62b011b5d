"""LinearProbe: a linear classifier on a frozen pretrained network.

Alain & Bengio, "Understanding Intermediate Layers Using Linear Classifier Probes", 2016,
https://arxiv.org/abs/1610.01644. It makes a teacher of any network: the hparam `teachers` takes
"timm:NAME" for the probe of that network. timm's pretrained networks see images with the mean and
deviation of their training, whatever the dataset's normalization.
Departures: Adam on minibatches, augmented as for every method. lr and its range are ours, the same
as CLIPLinearProbe's.
"""

from torch import nn

from domainbed_kd import networks
from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.clip_teacher import normalization


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
        self._renormalize(input_shape)
        self.optimizer = self.adam(self.classifier)
        self.train()

    def _renormalize(self, input_shape):
        """Gives timm's pretrained networks images with the statistics of their training.

        Both are in the state dict, as a saved model is rebuilt without its pretrained weights.
        """
        config = getattr(getattr(self.featurizer, "network", None), "pretrained_cfg", None)
        images, unchanged = normalization(self.hparams, input_shape), normalization(
            {"normalization": None}, input_shape)
        own = images if config is None else (config["mean"], config["std"])
        if images in (own, unchanged):
            return
        if self.hparams.get("weights") == "none":
            images = own = unchanged
        self.featurizer.images, self.featurizer.own = (
            networks.Normalization(*each, saved=True) for each in (images, own))
        self.featurizer.register_forward_pre_hook(
            lambda featurizer, args: (featurizer.own(featurizer.images.undo(args[0])),))

    def train(self, mode=True) -> nn.Module:
        """Leaves the featurizer in eval mode."""
        super().train(mode)
        self.featurizer.eval()
        return self
