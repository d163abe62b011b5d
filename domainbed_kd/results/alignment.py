"""Alignment with CLIP: a sweep's accuracy on images that CLIP's pre-training knew, and on others.

Teterwak et al., "Is Large-scale Pretraining the Secret to Good Domain Generalization?", ICLR 2025,
https://arxiv.org/abs/2412.02856: an image's alignment is the cosine of CLIP's embeddings of the
image and of a sentence with its class. Images from 0.21 up are called in-pretraining, those below
out-of-pretraining. Images below 0.15, which are often mislabelled, and above 0.40, which often show
their class as text, are left out (read in the reviews of the submission, which quote it). These
thresholds are for their CLIP, OpenCLIP's ViT-B/16. If less than half of the images lie between the
bounds, as with a CLIP whose cosines are larger, the split is at the median. All shares are over the
test images of all runs of a row together.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from domainbed_kd import datasets
from domainbed_kd.algorithms import display_name
from domainbed_kd.folder import files
from domainbed_kd.folder.curves import Curve
from domainbed_kd.results import logits, tables
from domainbed_kd.results.formats import Strings

LOWEST, SPLIT, HIGHEST = 0.15, 0.21, 0.40
# The second table also has the nearest thresholds on both sides.
_SPLITS = (0.19, SPLIT, 0.23)
# Upper bounds, not included: of the cosines up to the highest, and of all.
_ABOVE, _ANY = np.nextafter(np.float32(HIGHEST), np.float32(1)), 2.0
SENTENCE = "a photo of a {}"
FOLDER = "alignment"


class Scores(NamedTuple):
    """CLIP's scores of a domain's images, in their order."""

    #: (N,) float32, in [-1, 1]: of the image and the sentence with its class.
    cosine: np.ndarray
    #: (N,) int32: the class whose sentence is nearest.
    guess: np.ndarray


class Images(NamedTuple):
    """A row's test images, those of all its runs one after the other; (N,) each."""

    cosine: np.ndarray
    #: Whether the row's guess, and CLIP's, is right.
    right: np.ndarray
    clip_right: np.ndarray

    def accuracy(self, low: float, high: float) -> str:
        """The row's accuracy on images with a cosine from `low` up to `high`, not included."""
        return percent(self.right[(low <= self.cosine) & (self.cosine < high)])


def scores(dataset: str, data_dir: str | None, env: int, backbone: str) -> Scores:
    """A CLIP's scores on domain `env` of a dataset; `backbone` is as the hparam `clip_backbone`."""
    import torch

    from domainbed_kd import hparams_registry, teachers

    data = datasets.get_dataset_class(dataset, data_dir)(
        data_dir, [env], hparams_registry.default_hparams("ERM", dataset))
    if not data.class_names:
        raise ValueError(f"--alignment: the classes of {dataset} have no words for CLIP to read.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip = teachers.clip({"clip_backbone": backbone, "normalization": data.NORMALIZATION},
                         data.input_shape).to(device)
    text = clip.sentences([SENTENCE], data.class_names)[:, 0]
    cosine, guess = [], []
    for x, y in torch.utils.data.DataLoader(datasets.plain(data[env]), batch_size=64):
        cosines = clip.logits(x.to(device), text).cpu() / clip.scale.cpu()
        cosine.append(cosines.gather(1, y[:, None])[:, 0].numpy())
        guess.append(cosines.argmax(dim=1).numpy())
    return Scores(np.concatenate(cosine), np.concatenate(guess).astype(np.int32))


def kept_scores(folder: Path, *what) -> Scores:
    """As `scores`; reads them from `folder`, or computes them and writes them there."""
    name = re.sub(r"[^\w.-]", "_", " ".join(map(str, (what[0], *what[2:]))))
    path = folder / f"{name}.npz"
    try:
        with logits.read_arrays(path) as arrays:
            return Scores(arrays["cosine"], arrays["guess"])
    except logits.UNREADABLE:
        found = scores(*what)
    files.write_arrays(path, found._asdict())
    return found


def images(chosen: Iterable[logits.Chosen], kept: dict[int, Scores]) -> Images:
    """The test images of a row's runs on one dataset; `kept` are CLIP's scores by domain."""
    parts = []
    for run in chosen:
        test, of_clip = run.predictions[f"env{run.env}_in"], kept[run.env]
        parts.append((of_clip.cosine[test.index], test.logits.argmax(axis=1) == test.labels,
                      of_clip.guess[test.index] == test.labels))
    return Images(*map(np.concatenate, zip(*parts)))


