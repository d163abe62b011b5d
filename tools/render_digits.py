"""Draws varied handwritten digits in many looks, each image with a caption.

    python tools/render_digits.py sheet.png

writes a sheet of examples and prints their captions. No handwriting data are used: a digit is a few
strokes through points that were placed by hand, and every image moves the points.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32  # pixels
N_POINTS = 64  # of each digit's path
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMERALS = tuple("0123456789")
PATTERNS = ("flat", "shaded", "striped", "chequered", "dotted", "blotched", "grainy")
GREYS = {"black": (0.05, 0.05, 0.05), "white": (0.95, 0.95, 0.95), "grey": (0.5, 0.5, 0.5)}
COLOURS = GREYS | {
    "red": (0.85, 0.1, 0.1), "green": (0.1, 0.6, 0.15), "blue": (0.1, 0.2, 0.8),
    "yellow": (0.95, 0.9, 0.2), "orange": (0.95, 0.55, 0.1), "purple": (0.45, 0.1, 0.55),
    "pink": (0.95, 0.6, 0.75), "brown": (0.4, 0.25, 0.1), "cyan": (0.2, 0.8, 0.85),
}
# Parts of captions, by what the image shows.
PROMPTS = (  # for any digit in any look; they include the methods' own
    "{}", "a {}", "a {}.", "the digit {}", "the number {}", "a photo of a {}", "a photo of a {}.",
    "a photo of the {}.", "a photo of the digit {}", "a photo of the number {}",
    "this is a photo of a {}", "itap of a {}.", "a origami {}.", "a {} in a video game.",
    "art of the {}.", "a handwritten {}", "an image of a {}", "a picture of a {}",
    "a drawing of a {}",
)
MEDIA = {
    "sketched": ("sketch", "pencil sketch", "sketched drawing"),
    "patterned": ("textured picture", "textured photo", "patterned drawing"),
    "grey": ("plain drawing", "plain photo", "simple picture"),
    "coloured": ("colourful drawing", "colorful photo", "coloured picture"),
    "any": ("photo", "picture", "drawing", "image"),
}
PENS = ("filled", "outlined", "hatched", "sketched")  # sketched: outlined and hatched
QUALITIES = ("rotated", "large", "small", "bright", "dark", "corrupted", "bad", "good", "clean")
DIGITS = ("{}", "digit {}", "number {}")
GROUNDS = ("", "", " on a {} background", " on {}")


def phrases() -> list[str]:
    """All texts that captions are made of."""
    filled = (text.format("") for text in (*PROMPTS, *DIGITS, *GROUNDS))
    return [*WORDS, *NUMERALS, *PATTERNS, *COLOURS, *sum(MEDIA.values(), ()), *PENS, *QUALITIES,
            *filled, "plain"]


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list:
    """Points of an ellipse, about 30 degrees apart; angles run clockwise from the right."""
    n = max(2, round(abs(end - start) / 30))
    angles = [math.radians(start + (end - start) * i / n) for i in range(n + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def corner(x: float, y: float) -> list:
    """A point where the pen turns sharply."""
    return [(x, y)] * 2


# The ways to write each digit: strokes, as points in the unit square, x to the right, y down.
SHAPES = {
    0: [[arc(.5, .5, .33, .45, 270, -95)], [arc(.5, .5, .24, .45, 300, -50)],
        [arc(.5, .5, .36, .42, 250, 620)]],
    1: [[[(.5, .05), (.5, .5), (.5, .95)]],
        [[(.28, .3), *corner(.55, .05), (.55, .5), (.55, .95)]],
        [[(.3, .25), *corner(.52, .05), (.52, .5), (.52, .95)],
         [(.28, .95), (.55, .95), (.8, .95)]],
        [[(.38, .14), *corner(.55, .05), (.53, .5), (.5, .95)]]],
    2: [[[*arc(.48, .3, .27, .25, 190, 385), (.5, .72), *corner(.2, .94), (.5, .94), (.82, .93)]],
        [[*arc(.48, .28, .25, .23, 200, 390), (.5, .7), (.28, .92), (.17, .83), (.33, .77),
          (.55, .9), (.83, .9)]],
        [[(.22, .17), (.5, .06), (.72, .2), (.62, .5), *corner(.22, .92), (.8, .9)]],
        [[*arc(.5, .28, .26, .23, 180, 390), (.56, .66), *corner(.22, .93), (.5, .88),
          (.85, .95)]]],
    3: [[[*arc(.45, .27, .27, .22, 205, 440), *corner(.42, .48),
          *arc(.45, .71, .32, .24, 285, 515)]],
        [[(.22, .07), (.5, .07), *corner(.76, .07), *corner(.45, .42),
          *arc(.45, .68, .3, .26, 290, 515)]],
        [[*arc(.47, .27, .24, .21, 200, 430), (.55, .48), *arc(.47, .71, .29, .23, 300, 520)]]],
    4: [[[(.36, .05), (.28, .3), *corner(.18, .58), (.5, .57), (.85, .55)],
         [(.64, .3), (.62, .6), (.6, .95)]],
        [[(.63, .95), (.63, .5), *corner(.63, .05), (.4, .35), *corner(.16, .66), (.5, .66),
          (.87, .66)]],
        [[(.22, .05), (.2, .3), *corner(.22, .52), (.5, .53), (.76, .5)],
         [(.76, .05), (.75, .5), (.73, .95)]],
        [[(.55, .05), (.35, .35), *corner(.15, .65), (.5, .66), (.85, .64)],
         [(.6, .42), (.59, .7), (.56, .95)]]],
    5: [[[(.77, .07), (.5, .07), *corner(.3, .08), *corner(.27, .43),
          *arc(.46, .67, .31, .26, 245, 505)]],
        [[(.3, .08), (.28, .25), *corner(.27, .44), *arc(.46, .67, .3, .26, 245, 510)],
         [(.3, .08), (.55, .07), (.8, .06)]],
        [[(.72, .08), (.45, .08), (.3, .25), (.45, .42), (.66, .58), (.68, .8), (.45, .94),
          (.22, .87)]]],
    6: [[[(.64, .05), (.42, .22), (.28, .48), *arc(.5, .7, .25, .24, 180, -170)]],
        [[(.45, .05), (.3, .3), (.24, .55), *arc(.5, .7, .26, .24, 170, -160)]],
        [[(.72, .12), (.5, .06), (.3, .25), (.23, .5), *arc(.49, .68, .27, .26, 170, -175)]]],
    7: [[[(.2, .08), (.5, .08), *corner(.8, .08), (.58, .5), (.42, .95)]],
        [[(.2, .08), (.5, .08), *corner(.8, .08), (.58, .5), (.42, .95)],
         [(.33, .5), (.55, .48), (.78, .46)]],
        [[(.18, .25), *corner(.2, .08), (.5, .1), *corner(.8, .07), (.55, .5), (.45, .95)]],
        [[(.2, .16), (.38, .07), (.6, .15), *corner(.8, .08), (.6, .45), (.5, .95)],
         [(.38, .52), (.58, .5), (.78, .5)]]],
    8: [[[(.72, .18), (.5, .06), (.3, .2), (.4, .4), (.65, .58), (.74, .77), (.5, .95), (.26, .78),
          (.38, .56), (.64, .38), (.72, .18)]],
        [arc(.5, .27, .22, .21, 90, 450), arc(.5, .71, .27, .24, 270, 630)],
        [[(.5, .47), (.28, .27), (.5, .06), (.7, .25), (.5, .47), (.27, .7), (.5, .95), (.73, .72),
          (.5, .47)]],
        [arc(.5, .26, .21, .2, 60, 420), arc(.5, .7, .22, .25, 300, 660)]],
    9: [[[*arc(.5, .3, .26, .25, -10, -360), *corner(.76, .28), (.75, .6), (.74, .95)]],
        [[*arc(.48, .3, .25, .25, -20, -365), *corner(.74, .3), (.68, .65), (.42, .95)]],
        [[*arc(.5, .29, .26, .23, -20, -360), (.77, .35), (.76, .75), (.55, .95), (.27, .88)]],
        [[(.72, .1), (.45, .06), (.25, .25), (.4, .47), (.65, .4), *corner(.75, .1), (.7, .55),
          (.6, .95)]]],
}


def path(strokes: list) -> Tensor:
    """Points (64, 2), evenly spaced along Catmull-Rom splines through the strokes' points."""
    pieces = []
    for stroke in strokes:
        points = torch.tensor([stroke[0], *stroke, stroke[-1]])
        a, b, c, d = (points[i:len(points) - 3 + i, None] for i in range(4))
        t = torch.arange(20)[:, None] / 20
        curve = (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t ** 2
                 + (3 * b - a - 3 * c + d) * t ** 3) / 2
        pieces.append(torch.cat([curve.flatten(0, 1), points[-1:]]))
    lengths = [(p[1:] - p[:-1]).norm(dim=1).sum() for p in pieces]
    result = []
    for piece, length in zip(pieces, lengths):
        n = max(4, round(N_POINTS * (length / sum(lengths)).item()))
        walked = F.pad((piece[1:] - piece[:-1]).norm(dim=1).cumsum(0), (1, 0))
        which = torch.searchsorted(walked, torch.linspace(0, walked[-1].item(), n))
        result.append(piece[which.clamp(max=len(piece) - 1)])
    result = torch.cat(result)
    return torch.cat([result, result[-1:].expand(N_POINTS, 2)])[:N_POINTS]


