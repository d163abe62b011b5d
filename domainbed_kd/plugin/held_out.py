"""SWAD in a fork's own loop, validated on the images that the fork holds out."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, RandomSampler

from domainbed_kd.algorithms.base import Algorithm
from domainbed_kd.plugin import sightings
from domainbed_kd.seeds import forked_rng


def end_step(core: Algorithm, method: str, num_domains: int, step: int) -> None:
    """Does what our training loop does for SWAD after an update, the `step`-th from 0.

    The images are augmented, as the fork's own validation images are. Random streams stay as they
    were.

    Raises:
        ValueError: if the fork's split, or its number of steps, was not seen.
    """
    seen, n_steps = sightings.seen(), core.hparams.get("total_steps")
    splits = seen.splits(num_domains)
    if splits is None or n_steps is None:
        what = "which images this fork holds out" if splits is None else "the number of steps"
        raise ValueError(f"{method}: SWAD needs to know {what}, and the plug-in could not find "
                         "out. Use \"averaging\": \"sma\", or our `train`.")
    device = next(core.network.parameters()).device
    workers = getattr(seen.dataset, "N_WORKERS", 0)

    def validate(predict) -> float:
        losses = []
        core.eval()
        with _streams_kept(), torch.no_grad():
            for images, _ in splits:
                loss = sum(F.cross_entropy(predict(x.to(device)), y.to(device), reduction="sum")
                           for x, y in DataLoader(images, 64, num_workers=workers))
                losses.append(float(loss) / len(images))
        core.train()
        return sum(losses) / len(losses)

    def batches(n: int) -> Iterator[list]:
        size = core.hparams["batch_size"]
        with _streams_kept():
            for minibatches in zip(*(DataLoader(
                    images, size, sampler=RandomSampler(images, True, n * size),
                    num_workers=workers) for _, images in splits)):
                yield [(x.to(device), y.to(device)) for x, y in minibatches]

    core.checkpoint(step, step == n_steps - 1, validate, batches)


@contextlib.contextmanager
def _streams_kept() -> Iterator[None]:
    """As `forked_rng`, for Python's and NumPy's streams too, from which old augmentations draw."""
    states = random.getstate(), np.random.get_state()
    with forked_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
