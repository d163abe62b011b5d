"""Fast mode's augmentation: DomainBed's crops, flips, colours and grays as tensor operations.

What is drawn has torchvision's distributions; what is done with it differs from Pillow's by
rounding, which Pillow does after each operation.
"""

import importlib.util
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.functional import normalize

from domainbed_kd import datasets
from domainbed_kd.run.image_cache import ImageCache


class Geometry:
    """The part of an augmentation that resizes, without flips: images as uint8 (3, H, W).

    Args:
        steps: torchvision's Resize and RandomResizedCrop, bilinear.
    """

    def __init__(self, steps: list):
        self.steps = steps

    def __call__(self, image) -> Tensor:
        """A Pillow image or its pixels, uint8 (h, w, 3), cropped and resized."""
        x = torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image))
        x = x[None].permute(0, 3, 1, 2)  # channels last, which is resized in half the time
        for step in self.steps:
            if isinstance(step, T.RandomResizedCrop):
                top, left, height, width = window(*x.shape[2:], step.scale, step.ratio)
                x = x[..., top:top + height, left:left + width]
            x = F.interpolate(x, step.size, mode="bilinear", antialias=True)
        return x[0]


def window(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float],
           draws: list | None = None) -> tuple[int, int, int, int]:
    """Top, left, height and width as RandomResizedCrop.get_params draws them, five times as fast.

    `height` and `width` are the image's, in pixels; `draws` is `torch.rand(10, 4)` as a list, if it
    is drawn already.
    """
    low, high = map(math.log, ratio)
    for share, shape, down, right in draws or torch.rand(10, 4).tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * shape)
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def resized(x: Tensor, heights: Tensor, widths: Tensor, side: int) -> Tensor:
    """Images of several sizes resized to one, bilinear and with antialiasing, as Pillow does it.

    Each axis is a product with a matrix of weights, for all images at once. An image fills the
    first rows and columns of x, uint8 (B, H, W, 3); heights and widths are int64 (B,), in pixels.
    Returns uint8 (B, 3, side, side), channels last.
    """
    n, height, width, _ = x.shape
    kind = torch.float16 if x.is_cuda else torch.float32
    x = _weights(heights, height, side).to(kind) @ x.view(n, height, -1).to(kind)
    x = x.view(n, side, width, 3).transpose(2, 3).reshape(n, 3 * side, width)
    x = x @ _weights(widths, width, side).to(kind).mT
    x = x.view(n, side, 3, side).transpose(1, 2).add(0.5).clamp_(0, 255.5).to(torch.uint8)
    return x.contiguous(memory_format=torch.channels_last)


def _weights(sizes: Tensor, most: int, side: int) -> Tensor:
    """The weight of each of up to `most` pixels in each of `side`: float32 (B, side, most)."""
    ratio = (sizes / side).view(-1, 1, 1)
    centre = ratio * (torch.arange(side, device=sizes.device) + 0.5).view(1, -1, 1)
    place = torch.arange(most, device=sizes.device)
    weights = 1 - (place + 0.5 - centre).abs() / ratio.clamp(min=1)
    weights = weights.clamp_(min=0) * (place < sizes.view(-1, 1, 1))
    return weights / weights.sum(dim=2, keepdim=True)


def speed_up(dataset) -> None:
    """Leaves flips, colours and normalization of a dataset's augmented images to `distorted`.

    These images become uint8; domains that are not augmented, or not as DomainBed does, stay.
    """
    for domain in dataset:
        transform = getattr(domain, "transform", None)
        if not getattr(transform, "is_augmented", False):
            continue
        domain.transform = Geometry(transform.geometry)
        if isinstance(getattr(domain, "loader", None), ImageCache):
            domain.loader = domain.loader.array
            domain.plain_transform = T.Compose([T.ToPILImage(), domain.plain_transform])


def distorted(x: Tensor) -> Tensor:
    """Images as DomainBed distorts and normalizes them: flip, jitter by 0.3, gray for a tenth.

    Takes uint8 (B, 3, H, W) and returns float32 on the same device; random numbers come from the
    CPU's global stream.
    """
    n = len(x)
    flips, grays = torch.rand(n, 1) < 0.5, torch.rand(n, 1) < 0.1
    orders = torch.rand(n, 4).argsort(dim=1)
    factors = torch.empty(n, 4).uniform_(0.7, 1.3) - torch.tensor([0, 0, 0, 1])
    settings = torch.cat([orders, factors, flips, grays], dim=1)
    if x.is_cuda and importlib.util.find_spec("triton"):
        from domainbed_kd.run import kernels

        return kernels.distort(x, sent(settings, x.device), datasets.IMAGENET_MEAN,
                               datasets.IMAGENET_STD)
    # An image at a time stays in the CPU's cache between operations.
    return torch.stack([distort(image, *of) for image, of in zip(x, settings.tolist())])


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a GPU copies it while the CPU goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


@torch.no_grad()
def distort(x: Tensor, *settings: float) -> Tensor:
    """An image, uint8 (3, H, W), by a row of the settings that `kernels.distort` explains."""
    *order, brightness, contrast, saturation, hue, flip, gray = settings
    x = (x.flip(-1) if flip else x).float()
    for i in order:
        if i == 0:
            x = _mixed(x, 0, brightness)
        elif i == 1:
            x = _mixed(x, _gray(x).mean(), contrast)
        elif i == 2:
            x = _mixed(x, _gray(x), saturation)
        else:
            x = _turned(x, hue)
    x = _gray(x).expand_as(x) if gray else x
    return normalize(x / 255, datasets.IMAGENET_MEAN, datasets.IMAGENET_STD)


def _gray(x: Tensor) -> Tensor:
    red, green, blue = x.split(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _mixed(x: Tensor, other: Tensor | float, factor: float) -> Tensor:
    """Colours in [0, 255] between `other`, at a factor of 0, and x, at 1, or beyond x."""
    return (x * factor).add_(other, alpha=1 - factor).clamp_(0, 255)


def _turned(x: Tensor, share: float) -> Tensor:
    """Hues turned by a share of the circle, in [-0.5, 0.5]; value and saturation stay."""
    red, green, blue = x
    most = x.amax(dim=0)
    spread = most - x.amin(dim=0)
    sixths = torch.where(most == red, green - blue, torch.where(
        most == green, blue - red + 2 * spread, red - green + 4 * spread))
    sixths = sixths / spread.clamp(min=1e-6) + 6 * share
    k = torch.stack([5 + sixths, 3 + sixths, 1 + sixths]).remainder_(6)
    return most - spread * torch.minimum(k, 4 - k).clamp_(0, 1)