class Renderer:
    """An endless source of images of digits, their labels and captions, from a seed."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.paths = torch.stack([path(s) for shapes in SHAPES.values() for s in shapes])
        counts = torch.tensor([len(shapes) for shapes in SHAPES.values()])
        self.counts, self.first = counts, counts.cumsum(0) - counts

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """A tensor of that shape, uniform in [low, high)."""
        return low + (high - low) * torch.rand(*shape, generator=self.random)

    def chance(self, share: float, n: int) -> Tensor:
        """Booleans (n, 1, 1, 1), true with probability `share`."""
        return torch.rand(n, 1, 1, 1, generator=self.random) < share

    def integers(self, low: int, high: int, n: int) -> Tensor:
        """Integers (n,) from low to high - 1."""
        return torch.randint(low, high, (n,), generator=self.random)

    def choice(self, options: Sequence) -> object:
        """One of the options."""
        return options[torch.randint(len(options), (), generator=self.random)]

    def batch(self, n: int) -> tuple[Tensor, Tensor, list[dict]]:
        """Images (n, 3, 32, 32) in [0, 1], labels (n,), 0 to 9 repeatedly, and captions' facts."""
        labels = torch.arange(n) % 10
        facts = [{} for _ in range(n)]
        images = self.paint(self.place(self.ink(labels), facts), facts)
        return images, labels, facts

    def ink(self, labels: Tensor) -> Tensor:
        """Ink in [0, 1], (n, 1, 32, 32), of n varied digits that fill the square.

        Most are reduced to 8x8 pixels and enlarged again, as if by a coarse scanner.
        """
        n = len(labels)
        shape = self.first[labels] + (self.uniform(0, 1, n) * self.counts[labels]).long()
        last = N_POINTS - 1
        start = (6 * self.uniform(-1, 1, n, 1)).long().clamp(min=0)  # some start late or end early
        end = last - (6 * self.uniform(-1, 1, n, 1)).long().clamp(min=0)
        kept = torch.minimum(torch.maximum(torch.arange(N_POINTS), start), end)
        points = self.paths[shape].gather(1, kept[..., None].expand(-1, -1, 2))  # (n, 64, 2)

        # The whole digit is bent, and its path trembles.
        wobble = torch.zeros_like(points)
        for cycles in (0.5, 1, 2, 3):
            bend = self.uniform(-1, 1, n, 2, 2) * math.pi * cycles
            phase = self.uniform(0, 2 * math.pi, n, 2, 1, 2)
            size = 0.07 * self.uniform(0, 1, n, 1, 1) / max(1, cycles)
            wobble += size * (points @ bend + phase[:, 0]).sin()
            along = torch.arange(N_POINTS)[:, None] / N_POINTS * 2 * math.pi * cycles
            wobble += 0.5 * size * (along + phase[:, 1]).sin()
        points = points + wobble
        points[..., 0] += self.uniform(-0.3, 0.3, n, 1) * (0.5 - points[..., 1])
        turn = self.uniform(-0.2, 0.2, n, 1)
        x, y = (points - 0.5).unbind(-1)
        points = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], -1)

        # Fill the square's height, or its width if that comes first.
        points[..., 0] *= self.uniform(0.75, 1.2, n, 1)
        low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
        radius = self.uniform(0.7, 2.0, n, 1, 1)  # of the pen, in pixels of 16 x 16
        scale = (16 - 2 * radius) / (high - low).amax(-1, keepdim=True)
        points = (points - (low + high) / 2) * scale + 7.5
        y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        pixels = torch.stack([x, y], -1).view(-1, 2).float()
        away = torch.cdist(pixels.expand(n, -1, -1), points).amin(-1)  # (n, 256)
        fine = (radius[:, 0] - away + 0.5).clamp(0, 1).view(n, 1, 16, 16)
        coarse = F.interpolate(F.avg_pool2d(fine, 2), 16, mode="bicubic", align_corners=False)
        ink = torch.where(self.chance(0.7, n), coarse, fine)
        ink = F.interpolate(ink, SIZE, mode="bicubic", align_corners=False)
        contrast, half = self.uniform(7, 15, n, 1, 1, 1), self.uniform(0.35, 0.55, n, 1, 1, 1)
        return torch.sigmoid(contrast * (ink - half))

    def place(self, ink: Tensor, facts: list[dict]) -> Tensor:
        """Rotates, slants, scales and shifts the digits."""
        n = len(ink)
        angle = self.uniform(-0.15, 0.15, n) * torch.where(self.chance(0.1, n).flatten(), 4, 1)
        scale = self.uniform(0.7, 1.1, n)
        inverse = torch.stack([angle.cos(), self.uniform(-0.15, 0.15, n) - angle.sin(),
                               angle.sin(), angle.cos()], 1).view(n, 2, 2) / scale.view(n, 1, 1)
        shift = self.uniform(-0.12, 0.12, n, 2, 1)
        for fact, turned, size in zip(facts, angle.abs().tolist(), scale.tolist()):
            fact["turned"] = turned > 0.3
            fact["size"] = "large" if size > 1 else "small" if size < 0.8 else ""
        grid = F.affine_grid(torch.cat([inverse, shift], 2), ink.shape, align_corners=False)
        return F.grid_sample(ink, grid, align_corners=False)

    def paint(self, ink: Tensor, facts: list[dict]) -> Tensor:
        """Paints pen and ground, flat or patterned, coloured or grey: (n, 3, 32, 32) in [0, 1]."""
        n = len(ink)
        pattern = self.integers(-3, len(PATTERNS), n).clamp(min=0)  # flat: 40 %
        tool = self.integers(-5, len(PENS), n).clamp(min=0)  # filled: two thirds
        pen, first, second = self.colours(facts)
        ground = first + (second - first) * self.patterns(pattern)

        thick, thin = F.max_pool2d(ink, 3, 1, 1), -F.max_pool2d(-ink, 3, 1, 1)
        outline = (1.2 * (thick - thin)).clamp(0, 1) ** self.uniform(0.7, 1.3, n, 1, 1, 1)
        hatching = ink * self.patterns(self.integers(2, 4, n), longest=6)
        drawn = torch.stack([ink, outline, hatching, torch.maximum(outline, hatching)])
        drawn = drawn[tool, torch.arange(n)] * self.uniform(0.7, 1, n, 1, 1, 1)
        images = ground + (pen - ground) * drawn

        corrupted = self.chance(0.07, n)
        noise = torch.where(corrupted, 0.2, self.uniform(-0.08, 0.08, n, 1, 1, 1).clamp(min=0))
        images = images + noise * torch.randn(images.shape, generator=self.random)
        blurred = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1)
        images = torch.where(self.chance(0.15, n), blurred, images)
        images = images * torch.where(self.chance(0.1, n), self.uniform(0.4, 1, n, 1, 1, 1), 1)
        images = images.clamp(0, 1)
        light = images.mean(dim=(1, 2, 3))
        for i, fact in enumerate(facts):
            fact["pattern"], fact["tool"] = PATTERNS[pattern[i]], PENS[tool[i]]
            fact["corrupted"] = bool(corrupted[i])
            fact["light"] = "bright" if light[i] > 0.6 else "dark" if light[i] < 0.35 else ""
        return images

    def colours(self, facts: list[dict]) -> Tensor:
        """The pen's colour and two of the ground, both darker or both brighter: (3, n, 3, 1, 1).

        Three images in ten have greys only.
        """
        light = {c: 0.3 * r + 0.6 * g + 0.1 * b for c, (r, g, b) in COLOURS.items()}
        chosen = []
        for fact in facts:
            grey = bool(self.chance(0.3, 1))
            names = list(GREYS if grey else COLOURS)
            pen = self.choice(names)
            sides = [[c for c in names if light[c] < light[pen] - 0.3],
                     [c for c in names if light[c] > light[pen] + 0.3]]
            side = self.choice([side for side in sides if side])
            chosen.append((pen, self.choice(side), self.choice(side)))
            fact.update(grey=grey, pen=pen, ground=chosen[-1][1])
        values = torch.tensor([[COLOURS[c] for c in names] for names in chosen])  # (n, 3, 3)
        grey = torch.tensor([fact["grey"] for fact in facts]).view(-1, 1, 1)
        tint = self.uniform(-0.2, 0.2, *values.shape)
        values = values + torch.where(grey, tint[..., :1], tint)
        return values.clamp(0, 1).transpose(0, 1)[..., None, None]

    def patterns(self, kind: Tensor, longest: float = 11) -> Tensor:
        """Shares of the second colour, (n, 1, 32, 32) in [0, 1], by index of PATTERNS.

        Waves are 3 to `longest` pixels long.
        """
        n = len(kind)
        y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        angle = self.uniform(0, 2 * math.pi, n, 1, 1, 1)
        wave = 2 * math.pi / self.uniform(3, longest, n, 1, 1, 1)
        phase = self.uniform(0, 2 * math.pi, n, 1, 1, 1)
        u = wave * (angle.cos() * x + angle.sin() * y) + phase
        v = wave * (angle.cos() * y - angle.sin() * x)
        sharp = self.uniform(1, 6, n, 1, 1, 1)
        blobs = F.interpolate(torch.randn(n, 1, 6, 6, generator=self.random), SIZE,
                              mode="bicubic", align_corners=False)
        grain = torch.randn(n, 1, SIZE, SIZE, generator=self.random)
        signals = torch.stack([
            torch.full_like(u, -9), 0.15 * (u - phase), u.sin(), u.sin() * v.sin(),
            u.sin() + v.sin() - 1, blobs, 0.5 * grain])
        chosen = signals[kind, torch.arange(n)]
        return torch.sigmoid(2 * sharp * chosen)


