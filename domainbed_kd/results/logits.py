"""What runs leave for analysis: all their records as a table, and the logits that they kept.

`to_frame` reads every recorded value. At each checkpoint, `train --save_logits` keeps predictions
on the `out` split of every domain and the `in` split of the test domains. See docs/analysis.md.
"""

import contextlib
import os
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from domainbed_kd.folder import curves, files
from domainbed_kd.results.selection import IIDAccuracySelectionMethod

if TYPE_CHECKING:
    import pandas as pd


class Predictions(NamedTuple):
    """A predictor's outputs on a split, in the order of `index`."""

    #: (N, C) float32, with a largest value of 0 in each row; C is 2 also for a single logit.
    logits: np.ndarray
    #: (N,) the true classes.
    labels: np.ndarray
    #: (N,) each image's number in its domain, which is the same in every run.
    index: np.ndarray  # type: ignore[assignment]  # a tuple has a method of that name


def to_frame(input_dir: str | Path, skipped: list[str] | None = None) -> "pd.DataFrame":
    """A pandas DataFrame with a row for each record of a run or of a sweep's runs.

    Columns are named as in results.jsonl, with a dot for each level of nesting: `env0_in_acc`,
    `loss`, `args.algorithm`, `hparams.lr`, `diagnostics.weight_distance`. Four are added: `run`
    (the folder's name), `val_acc` (mean over the training domains' out-splits), `test_acc` (mean
    over the test domains' in-splits) and `selected` (whether training-domain validation chooses
    this checkpoint of its run). SCMD records a share of samples as `selected`; here it is
    `selected_share`. `args.algorithm` is the table row, such as "MTL (mended)"; see `curves.row`.
    Lists, such as `args.test_envs`, are tuples, and objects in them are tuples of pairs.

    What the tables skip is skipped here too: lines that `curves.problem` refuses, and files that
    cannot be read. So are lines with integers beyond 63 bits or nested too deeply.

    Args:
        input_dir: folder of the run or the sweep.
        skipped: receives a line on each file that is skipped or not read completely; without it
            these lines go to stderr.

    Raises:
        FileNotFoundError: if neither the folder nor a folder in it holds a results.jsonl.
    """
    import pandas as pd

    rows, left_out = [], [] if skipped is None else skipped
    for run in _runs(Path(input_dir)):
        try:
            rows += _with_choice(run.name, curves.read_records(run, left_out))
        except OSError as error:
            left_out.append(f"{run / files.RESULTS}: {error.strerror}")
    if skipped is None:
        curves.say_skipped(left_out)
    return pd.DataFrame([dict(_flat(row)) for row in rows])


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Pairs of dotted name and value; args come last, so that no other key replaces them."""
    for name, item in sorted(value.items(), key=lambda pair: not prefix and pair[0] == "args"):
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield prefix + name, _frozen(item)


def _frozen(value: object) -> object:
    """A value with tuples in place of lists, at any depth, so that pandas can group by it."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return tuple((k, _frozen(v)) for k, v in value.items()) if isinstance(value, dict) else value


