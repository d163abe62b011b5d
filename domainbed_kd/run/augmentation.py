"""Fast mode's augmentation: DomainBed's crops, flips, colours and grays as tensor operations.

Random parameters have torchvision's distributions. Results differ from Pillow's by rounding, which
Pillow does after each operation.
"""

import functools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms as T

from domainbed_kd import datasets, networks
from domainbed_kd.run.image_cache import ImageCache

# Shares of red, green and blue in an image's gray (ITU-R 601).
_LUMA = (0.299, 0.587, 0.114)


class Geometry:
    """The crops and resizing of an augmentation, without flips: images as uint8 (3, H, W).

    Args:
        steps: torchvision's Resize and RandomResizedCrop, bilinear.
    """

    def __init__(self, steps: list):
        self.steps = steps

    def __call__(self, image) -> Tensor:
        """A Pillow image or its pixels, uint8 (h, w, 3), cropped and resized."""
        x = torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image))
        x = x[None].permute(0, 3, 1, 2)  # channels last, which takes half the time to resize
        for step in self.steps:
            if isinstance(step, T.RandomResizedCrop):
                top, left, height, width = window(*x.shape[2:], step.scale, step.ratio)
                x = x[..., top:top + height, left:left + width]
            x = F.interpolate(x, step.size, mode="bilinear", antialias=True)
        return x[0]


