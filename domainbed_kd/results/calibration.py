"""Calibration of a sweep's probabilities on held-out domains.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
https://arxiv.org/abs/1706.04599: the expected calibration error, before and after logits are
divided by the temperature that fits validation images best. Here these are the training domains'
out-splits, as images of the test domain are not available.
"""

from pathlib import Path

import numpy as np

from domainbed_kd.algorithms import display_name
from domainbed_kd.folder.curves import Curve
from domainbed_kd.results import logits, tables
from domainbed_kd.results.formats import Strings

# The highest temperature in the search; the lowest is its inverse.
_HOTTEST = 1e3


def temperature(values: np.ndarray, labels: np.ndarray) -> float:
    """The temperature in [0.001, 1000] at which logits (N, C) fit labels (N,) best.

    There the cross-entropy is least; it is convex in the inverse of the temperature.
    """
    values = values.astype(np.float64)
    true = values[np.arange(len(labels)), labels]

    def slope(inverse):
        exp = np.exp(inverse * (values - values.max(axis=1, keepdims=True)))
        return ((exp * values).sum(axis=1) / exp.sum(axis=1) - true).mean()

    low, high = -np.log(_HOTTEST), np.log(_HOTTEST)  # of the logarithm of the inverse
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(np.exp(middle)) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def error(values: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error in [0, 1]; see `losses.calibration_error`."""
    import torch

    from domainbed_kd.losses import calibration_error

    return calibration_error(torch.from_numpy(values), torch.from_numpy(labels))


def of_run(run: logits.Chosen) -> tuple[float, float, float]:
    """A run's error on its test domain, its temperature, and its error at that temperature."""
    sources = [p for name, p in run.predictions.items()
               if name.endswith("_out") and name != f"env{run.env}_out"]
    fitted = temperature(np.concatenate([p.logits for p in sources]),
                         np.concatenate([p.labels for p in sources]))
    test = run.predictions[f"env{run.env}_in"]
    return (error(test.logits, test.labels), fitted, error(test.logits / fitted, test.labels))


def of_sweep(input_dir: str | Path, found: list[Curve]) -> list[Strings]:
    """The table on each dataset: means over the selected runs that kept their logits."""
    chosen, left_out = logits.chosen(input_dir, found)
    made = []
    for dataset, rows in chosen.items():
        body = []
        for name in tables.row_order(rows):
            before, fitted, after = np.mean(list(map(of_run, rows[name])), axis=0)
            body.append([display_name(name), str(len(rows[name])), f"{100 * before:.1f}",
                         f"{fitted:.2f}", f"{100 * after:.1f}"])
        made.append(Strings(
            f"Calibration on domains never seen, {dataset}", "",
            [["Algorithm", "runs", "ECE", "temperature", "ECE scaled"], *body],
            "ECE: expected calibration error in points, 15 bins; scaled by the temperature that "
            "fits the training domains' validation images best; means over runs." + left_out))
    return made