def percent(right: np.ndarray) -> str:
    """A share in percent; "-" of no images."""
    return f"{100 * right.mean():.1f}" if len(right) else "-"


def of_sweep(input_dir: str | Path, found: list[Curve], backbone: str = "") -> list[Strings]:
    """The tables on each dataset, of those runs that kept their logits.

    CLIP's scores are kept in the sweep's folder. `backbone` is by default that of most runs.
    """
    chosen, left_out = logits.chosen(input_dir, found)
    made = []
    for dataset, rows in chosen.items():
        name = backbone or _backbone(dataset, found)
        some = next(iter(rows.values()))[0]
        envs = {run.env for row in rows.values() for run in row}
        kept = {env: kept_scores(Path(input_dir, FOLDER), dataset, some.args["data_dir"], env, name)
                for env in sorted(envs)}
        made += _tables(dataset, name, left_out, {
            row: images(rows[row], kept) for row in tables.row_order(rows)})
    return made


def _backbone(dataset: str, found: list[Curve]) -> str:
    """The CLIP that most runs on a dataset name; if none does, that of the algorithm CLIP."""
    named = [curve.hparams["clip_backbone"] for curve in found
             if curve.args["dataset"] == dataset
             and isinstance(curve.hparams.get("clip_backbone"), str)]
    return (max(sorted(set(named)), key=named.count) if named
            else datasets.facts(dataset).CLIP_BACKBONE or "ViT-B-16")


def _tables(dataset: str, backbone: str, left_out: str, rows: dict[str, Images]) -> list[Strings]:
    every = Images(*map(np.concatenate, zip(*rows.values())))
    median = float(np.median(every.cosine))
    published = [(f"{split:.2f}", LOWEST, split, _ABOVE) for split in _SPLITS]
    splits = [*published, (f"median {median:.2f}", -_ANY, median, _ANY)]
    label, low, split, high = splits[1 if np.mean(
        (LOWEST <= every.cosine) & (every.cosine < _ABOVE)) >= 0.5 else -1]
    n_known = np.mean((split <= every.cosine) & (every.cosine < high))
    n_unknown = np.mean((low <= every.cosine) & (every.cosine < split))
    reference = rows.get("ERM")
    body = [[
        display_name(name), str(len(row.right)), percent(row.right), row.accuracy(split, high),
        row.accuracy(low, split), _against(reference, row, True), _against(reference, row, False),
        percent(~row.clip_right[~row.right])] for name, row in rows.items()]
    return [
        Strings(
            f"Alignment with CLIP {backbone}, {dataset}",
            f"CLIP itself is right on {percent(every.clip_right)} %. By the split at {label} its "
            f"pre-training knows {100 * n_known:.1f} % of the images, and not "
            f"{100 * n_unknown:.1f} %.",
            [["Algorithm", "images", "all", "known", "unknown", "CLIP right", "CLIP wrong",
              "errors shared"], *body],
            "Accuracies in percent on the images of each kind"
            + (", in brackets the gain over ERM" if reference else "")
            + "; errors shared: the share of the row's errors on which CLIP errs too." + left_out),
        Strings(
            f"Known / unknown by where they are split, {dataset}", "",
            [["Algorithm", *(label for label, *_ in splits)], *([
                display_name(name), *(f"{row.accuracy(split, high)} / {row.accuracy(low, split)}"
                                      for _, low, split, high in splits)]
                for name, row in rows.items())],
            f"The published split is {SPLIT}, for OpenCLIP's ViT-B/16, without images below "
            f"{LOWEST} or above {HIGHEST:.2f}; at the median no image is left out.")]


def _against(reference: Images | None, row: Images, clip_is_right: bool) -> str:
    """The accuracy where CLIP is right, or where it is wrong; in brackets the gain over ERM."""
    own = row.right[row.clip_right == clip_is_right]
    if reference is None or reference is row or not len(own):
        return percent(own)
    theirs = reference.right[reference.clip_right == clip_is_right]
    gain = f" ({100 * (own.mean() - theirs.mean()):+.1f})" if len(theirs) else ""
    return percent(own) + gain