def window(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float],
           draws: list | None = None) -> tuple[int, int, int, int]:
    """Top, left, height and width as RandomResizedCrop.get_params draws them, five times as fast.

    `height` and `width` are the image's, in pixels; `draws` is `torch.rand(10, 4)` as a list, drawn
    here if not given.
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
    """Images of several sizes resized to one, bilinear and with antialiasing, as Pillow does.

    Each axis is resized by a product with a matrix of weights, for all images at once. An image
    fills the first rows and columns of x, uint8 (B, H, W, 3); heights and widths are int64 (B,), in
    pixels. Returns uint8 (B, 3, side, side), channels last.
    """
    n, height, width, _ = x.shape
    kind = torch.float16 if x.is_cuda else torch.float32
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round 255.5 to 256
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

    These images become uint8. Domains without DomainBed's augmentation stay unchanged.
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
    """DomainBed's distortions and normalization: flip, jitter by 0.3, gray for a tenth.

    Takes uint8 (B, 3, H, W) and returns float32 on the same device; random numbers come from the
    CPU's global stream.
    """
    n = len(x)
    flips, grays = torch.rand(n, 1) < 0.5, torch.rand(n, 1) < 0.1
    orders = torch.rand(n, 4).argsort(dim=1)
    factors = torch.empty(n, 4).uniform_(0.7, 1.3) - torch.tensor([0, 0, 0, 1])
    if x.is_cuda and kernels_run(x.device, x.shape[1:]):
        from domainbed_kd.run import kernels

        settings = torch.cat([orders, factors, flips, grays], dim=1)
        return kernels.distort(x, networks.sent(settings, x.device), datasets.IMAGENET_MEAN,
                               datasets.IMAGENET_STD)
    out = torch.empty(x.shape, device=x.device)
    with torch.inference_mode():  # less work for each of some sixty small operations
        jitter = Jitter(x[:1])  # an image at a time stays in the cache between operations
        for i, (flip, gray, order, values) in enumerate(zip(
                *(each.tolist() for each in (flips[:, 0], grays[:, 0], orders, factors)))):
            _distort(jitter, x[i:i + 1], out[i:i + 1], flip, gray, order, values)
    return out


@functools.cache
def kernels_run(device: torch.device, shape: torch.Size) -> bool:
    """Whether kernels.py works on images (3, H, W) on a device; prints why not, once.

    Triton compiles kernels when they first run, and needs a C compiler and Python's headers, which
    containers made for running often lack.
    """
    try:
        from domainbed_kd.run import kernels

        x = torch.zeros(1, *shape, dtype=torch.uint8, device=device)
        kernels.distort(x.contiguous(memory_format=torch.channels_last),
                        torch.zeros(1, 10, device=device), datasets.IMAGENET_MEAN,
                        datasets.IMAGENET_STD)
    except Exception as error:  # Triton, or the compiler that it calls, may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print("--fast: Triton cannot compile kernels here, so the GPU distorts colours one image "
              f"at a time, which takes longer. Install a C compiler and Python's headers. ({why})",
              file=sys.stderr)
        return False
    return True


def _distort(jitter: "Jitter", x: Tensor, out: Tensor, flip: bool, gray: bool, order: list[int],
             factors: list[float]) -> None:
    jitter.load(x, flip)
    for i in order:
        (jitter.brighten, jitter.contrast, jitter.saturate, jitter.shift_hue)[i](factors[i])
    jitter.normalize(gray, out)


class Jitter:
    """An image and torchvision's colour operations on it, as they are on Pillow images.

    Colours, in [0, 255], are scale * x + offset. Brightness and contrast change only scale and
    offset, and an operation on a pixel's channels is the same on x as on colours. So all pixels
    are visited only to mix their channels, or to clip.

    Args:
        like: uint8 (1, 3, H, W), the form of the images to come, one at a time.
    """

    def __init__(self, like: Tensor):
        self.x = like.float()
        self._channels = self.x.split(1, dim=1)
        self._gray = torch.empty_like(self._channels[0])
        self._luma = torch.tensor(_LUMA, device=like.device)
        self._mean, self._std = (
            255 * torch.tensor(values, device=like.device).view(3, 1, 1)
            for values in (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD))
        # For a turn of hues: the channels and then the first two again, sums, and four planes.
        room = torch.empty(1, 12, *like.shape[2:], dtype=torch.int16, device=like.device)
        five, self._sums = room[:, :5], room[:, 5:8]
        self._three, self._front, self._again = five[:, :3], five[:, :2], five[:, 3:]
        self._next = five[:, 2:], five[:, 1:4]  # of each channel, the next but one, and the next
        self._planes = (*self._three.split(1, dim=1), *room[:, 8:].split(1, dim=1))
        # Copies that make the first channel red, green or blue.
        self._turned = (
            [(self._three, self.x)],
            [(five[:, :2], self.x[:, 1:]), (five[:, 2:3], self.x[:, :1])],
            [(five[:, :1], self.x[:, 2:]), (five[:, 1:3], self.x[:, :2])])

    def load(self, x: Tensor, flip: bool) -> None:
        """Takes an image, uint8 (1, 3, H, W), and mirrors it if `flip`."""
        self.scale, self.offset, self._is_whole = 1.0, 0.0, True
        self.x.copy_(x.flip(-1) if flip else x)

    def colours(self) -> Tensor:
        """The image, float32 (1, 3, H, W)."""
        return self.x * self.scale + self.offset

    def normalize(self, gray: bool, out: Tensor) -> None:
        """Writes the image or its gray to `out`, normalized by ImageNet's mean and deviation."""
        if gray:
            self.x.copy_(self._find_gray())
        self.x.mul_(self.scale / self._std)
        torch.add(self.x, (self.offset - self._mean) / self._std, out=out)

    def brighten(self, factor: float) -> None:
        """Mixes with black: factor 0 is black, 1 the image."""
        self._rescale(factor, 0)

    def contrast(self, factor: float) -> None:
        """Mixes with the mean of the image's gray: factor 0 is that mean, 1 the image."""
        gray = (self.x.mean((2, 3)) * self._luma).sum(1)
        # On a CPU a plain number makes the next operations faster; on a GPU reading it would wait.
        gray = gray.view(()) if gray.is_cuda else gray.item()
        self._rescale(factor, (1 - factor) * (self.scale * gray + self.offset))

    def saturate(self, factor: float) -> None:
        """Mixes each pixel with its gray: factor 0 is gray, 1 the image."""
        torch.lerp(self._find_gray(), self.x, factor, out=self.x)
        self._is_whole = False
        self._clip(factor)

    def _find_gray(self) -> Tensor:
        red, green, blue = self._channels
        torch.mul(red, _LUMA[0], out=self._gray)
        return self._gray.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])

    def _rescale(self, factor: float, offset: float) -> None:
        self.scale, self.offset = self.scale * factor, self.offset * factor + offset
        self._clip(factor)

    def _clip(self, factor: float) -> None:
        if factor > 1:  # smaller factors stay in [0, 255]
            self.x.clamp_(-self.offset / self.scale, (255 - self.offset) / self.scale)
            self._is_whole = False

    def shift_hue(self, factor: float) -> None:
        """Rotates hues by a share of the circle, in [-0.5, 0.5]; value and saturation stay.

        Let m and M be a pixel's smallest and largest channel, and c the middle one. A rotation by
        two sixths permutes the channels. A rotation by one sixth makes each m + M - x, where x is
        another channel. The remainder is a part f of a sixth, at most half of it. It moves c by
        w = f (M - m); if c reaches M or m, the channel that was there moves by the rest. So red
        becomes 2 red - c + d, clipped to [m, M], where d is blue - green, clipped to [-w, w], and
        of the opposite sign if f < 0; likewise the other channels. Colours are integers here, as
        in Pillow; so is 64 f.
        """
        whole = round(6 * factor)
        part = round(64 * (6 * factor - whole))
        if not self._is_whole:
            self.x.round_()
        red, green, blue, low, middle, high, room = self._planes
        for channels, x in self._turned[whole % 3]:
            channels.copy_(x)
        torch.minimum(red, green, out=low)
        torch.maximum(red, green, out=high)
        torch.minimum(high, blue, out=room)
        torch.maximum(high, blue, out=high)
        torch.maximum(low, room, out=middle)
        torch.minimum(low, room, out=low)
        if whole % 2:
            torch.add(low, high, out=room)
            torch.sub(room, self._three, out=self._three)
            torch.sub(room, middle, out=middle)
        self._again.copy_(self._front)
        torch.sub(*(self._next if part > 0 else self._next[::-1]), out=self._sums)
        torch.sub(high, low, out=room).mul_(abs(part)).bitwise_right_shift_(6)
        torch.minimum(self._sums, room, out=self._sums)
        torch.maximum(self._sums, room.neg_(), out=self._sums)
        self._sums.add_(self._three, alpha=2).sub_(middle)
        self.x.copy_(torch.clamp(self._sums, low, high, out=self._sums))
