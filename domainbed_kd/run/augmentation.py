"""Fast mode's augmentation: DomainBed's crops, flips, colours and grays as tensor operations.

What is drawn has torchvision's distributions; what is done with it differs from Pillow's by
rounding, which Pillow does after each operation. One thing is drawn for fewer images: on a GPU
the order of a colour jitter's four operations is the same for a whole batch.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms as T

from domainbed_kd import datasets
from domainbed_kd.run.image_cache import ImageCache

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
        x = x[None].permute(0, 3, 1, 2)  # channels last, which is resized in half the time
        for step in self.steps:
            if isinstance(step, T.RandomResizedCrop):
                top, left, height, width = window(*x.shape[2:], step.scale, step.ratio)
                x = x[..., top:top + height, left:left + width]
            x = F.interpolate(x, step.size, mode="bilinear", antialias=True)
        return x[0]


def window(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
           ) -> tuple[int, int, int, int]:
    """Top, left, height and width as RandomResizedCrop.get_params draws them, at a fifth of it.

    Args:
        height: of the image, in pixels.
        width: of the image.
        scale: least and most share of the image's area.
        ratio: least and most width per height, uniform in its logarithm.
    """
    low, high = map(math.log, ratio)
    for share, shape, down, right in torch.rand(10, 4).tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * shape)
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - h) // 2, (width - w) // 2, h, w


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
    flips, grays = torch.rand(n) < 0.5, torch.rand(n) < 0.1
    orders = torch.rand(n, 4).argsort(dim=1).tolist()
    factors = torch.empty(n, 4).uniform_(0.7, 1.3) - torch.tensor([0, 0, 0, 1])
    with torch.inference_mode():  # less work for each of some sixty small operations
        if x.device.type == "cpu":  # an image at a time stays in the cache between operations
            jitter, flips, grays = Jitter(x[:1]), flips.tolist(), grays.tolist()
            for i, values in enumerate(factors.tolist()):
                part = slice(i, i + 1)
                _distort(jitter, x[part], out[part], flips[part], grays[part], orders[i], values)
        else:
            _distort(BatchJitter(x), x, out, flips, grays, orders[0], list(factors.T))
    return out


def _distort(jitter: "Jitter", x: Tensor, out: Tensor, flips: list[bool] | Tensor,
             grays: list[bool] | Tensor, order: list[int], factors: list[float] | list[Tensor]
             ) -> None:
    jitter.load(x, flips)
    for i in order:
        (jitter.brighten, jitter.contrast, jitter.saturate, jitter.shift_hue)[i](factors[i])
    jitter.normalize(grays, out)


class Jitter:
    """Images and torchvision's colour operations on them, as they are on Pillow images.

    Colours, in [0, 255], are scale * x + offset. To brighten and to contrast changes these two
    only, and an operation on the channels of a pixel is the same on x as on colours. So one
    passes over all pixels only to mix their channels, or to clip.

    A factor is a float, or a tensor (B, 1, 1, 1).

    Args:
        like: uint8 (B, 3, H, W), the form of the images to come.
    """

    def __init__(self, like: Tensor):
        self.x = like.float()
        self._channels = self.x.split(1, dim=1)
        self._gray = torch.empty_like(self._channels[0])
        self._luma = self._there(torch.tensor(_LUMA))
        self._mean, self._std = (
            self._there(255 * torch.tensor(values).view(3, 1, 1))
            for values in (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD))
        self._make_room(like)

    def _there(self, values: Tensor) -> Tensor:
        if self.x.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.x.device, non_blocking=True)

    def _make_room(self, like: Tensor) -> None:
        """Allocates what turning hues needs, once for all images to come."""
        room = torch.empty(len(like), 12, *like.shape[2:], dtype=torch.int16, device=like.device)
        self._three, self._sums = room[:, :3], room[:, 5:8]
        self._planes = (*self._three.split(1, dim=1), *room[:, 8:].split(1, dim=1))
        self._each = [_Room(x, *own.split([5, 3, 1, 1, 1, 1])) for x, own in zip(self.x, room)]

    def load(self, x: Tensor, flips: list[bool]) -> None:
        """Takes images, uint8 (B, 3, H, W), as they are or mirrored."""
        self.scale, self.offset, self._is_whole = 1.0, 0.0, True
        for own, image, flip in zip(self._each, x, flips):
            own.x.copy_(image.flip(-1) if flip else image)

    def colours(self) -> Tensor:
        """The images, float32 (B, 3, H, W)."""
        return self.x * self.scale + self.offset

    def normalize(self, grays: list[bool], out: Tensor) -> None:
        """Writes the images, some of them as grays, less ImageNet's mean, over its deviation."""
        if any(grays):
            gray = self._find_gray()
            for i in (i for i, is_gray in enumerate(grays) if is_gray):
                self.x[i] = gray[i]
        self.x.mul_(self.scale / self._std)
        torch.add(self.x, (self.offset - self._mean) / self._std, out=out)

    def brighten(self, factor: Tensor | float) -> None:
        """Mixes with black: factor 0 is black, 1 the image."""
        self._rescale(factor, 0)

    def contrast(self, factor: Tensor | float) -> None:
        """Mixes with the mean of the image's gray: factor 0 is that, 1 the image."""
        gray = (self.x.mean((2, 3)) * self._luma).sum(1)
        gray = gray.view_as(factor) if isinstance(factor, Tensor) else gray.item()
        self._rescale(factor, (1 - factor) * (self.scale * gray + self.offset))

    def saturate(self, factor: Tensor | float) -> None:
        """Mixes each pixel with its gray: factor 0 is that, 1 the image."""
        torch.lerp(self._find_gray(), self.x, factor, out=self.x)
        self._is_whole = False
        self._clip(factor)

    def _find_gray(self) -> Tensor:
        red, green, blue = self._channels
        torch.mul(red, _LUMA[0], out=self._gray)
        return self._gray.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])

    def _rescale(self, factor: Tensor | float, offset: Tensor | float) -> None:
        self.scale, self.offset = self.scale * factor, self.offset * factor + offset
        self._clip(factor)

    def _clip(self, factor: Tensor | float) -> None:
        if isinstance(factor, Tensor) or factor > 1:  # others lead nowhere out of [0, 255]
            self.x.clamp_(-self.offset / self.scale, (255 - self.offset) / self.scale)
            self._is_whole = False

    def shift_hue(self, factor: Tensor | float) -> None:
        """Turns hues by a share of the circle, in [-0.5, 0.5]; value and saturation stay.

        A turn by two sixths permutes the channels. By one, it makes each m + M - x of another
        channel x, where m and M are the pixel's least and most. What is left of a turn is a part
        f of a sixth, at most half. That moves the middle channel c by w = f (M - m) and, where
        it meets M or m, the channel there by the rest. So red becomes 2 red - c + d, clipped to
        [m, M], where d is blue - green, clipped to [-w, w], and less than 0 if f is; likewise
        the others. Colours are whole here, as Pillow's are; 64 f is too.
        """
        is_one = not isinstance(factor, Tensor)
        turns = [6 * f for f in ([factor] if is_one else factor.flatten().tolist())]
        wholes = [round(turn) for turn in turns]
        parts = [round(64 * (turn - whole)) for turn, whole in zip(turns, wholes)]
        if not self._is_whole:
            self.x.round_()
        red, green, blue, low, middle, high, room = self._planes
        for own, whole in zip(self._each, wholes):
            for channels, x in own.turned[whole % 3]:
                channels.copy_(x)
        torch.minimum(red, green, out=low)
        torch.maximum(red, green, out=high)
        torch.minimum(high, blue, out=room)
        torch.maximum(high, blue, out=high)
        torch.maximum(low, room, out=middle)
        torch.minimum(low, room, out=low)
        for own, whole, part in zip(self._each, wholes, parts):
            if whole % 2:
                torch.add(own.low, own.high, out=own.room)
                torch.sub(own.room, own.three, out=own.three)
                torch.sub(own.room, own.middle, out=own.middle)
            own.again.copy_(own.front)
            torch.sub(*(own.next if part > 0 else own.next[::-1]), out=own.sums)
        width = abs(parts[0]) if is_one else torch.tensor(
            parts, dtype=torch.int16, device=self.x.device).abs_().view_as(factor)
        torch.sub(high, low, out=room).mul_(width).bitwise_right_shift_(6)
        torch.minimum(self._sums, room, out=self._sums)
        torch.maximum(self._sums, room.neg_(), out=self._sums)
        self._sums.add_(self._three, alpha=2).sub_(middle)
        self.x.copy_(torch.clamp(self._sums, low, high, out=self._sums))


