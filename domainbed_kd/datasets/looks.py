"""Draws DigitsDG and DigitsSeg: the UCI optical digits in four looks, each with its own digits.

The 8x8 images are enlarged to 32x32 with a random slant, rotation and shift, so that strokes are
about five pixels wide; then each domain renders them in its style. All random numbers come from a
private stream with a fixed seed: the images are the same on every machine, and global streams stay
unchanged.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

ASSET = Path(__file__).parents[1] / "assets" / "digits.npz"
SIZE = 32
#: The largest shift of a canvas, in pixels.
MOST_ROLL = 6
#: Steps that grow a mask by a pixel each; whether to grow diagonally too.
GROWN = (False, True, False)


def domains() -> list[tuple[np.ndarray, np.ndarray]]:
    """(images, labels) of the domains plain, colour, texture, sketch.

    Images are uint8 (N, 32, 32, 3) and labels int64 (N,), in random order. A class's counts in two
    domains differ by at most one.
    """
    return [(_as_bytes(look(ink, random)), labels) for look, ink, labels, random in _dealt()]


def canvases() -> list[tuple[np.ndarray, np.ndarray]]:
    """(images, masks) of the same domains: each digit once, four to a canvas.

    Images are uint8 (112, 64, 64, 3). Masks are int64 (112, 64, 64): 0 is background, and the
    digit plus 1 marks its strokes, grown by `GROWN`. Canvases are shifted by up to `MOST_ROLL`
    pixels in both directions, wrapping around the edges.
    """
    result = []
    for look, ink, labels, random in _dealt():
        n = len(ink) // 4
        tiles = ink[:4 * n].reshape(n, 2, 2, SIZE, SIZE).transpose(0, 1, 3, 2, 4)
        names = labels[:4 * n].reshape(n, 2, 1, 2, 1) + 1
        masks = (tiles > 0.5) * names
        shape = n, 2 * SIZE, 2 * SIZE
        ink, masks = tiles.reshape(shape), masks.reshape(shape)
        for i, shift in enumerate(random.randint(-MOST_ROLL, MOST_ROLL + 1, (n, 2))):
            ink[i] = np.roll(ink[i], shift, (0, 1))
            masks[i] = np.roll(masks[i], shift, (0, 1))
        for diagonal in GROWN:
            masks = _grown(masks, diagonal)
        result.append((_as_bytes(look(ink, random)), masks))
    return result


def _dealt() -> Iterator[tuple]:
    """Each domain's look, its digits' ink (N, 32, 32) and labels (N,), and the random stream."""
    with np.load(ASSET) as file:
        images, labels = file["images"] / 16.0, file["labels"].astype(np.int64)
    random = np.random.RandomState(0)
    order = random.permutation(len(images))
    order = order[np.argsort(labels[order], kind="stable")]
    for i, look in enumerate((plain, colour, texture, sketch)):
        chosen = random.permutation(order[i::4])
        yield look, strokes(images[chosen], random), labels[chosen], random


def _as_bytes(painted: np.ndarray) -> np.ndarray:
    # Not 0.5: the last bit must not decide how values half-way between integers are rounded.
    return np.floor(255 * painted.clip(0, 1) + 0.4987).astype(np.uint8)


def _grown(masks: np.ndarray, diagonal: bool) -> np.ndarray:
    """Masks (N, H, W) with background pixels next to a class set to it; ties to the largest."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    height, width = masks.shape[1:]
    near = [padded[:, 1 + y:1 + y + height, 1 + x:1 + x + width]
            for y in (-1, 0, 1) for x in (-1, 0, 1) if diagonal or not (x and y)]
    return np.where(masks > 0, masks, np.max(near, axis=0))


