"""Fast mode's augmentation: DomainBed's crops, flips, colours and grays as tensor operations.

What is drawn has torchvision's distributions; what is done with it differs from Pillow's by
rounding, which Pillow does after each operation. One thing is drawn for fewer images: on a GPU
the order of a colour jitter's four operations is the same for a whole batch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms as T

from domainbed_kd import datasets
from domainbed_kd.image_cache import ImageCache

# Shares of red, green and blue in an image's gray (ITU-R 601).
_LUMA = (0.299, 0.587, 0.114)


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
        x = x.permute(2, 0, 1)
        for step in self.steps:
            if isinstance(step, T.RandomResizedCrop):
                top, left, height, width = step.get_params(x, step.scale, step.ratio)
                x = x[:, top:top + height, left:left + width]
            x = F.interpolate(x[None], step.size, mode="bilinear", antialias=True)[0]
        return x


def speed_up(dataset) -> None:
    """Leaves flips, colours and normalization of a data set's augmented images to `distorted`.

    These images become uint8; domains that are not augmented, or not as DomainBed does, stay.
    """
    for domain in dataset:
        steps = getattr(getattr(domain, "transform", None), "geometry", None)
        if steps is None:
            continue
        domain.transform = Geometry(steps)
        if isinstance(getattr(domain, "loader", None), ImageCache):
            domain.loader = domain.loader.array
            domain.plain_transform = T.Compose([T.ToPILImage(), domain.plain_transform])


def distorted(x: Tensor) -> Tensor:
    """Images as DomainBed distorts and normalizes them: flip, jitter by 0.3, gray for a tenth.

    Args:
        x: uint8 (B, 3, H, W).

    Returns:
        float32 (B, 3, H, W), on x's device; random numbers come from the CPU's global stream.
    """
    n, out = len(x), torch.empty(x.shape, device=x.device)
    flips, grays = (torch.rand(n) < 0.5).tolist(), (torch.rand(n) < 0.1).tolist()
    orders = torch.rand(n, 4).argsort(dim=1).tolist()
    factors = torch.empty(n, 4).uniform_(0.7, 1.3) - torch.tensor([0, 0, 0, 1])
    if x.device.type == "cpu":  # an image at a time stays in the cache between operations
        planes = torch.empty(1, 4, *x.shape[2:])
        for i, values in enumerate(factors.tolist()):
            part = slice(i, i + 1)
            _distort(x[part], out[part], flips[part], grays[part], orders[i], values, planes)
    else:
        planes = torch.empty(n, 4, *x.shape[2:], device=x.device)
        values = factors.to(x.device).T.reshape(4, n, 1, 1, 1)
        _distort(x, out, flips, grays, orders[0], values, planes)
    return out


def _distort(x: Tensor, out: Tensor, flips: list[bool], grays: list[bool], order: list[int],
             factors: list[float] | Tensor, planes: Tensor) -> None:
    out.copy_(x)
    for i, flip in enumerate(flips):
        if flip:
            out[i].copy_(x[i].flip(-1))
    for i in order:
        (brighten, contrast, saturate, shift_hue)[i](out, factors[i], planes)
    for i, gray in enumerate(grays):
        if gray:
            out[i] = _luma(out[i:i + 1], planes[:1, :1])[0]
    for channel, mean, std in zip(out.unbind(1), datasets.IMAGENET_MEAN, datasets.IMAGENET_STD):
        channel.mul_(1 / (255 * std)).sub_(mean / std)


# Colours, in place, of x (B, 3, H, W) in [0, 255], by a factor, a float or (B, 1, 1, 1), with
# planes (B, 4, H, W) as room; each is torchvision's operation of that name on Pillow images.


def _luma(x: Tensor, out: Tensor) -> Tensor:
    """The gray (B, 1, H, W) of colours (B, 3, H, W), written to `out`."""
    red, green, blue = x.split(1, dim=1)
    return torch.mul(red, _LUMA[0], out=out).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def brighten(x: Tensor, factor: Tensor | float, planes: Tensor) -> None:
    """Mixes with black: factor 0 is black, 1 the image."""
    x.mul_(factor).clamp_(0, 255)


def contrast(x: Tensor, factor: Tensor | float, planes: Tensor) -> None:
    """Mixes with the mean of the image's gray: factor 0 is that, 1 the image."""
    gray = _luma(x.mean((2, 3), keepdim=True), planes[:, :1, :1, :1]).round_()
    x.mul_(factor).add_(gray * (1 - factor)).clamp_(0, 255)


def saturate(x: Tensor, factor: Tensor | float, planes: Tensor) -> None:
    """Mixes each pixel with its gray: factor 0 is that, 1 the image."""
    torch.lerp(_luma(x, planes[:, :1]), x, factor, out=x).clamp_(0, 255)


def shift_hue(x: Tensor, factor: Tensor | float, planes: Tensor) -> None:
    """Turns hues by a share of the circle, in [-0.5, 0.5]; value and saturation stay.

    With M, m and C the pixel's maximum, minimum and their difference, and the hue h in sixths
    of the circle, a channel is m + C t, where red's t is |h - 3| - 1, clipped to [0, 1], and
    green's and blue's are the same with h - 2 and h + 2. Thus |h - 3| = 2 + (r - g - b + m) / C,
    and h is above 3 where blue exceeds green.
    """
    red, green, blue = x.split(1, dim=1)
    span, low, hue, room = planes.split(1, dim=1)
    torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
    torch.maximum(torch.maximum(red, green, out=span), blue, out=span).sub_(low)
    torch.sub(red, green, out=hue).sub_(blue).add_(low).add_(span, alpha=2)
    hue.div_(torch.clamp(span, min=1e-3, out=room))  # grays have no hue; any will do
    hue.copysign_(torch.sub(blue, green, out=room)).add_(factor * 6)
    hue.sub_(torch.mul(hue, 1 / 6, out=room).round_(), alpha=6)  # h - 3, in [-3, 3]
    torch.abs(hue, out=red).sub_(1)
    for channel, center in ((green, 1), (blue, -1)):
        torch.sub(2, torch.add(hue, center, out=channel).abs_(), out=channel)
    x.clamp_(0, 1).mul_(span).add_(low)