class _Room:
    """An image (3, H, W), and room for a turn of its hues: its channels and then the first two."""

    def __init__(self, x: Tensor, five: Tensor, sums: Tensor, low: Tensor, middle: Tensor,
                 high: Tensor, room: Tensor):
        self.x, self.sums = x, sums
        self.low, self.middle, self.high, self.room = low, middle, high, room
        self.three, self.front, self.again = five[:3], five[:2], five[3:]
        self.next = five[2:], five[1:4]  # of each channel, the next but one, and the next
        # What is copied where, if the first channel is to be red, green or blue.
        self.turned = ([(five[:3], x)], [(five[:2], x[1:]), (five[2:3], x[:1])],
                       [(five[:1], x[2:]), (five[1:3], x[:2])])


class BatchJitter(Jitter):
    """The same on all images of a batch together, as a GPU does it, without a loop over them.

    Nothing here reads from the GPU. Factors, flips and grays are tensors (B,) on the CPU.

    Args:
        like: uint8 (B, 3, H, W), the form of the images to come.
    """

    def _make_room(self, like: Tensor) -> None:
        """A batch allocates as it goes."""

    def _per_image(self, values: Tensor) -> Tensor:
        return self._there(values).view(-1, 1, 1, 1)

    def load(self, x: Tensor, flips: Tensor) -> None:
        """Takes images, uint8 (B, 3, H, W), as they are or mirrored."""
        self.scale, self.offset, self._is_whole = 1.0, 0.0, True
        self.x.copy_(torch.where(self._per_image(flips), x.flip(-1), x))

    def normalize(self, grays: Tensor, out: Tensor) -> None:
        """Writes the images, some of them as grays, less ImageNet's mean, over its deviation."""
        self.x.copy_(torch.where(self._per_image(grays), self._find_gray(), self.x))
        super().normalize([], out)

    def brighten(self, factor: Tensor) -> None:
        """As for one image."""
        super().brighten(self._per_image(factor))

    def contrast(self, factor: Tensor) -> None:
        """As for one image."""
        super().contrast(self._per_image(factor))

    def saturate(self, factor: Tensor) -> None:
        """As for one image."""
        super().saturate(self._per_image(factor))

    def shift_hue(self, factor: Tensor) -> None:
        """As for one image, where the method is explained."""
        turns = 6 * factor.double()
        wholes = turns.round()
        parts = (64 * (turns - wholes)).round()
        if not self._is_whole:
            self.x.round_()
        first = (torch.arange(3) + wholes.long()[:, None]) % 3  # which channel is to be red, ...
        index = self._there(first).view(-1, 3, 1, 1).expand_as(self.x)
        three = self.x.to(torch.int16).gather(1, index)
        low, middle, high = three.sort(dim=1).values.split(1, dim=1)
        odd = self._per_image(wholes.long() % 2 == 1)
        three = torch.where(odd, low + high - three, three)
        middle = torch.where(odd, low + high - middle, middle)
        sign = self._per_image(torch.where(parts > 0, 1, -1).to(torch.int16))
        sums = sign * (three.roll(-2, dims=1) - three.roll(-1, dims=1))
        width = (high - low).mul_(self._per_image(parts.abs().to(torch.int16)))
        width.bitwise_right_shift_(6)
        sums = sums.clamp(-width, width) + 2 * three - middle
        self.x.copy_(sums.clamp(low, high))
