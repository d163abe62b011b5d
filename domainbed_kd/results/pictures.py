"""Pictures of the predictions in a segmentation sweep, drawn from files that its runs left."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from domainbed_kd.folder import files
from domainbed_kd.results import logits
from domainbed_kd.results.formats import printable
from domainbed_kd.results.plots import STYLE, WIDTH, Looks, Plot, label_of, ready, slug

MOST_VALUES = 2 ** 24  # pixels; larger files of pictures are not read


def read(run: Path, env: int) -> dict[str, np.ndarray] | None:
    """A run's pictures of a test domain: image (n, H, W, 3), label and guess (n, H, W), uint8.

    None if it left nothing, or nothing of that shape.
    """
    try:
        with logits.read_arrays(run / files.PICTURES) as arrays:
            found = {name: arrays[f"env{env}_{name}"] for name in ("image", "label", "guess")}
    except logits.UNREADABLE:
        return None
    shape = found["label"].shape
    fits = {"image": (*shape, 3), "label": shape, "guess": shape}
    if len(shape) != 3 or not 0 < np.prod(shape) <= MOST_VALUES or any(
            array.shape != fits[name] or array.dtype != np.uint8
            for name, array in found.items()):
        return None
    return found


@rc_context(STYLE | {"axes.grid": False})
def draw(dataset: str, domain: str, found: dict[str, dict], looks: Looks) -> Plot:
    """A row for each image of a held-out domain: image, labels, each algorithm's prediction.

    `found` is {algorithm: what `read` returned}.
    """
    names = looks.ordered(found)
    first = found[names[0]]
    same = [name for name in names if np.array_equal(found[name]["image"], first["image"])]
    columns = [("image", first["image"]), ("labels", _painted(first["label"])),
               *((label_of(name), _painted(found[name]["guess"])) for name in same)]
    n, height, width = first["label"].shape
    figure = Figure(figsize=(WIDTH, WIDTH / len(columns) * height / width * n + 0.35))
    axes = figure.subplots(n, len(columns), squeeze=False)
    for column, (title, images) in zip(axes.T, columns):
        column[0].set_title(title, fontsize=8)
        for axis, image in zip(column, images):
            axis.imshow(image, interpolation="nearest")
            axis.set_axis_off()
    return ready(f"{slug(dataset)}_{slug(domain)}_pictures", f"{dataset}, {printable(domain)}",
                 f"{n} images of {printable(domain)} with their labels and the predictions of "
                 f"{', '.join(map(label_of, same))}.", figure)


def _painted(masks: np.ndarray) -> np.ndarray:
    """Masks (n, H, W) in colours (n, H, W, 3): class 0 dark, ignored pixels white."""
    colours = np.full((256, 3), 255, np.uint8)
    hues = (np.arange(255) * 0.618034) % 1  # neighbouring classes get hues that are far apart
    lightness = np.array([0.95, 0.6])[np.arange(255) // 8 % 2]
    colours[:255] = 255 * hsv_to_rgb(np.stack([hues, np.full(255, 0.75), lightness], axis=1))
    colours[0] = 30
    return colours[masks]
