"""Pictures of a segmentation run's predictions, for the report."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd import datasets, tasks
from domainbed_kd.folder import files
from domainbed_kd.run.build import Run

#: Images of each test domain, and their largest side in pixels.
N_IMAGES, MOST_PIXELS = 3, 256


def save(run: Run) -> None:
    """Writes pictures.npz: the first images of each test domain's in-split, labels, predictions.

    Arrays for test domain i are `env{i}_image` uint8 (n, H, W, 3), `env{i}_label` and
    `env{i}_guess` uint8 (n, H, W), where 255 is ignored.
    """
    found = {}
    run.algorithm.eval()
    with torch.no_grad(), run.autocast():
        for i in run.args["test_envs"]:
            split = datasets.plain(run.splits.in_[i])
            shown = [_of_one(run, *split[k]) for k in range(min(N_IMAGES, len(split)))]
            shown = [each for each in shown if each[1].shape == shown[0][1].shape]
            for name, parts in zip(("image", "label", "guess"), zip(*shown)):
                found[f"env{i}_{name}"] = np.stack(parts)
    run.algorithm.train()
    files.write_arrays(run.folder / files.PICTURES, found)


def _of_one(run: Run, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits = run.algorithm.predict(x[None].to(run.device)).float().cpu()
    step = -(-max(y.shape) // MOST_PIXELS)
    label = y.masked_fill(y == tasks.IGNORED, 255)[::step, ::step]
    guess = F.interpolate(logits, y.shape, mode="bilinear").argmax(1)[0, ::step, ::step]
    mean, std = run.dataset.NORMALIZATION or ((0, 0, 0), (1, 1, 1))
    image = F.interpolate(x[None].float(), label.shape, mode="bilinear", antialias=True)[0]
    image = image * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    image = (255 * image.clamp(0, 1)).round().permute(1, 2, 0)
    return tuple(part.to(torch.uint8).numpy() for part in (image, label, guess))
