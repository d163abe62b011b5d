"""Fast mode's colour jitter on a GPU: all images of a step in two kernels, written in Triton.

The first finds the mean gray that contrast mixes with; the second does everything else.
Colours are in [0, 255] and clipped after each operation, as torchvision's are on float images.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def distort(x: Tensor, settings: Tensor, mean: tuple, std: tuple) -> Tensor:
    """Images flipped, jittered, made gray and normalized as their settings say.

    Args:
        x: uint8 (B, 3, H, W), on a GPU.
        settings: float32 (B, 10), there too: the order of brighten 0, contrast 1, saturate 2 and
            hue 3, then the four's factors, then whether to flip, and whether to make gray.
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
    """A channel of the colour whose hue is `sixths` of the circle: n is 5, 3 or 1."""
    k = n + sixths
    k = k - 6.0 * tl.floor(k / 6.0)
    return most - spread * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)


@triton.jit
def _jitter(operation, factor, mean, red, green, blue):
    """One of the four operations; the contrast's other colour is `mean`."""
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
    """A part's sum of the grays that an image has when its contrast's turn comes."""
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
    """A part of an image: everything."""
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
