"""DigitsDG, the dataset that ships with the package."""

from domainbed_kd.datasets.base import MultipleDomainDataset
from domainbed_kd.datasets.small import DIGITS


class DigitsDG(MultipleDomainDataset):
    """1,797 real handwritten digits in four looks, 3x32x32 in [0, 1]; ships with the package.

    No digit occurs in two domains. See assets/digits.md for the source, looks.py for the looks.
    """

    ENVIRONMENTS = ["plain", "colour", "texture", "sketch"]
    CLASSES = DIGITS
    DOMAIN_NAMES = ("plain drawing", "colourful drawing", "textured picture", "sketch")
    SIDE = 32
    INPUT_SHAPE = (3, SIDE, SIDE)
    SMALL_IMAGES = True
    CLIP_BACKBONE = "tiny"

    def __init__(self, root, test_envs, hparams):
        import torch
        from torch.utils.data import TensorDataset

        from domainbed_kd.datasets import looks

        self.input_shape = self.INPUT_SHAPE
        self.num_classes = 10
        self.datasets = [
            TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
                          torch.from_numpy(labels))
            for images, labels in looks.domains()]