def strokes(images: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Ink in [0, 1], (N, 32, 32), of images (N, 8, 8) in [0, 1], each slightly transformed."""
    n = len(images)
    angle = random.uniform(-0.1, 0.1, (n, 1, 1))
    slant = random.uniform(-0.1, 0.1, (n, 1, 1))
    scale = 8 / random.uniform(28, 32, (n, 1, 1))  # source pixels per target pixel
    shift = random.uniform(-1, 1, (2, n, 1, 1))
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    y, x = y - shift[0], x - shift[1]
    x = x + slant * y
    source_y = scale * (np.cos(angle) * y + np.sin(angle) * x) + 3.5
    source_x = scale * (np.cos(angle) * x - np.sin(angle) * y) + 3.5
    ink = _sample(images, source_y, source_x)
    return 1 / (1 + np.exp(-12 * (ink - 0.45)))


def _sample(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Images (N, H, W) at points (N, h, w), by Catmull-Rom splines; 0 outside."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4)))
    which = np.arange(len(images))[:, None, None]
    limit = padded.shape[1] - 3
    y, x = (y + 4).clip(1, limit), (x + 4).clip(1, limit)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    rows, columns = _spline(y - top), _spline(x - left)
    return sum(rows[i] * columns[j] * padded[which, top + i - 1, left + j - 1]
               for i in range(4) for j in range(4))


def _spline(t: np.ndarray) -> tuple:
    """The four weights of the Catmull-Rom cubic at t in [0, 1) between the middle two points."""
    return (t * (-0.5 + t * (1 - 0.5 * t)), 1 + t * t * (1.5 * t - 2.5),
            t * (0.5 + t * (2 - 1.5 * t)), t * t * (0.5 * t - 0.5))


def plain(ink: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """White on black: images (N, H, W, 3) in [0, 1] of ink (N, H, W), as all looks return."""
    return np.repeat(ink[..., None], 3, axis=-1)


def colour(ink: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """One flat colour on another, light on dark or dark on light."""
    background, pen = _two_colours(len(ink), random, 0.5)
    return _mix(background, pen, ink)


def texture(ink: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """A dark pen on stripes or a chequer of two light colours."""
    n = len(ink)
    background, pen = _two_colours(n, random, 0.0)
    other = random.uniform(0.45, 1, background.shape)
    direction, phase = random.uniform(0, 2 * np.pi, (2, n, 1, 1))
    length = random.uniform(4, 9, (n, 1, 1))  # pixels
    y, x = np.mgrid[:ink.shape[1], :ink.shape[2]]
    wave = np.sin(2 * np.pi / length * (np.cos(direction) * x + np.sin(direction) * y) + phase)
    cross = np.sin(2 * np.pi / length * (np.cos(direction) * y - np.sin(direction) * x))
    chequered = random.uniform(size=(n, 1, 1)) < 0.5
    pattern = 0.5 + 0.5 * np.tanh(3 * np.where(chequered, wave * cross, wave))
    return _mix(_mix(background, other, pattern), pen, ink)


def sketch(ink: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """The strokes' outlines in pencil, hatched inside, on grainy white paper."""
    outline = (4 * ink * (1 - ink)) ** 0.7
    y, x = np.mgrid[:ink.shape[1], :ink.shape[2]]
    hatching = 0.8 * ink * ((x + y) % 4 > 0)
    pressure = random.uniform(0.7, 1, (len(ink), 1, 1))
    grain = random.uniform(-0.06, 0.06, ink.shape)
    grey = 0.95 - pressure * np.maximum(outline, hatching) + grain
    return np.repeat(grey[..., None], 3, axis=-1)


def _two_colours(n: int, random: np.random.RandomState,
                 light_pens: float) -> tuple[np.ndarray, np.ndarray]:
    """Background and pen per image, each (n, 1, 1, 3); `light_pens`: the share of lighter pens."""
    dark = random.uniform(0, 0.45, (n, 1, 1, 3))
    light = random.uniform(0.55, 1, (n, 1, 1, 3))
    lighter = random.uniform(size=(n, 1, 1, 1)) < light_pens
    return np.where(lighter, dark, light), np.where(lighter, light, dark)


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Mixes two colours; `share` (N, H, W) in [0, 1] is that of the second."""
    return first + (second - first) * share[..., None]