def caption(label: int, fact: dict, choose: Callable) -> str:
    """A sentence about an image; `choose` draws one of a list."""
    qualities = ["rotated" if fact["turned"] else "", fact["size"], fact["light"],
                 choose(("corrupted", "bad") if fact["corrupted"] else ("good", "clean"))]
    qualities = [quality for quality in qualities if quality and choose((True, False, False))]
    patterned = fact["pattern"] != "flat"
    look = "grey" if fact["grey"] else "coloured"
    if fact["tool"] != "filled" and fact["grey"]:
        look = "sketched"
    elif patterned:
        look = "patterned"
    medium = choose(MEDIA[choose((look, look, "any"))])
    digit = choose(DIGITS).format(WORDS[label])
    described = [choose(("", fact["pen"])), choose(("", fact["tool"])), digit]
    ground = choose((fact["ground"], fact["pattern"] if patterned else "plain"))
    words = ["a", *qualities, medium, "of a", *described]
    return " ".join(word for word in words if word) + choose(GROUNDS).format(ground)


def main(argv: list[str] | None = None) -> int:
    """Writes the sheet."""
    from torchvision.utils import save_image

    parser = argparse.ArgumentParser(description="Draw a sheet of digits, ten in a row.")
    parser.add_argument("file", help="image to write, such as sheet.png")
    parser.add_argument("--seed", type=int, default=0, help="of all random draws (default: 0)")
    parser.add_argument("--rows", type=int, default=10, help="number of rows (default: 10)")
    args = parser.parse_args(argv)
    renderer = Renderer(args.seed)
    images, labels, facts = renderer.batch(10 * args.rows)
    save_image(images, args.file, nrow=10)
    for label, fact in zip(labels.tolist(), facts):
        print(caption(label, fact, renderer.choice))
    return 0


if __name__ == "__main__":
    sys.exit(main())
