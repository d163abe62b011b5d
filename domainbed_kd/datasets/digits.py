"""DigitsDG and DigitsSeg, the datasets that ship with the package."""

from domainbed_kd.datasets.base import MultipleDomainDataset
from domainbed_kd.datasets.small import DIGITS
from domainbed_kd.tasks import SEGMENTATION


class DigitsDG(MultipleDomainDataset):
    """1,797 handwritten digits in four looks, 3x32x32 in [0, 1]; ships with the package.

    No digit occurs in two domains. See assets/digits.md for the source, looks.py for the looks.
    """

    ENVIRONMENTS = ["plain", "colour", "texture", "sketch"]
    CLASSES = DIGITS
    DOMAIN_NAMES = ("plain drawing", "colourful drawing", "textured picture", "sketch")
    SIDE = 32
    input_shape = INPUT_SHAPE = (3, SIDE, SIDE)
    num_classes = len(CLASSES)
    SMALL_IMAGES = True
    CLIP_BACKBONE = "tiny"

    def __init__(self, root, test_envs, hparams):
        from domainbed_kd.datasets import looks

        self.datasets = _tensors(looks.domains())


class DigitsSeg(MultipleDomainDataset):
    """Which digit is this pixel of? The digits of DigitsDG, four to a canvas, 3x64x64 in [0, 1].

    Each domain has 112 canvases; class 0 is the background, 42 % of the pixels. Each digit is used
    once, so a split by canvas never has a digit on both sides.
    """

    TASK = SEGMENTATION
    N_STEPS = 600
    ENVIRONMENTS = DigitsDG.ENVIRONMENTS
    CLASSES = ("background", *DIGITS)
    DOMAIN_NAMES = DigitsDG.DOMAIN_NAMES
    SIDE = 64
    input_shape = INPUT_SHAPE = (3, SIDE, SIDE)
    num_classes = len(CLASSES)
    HPARAMS = {"lr": (3e-3, lambda r: 10 ** r.uniform(-3.5, -2)),
               "batch_size": (8, lambda r: int(2 ** r.uniform(2, 4)))}

    def __init__(self, root, test_envs, hparams):
        from domainbed_kd.datasets import looks

        self.datasets = _tensors(looks.canvases())


def _tensors(domains: list) -> list:
    """Datasets of (images, labels), the images uint8 (N, H, W, 3)."""
    import torch
    from torch.utils.data import TensorDataset

    return [TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
                          torch.from_numpy(labels)) for images, labels in domains]