def _runs(folder: Path) -> list[Path]:
    found = [run for run in (folder, *filter(Path.is_dir, sorted(folder.iterdir())))
             if not os.access(run, os.X_OK) or (run / files.RESULTS).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: neither it nor a folder in it holds a results.jsonl.")
    return found


def _with_choice(run: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with `run`, `val_acc`, `test_acc` and `selected` added."""
    chosen = curves.selected(records)
    shares = [{"selected_share": r["selected"]} if "selected" in r else {} for r in records]
    return [{"run": run} | record | share | {
        "args": {**record["args"], "algorithm": curves.row(record["args"])},
        "run": run, "val_acc": curves.validation_accuracy(record),
        "test_acc": curves.test_accuracy(record), "selected": record is chosen}
        for record, share in zip(records, shares)]


# Logits that a run kept.

#: What reading an .npz file may raise, whoever wrote it.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError,
              zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def read_arrays(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The arrays of an .npz file, which must be a regular file; nothing in it is unpickled."""
    with files.open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
        yield arrays


def steps(run: str | Path) -> list[int]:
    """The steps at which a run kept its logits, in order."""
    folder = Path(run, files.LOGITS)
    names = (re.fullmatch(r"step(\d+)\.npz", path.name) for path in folder.glob("*"))
    found = sorted(int(name[1]) for name in names if name)
    if not found:
        raise FileNotFoundError(f"{run} holds no logits. Train it with --save_logits.")
    return found


def load_logits(run: str | Path, step: int | None = None) -> dict[str, Predictions]:
    """A checkpoint's predictions by split: `env0_out`, and `env3_in` if 3 is a test domain.

    Args:
        run: the run's folder.
        step: of the checkpoint; None for the one that training-domain validation selects.

    Raises:
        FileNotFoundError: if the run kept no logits there.
    """
    known = steps(run)
    if step is None:
        if (chosen := curves.selected(records(run))) is None:
            raise FileNotFoundError(f"{run} kept no logits at a step that it recorded.")
        step = chosen["step"]
    if step not in known:
        raise FileNotFoundError(f"{run} kept no logits at step {step}, but at "
                                f"{', '.join(map(str, known))}.")
    with read_arrays(Path(run, files.LOGITS, f"step{step}.npz")) as arrays:
        names = dict.fromkeys(name.split(".")[0] for name in arrays)
        return {name: Predictions(arrays[f"{name}.logits"].astype(np.float32),
                                  arrays[f"{name}.labels"], arrays[f"{name}.index"])
                for name in names}


def records(run: str | Path) -> list[dict[str, Any]]:
    """A run's records with accuracies computed from its logits, for `model_selection`'s rules.

    They have `step`, `args`, `hparams`, `selection` if there is one, and the accuracies of the
    splits whose logits are kept.
    """
    recorded = {record["step"]: record for record in curves.read_records(run)}
    return [{name: recorded[step][name] for name in ("step", "args", "hparams", "selection")
             if name in recorded[step]}
            | {f"{name}_acc": accuracy(p) for name, p in load_logits(run, step).items()}
            for step in steps(run) if step in recorded]


class Chosen(NamedTuple):
    """A run that model selection chose, with its kept predictions at the chosen checkpoint."""

    #: Number of its test domain.
    env: int
    args: dict[str, Any]
    #: By split, as `load_logits` returns them.
    predictions: dict[str, Predictions]


def chosen(input_dir: str | Path, found: list[curves.Curve]
           ) -> tuple[dict[str, dict[str, list[Chosen]]], str]:
    """The selected run of each trial, row and test domain, by training-domain validation.

    Returns {dataset: {table row: runs}}, of those that kept their logits, and a sentence on the
    others, which begins with a space.
    """
    runs: dict[str, dict[str, list[Chosen]]] = defaultdict(lambda: defaultdict(list))
    n_without = 0
    for (_, dataset, algorithm, env), search in curves.searches(found).items():
        for _, draw in IIDAccuracySelectionMethod.hparams_accs(search)[:1]:
            curve = next(curve for curve in draw if len(curve.args["test_envs"]) != 2)
            run = Path(input_dir, os.path.basename(str(curve.args["output_dir"])))
            try:
                predictions = load_logits(run)
                predictions[f"env{env}_in"]
            except UNREADABLE:
                n_without += 1
                continue
            runs[dataset][algorithm].append(Chosen(env, curve.args, predictions))
    if not runs:
        raise ValueError(f"{input_dir}: none of the selected runs kept its logits. Train with "
                         "--save_logits.")
    return runs, f" {n_without} selected runs kept no logits and are left out." * bool(n_without)


def whole_domain(predictions: dict[str, Predictions], env: int) -> Predictions:
    """Predictions on all kept splits of a domain, sorted by index."""
    parts = [p for name, p in predictions.items() if name.startswith(f"env{env}_")]
    if not parts:
        raise ValueError(f"There are no predictions on domain {env}, but on "
                         f"{', '.join(predictions)}.")
    joined = Predictions(*map(np.concatenate, zip(*parts)))
    return Predictions(*(part[joined.index.argsort()] for part in joined))


def ensemble(members: Iterable[Predictions]) -> Predictions:
    """The mean of the members' probabilities, on the images that all of them have.

    The logits are logarithms of the mean, minus the largest.

    Raises:
        ValueError: if there are no members, or they do not share images and classes.
    """
    members = list(members)
    if not members:
        raise ValueError("An ensemble needs members; there are none.")
    common = members[0].index
    for member in members[1:]:
        common = np.intersect1d(common, member.index)
    picked = [Predictions(*(part[np.searchsorted(m.index, common)] for part in m))
              for m in members]
    if not len(common) or any(p.logits.shape != picked[0].logits.shape
                              or (p.labels != picked[0].labels).any() for p in picked):
        raise ValueError("These predictions cannot be averaged: they have no image in common, or "
                         "different classes. Take runs on one dataset, and the same domain of "
                         "each.")
    # In double precision, so that very unlikely classes keep their order.
    mean = np.log(np.mean([probabilities(p) for p in picked], axis=0) + np.finfo(float).tiny)
    return Predictions((mean - mean.max(axis=1, keepdims=True)).astype(np.float32),
                       picked[0].labels, common)


def probabilities(predictions: Predictions) -> np.ndarray:
    """Softmax of the logits, float64 (N, C)."""
    exp = np.exp(predictions.logits.astype(np.float64))
    return exp / exp.sum(axis=1, keepdims=True)


def accuracy(predictions: Predictions) -> float:
    """Share of correct predictions, in [0, 1]."""
    return float((predictions.logits.argmax(axis=1) == predictions.labels).mean())


def confusion(predictions: Predictions) -> np.ndarray:
    """Counts (C, C): a row for each true class, a column for each prediction."""
    n = predictions.logits.shape[1]
    pairs = predictions.labels * n + predictions.logits.argmax(axis=1)
    return np.bincount(pairs, minlength=n * n).reshape(n, n)


def class_errors(predictions: Predictions) -> np.ndarray:
    """Share of wrong predictions for each class, (C,); NaN for a class without images."""
    counts = confusion(predictions)
    n_images = counts.sum(axis=1)
    return 1 - np.divide(np.diag(counts), n_images, where=n_images > 0,
                         out=np.full(len(counts), np.nan))
