"""Fast mode's colour jitter on a GPU: all images of a step in two Triton kernels.

The first computes the mean gray for contrast; the second does everything else.
Colours are in [0, 255] and clipped after each operation, as torchvision clips float images.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def distort(x: Tensor, settings: Tensor, mean: tuple, std: tuple) -> Tensor:
    """Flips, jitters, makes gray and normalizes images by their settings.

    Args:
        x: uint8 (B, 3, H, W), on a GPU.
        settings: float32 (B, 10), on the GPU: the order of brighten 0, contrast 1, saturate 2 and
            hue 3, then their four factors, then whether to flip, and whether to make gray.
        mean: of each channel of images in [0, 1].
        std: of each channel.

    Returns:
        float32 (B, 3, H, W), channels last.
    """
    n, _, height, width = x.shape
    blocks = triton.cdiv(height * width, _BLOCK)
    sums = torch.empty(n, triton.next_power_of_2(blocks), device=x.device)
    sums[:, blocks:] = 0
    out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.channels_last)
    shape = (height, width, *x.stride())
    _sum_grays[n, blocks](x, settings, sums, sums.shape[1], *shape, BLOCK=_BLOCK)
    scale = [1 / (255 * s) for s in std]
    offset = [-m / s for m, s in zip(mean, std)]
    _distort[n, blocks](x, settings, sums, out, *shape, *scale, *offset,
                        BLOCK=_BLOCK, PARTS=sums.shape[1])
    return out


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _gray(red, green, blue):
    return 0.299 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _channel(n, sixths, most, spread):
    """A channel of the colour whose hue is `sixths` of a sixth circle: n is 5, 3 or 1."""
    k = n + sixths
    k = k - 6.0 * tl.floor(k / 6.0)
    return most - spread * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)


@triton.jit
def _jitter(operation, factor, mean, red, green, blue):
    """Applies one of the four operations; contrast mixes with `mean`."""
    if operation == 0.0:
        red, green, blue = _clip(factor * red), _clip(factor * green), _clip(factor * blue)
    elif operation == 1.0:
        other = (1.0 - factor) * mean
        red = _clip(factor * red + other)
        green = _clip(factor * green + other)
        blue = _clip(factor * blue + other)
    elif operation == 2.0:
        gray = (1.0 - factor) * _gray(red, green, blue)
        red = _clip(factor * red + gray)
        green = _clip(factor * green + gray)
        blue = _clip(factor * blue + gray)
    else:
        most = tl.maximum(tl.maximum(red, green), blue)
        spread = most - tl.minimum(tl.minimum(red, green), blue)
        each = tl.where(spread > 0.0, spread, 1.0)
        sixths = tl.where(most == red, (green - blue) / each,
                          tl.where(most == green, 2.0 + (blue - red) / each,
                                   4.0 + (red - green) / each)) + 6.0 * factor
        red = _channel(5.0, sixths, most, spread)
        green = _channel(3.0, sixths, most, spread)
        blue = _channel(1.0, sixths, most, spread)
    return red, green, blue


@triton.jit
def _load(x, image, pixel, is_there, flip, width, image_step, channel_step, row_step, step):
    row, column = pixel // width, pixel % width
    column = tl.where(flip > 0.0, width - 1 - column, column)
    x += image.to(tl.int64) * image_step + row * row_step + column * step
    return (tl.load(x, is_there, 0).to(tl.float32),
            tl.load(x + channel_step, is_there, 0).to(tl.float32),
            tl.load(x + 2 * channel_step, is_there, 0).to(tl.float32))


@triton.jit
def _sum_grays(x, settings, sums, n_parts, height, width, image_step, channel_step, row_step, step,
               BLOCK: tl.constexpr):
    """Sums a part of an image's grays, as they are before contrast."""
    image, part = tl.program_id(0), tl.program_id(1)
    settings += image * 10
    pixel = part * BLOCK + tl.arange(0, BLOCK)
    is_there = pixel < height * width
    red, green, blue = _load(x, image, pixel, is_there, 0.0, width, image_step, channel_step,
                             row_step, step)
    is_before = 1.0
    for turn in tl.static_range(4):
        operation = tl.load(settings + turn)
        if operation == 1.0:
            is_before = 0.0
        if is_before > 0.0:
            factor = tl.load(settings + 4 + operation.to(tl.int32))
            red, green, blue = _jitter(operation, factor, 0.0, red, green, blue)
    gray = tl.where(is_there, _gray(red, green, blue), 0.0)
    tl.store(sums + image * n_parts + part, tl.sum(gray, axis=0))


@triton.jit
def _distort(x, settings, sums, out, height, width, image_step, channel_step, row_step, step,
             scale_0, scale_1, scale_2, offset_0, offset_1, offset_2,
             BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Applies all operations to a part of an image."""
    image, part = tl.program_id(0), tl.program_id(1)
    settings += image * 10
    pixel = part * BLOCK + tl.arange(0, BLOCK)
    is_there = pixel < height * width
    mean = tl.sum(tl.load(sums + image * PARTS + tl.arange(0, PARTS)), axis=0) / (height * width)
    red, green, blue = _load(x, image, pixel, is_there, tl.load(settings + 8), width, image_step,
                             channel_step, row_step, step)
    for turn in tl.static_range(4):
        operation = tl.load(settings + turn)
        factor = tl.load(settings + 4 + operation.to(tl.int32))
        red, green, blue = _jitter(operation, factor, mean, red, green, blue)
    if tl.load(settings + 9) > 0.0:
        red = _gray(red, green, blue)
        green = red
        blue = red
    out += (image.to(tl.int64) * height * width + pixel) * 3
    tl.store(out, red * scale_0 + offset_0, is_there)
    tl.store(out + 1, green * scale_1 + offset_1, is_there)
    tl.store(out + 2, blue * scale_2 + offset_2, is_there)
