"""The random streams of DomainBed's workers, and what is read with them."""

import random
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.worker import _generate_state

from domainbed_kd.run.splits import SplitDataset, is_tensors


def read(dataset, indices: list[int]):
    """The items, collated: [x (B, ...), y (B,)]."""
    if isinstance(dataset, SplitDataset) and is_tensors(dataset.underlying_dataset):
        keys = [dataset.keys[i] for i in indices]
        return [tensor[keys] for tensor in dataset.underlying_dataset.tensors]
    return default_collate([dataset[i] for i in indices])


class Turn(NamedTuple):
    """A worker's number, what all are seeded from, and its streams; None before its first batch."""

    seed: int
    worker: int
    streams: tuple | None

    def read(self, dataset, indices: list[int]) -> tuple:
        """The items, collated, and the streams afterwards, which are this process's now."""
        if self.streams is None:
            random.seed(self.seed + self.worker)
            torch.default_generator.manual_seed(self.seed + self.worker)  # the CPU's alone
            np.random.seed(_generate_state(self.seed, self.worker))
        else:
            set_streams(self.streams)
        return read(dataset, indices), get_streams()


# Streams: (random's, NumPy's, torch's as an array, which crosses processes as plain bytes).


def get_streams() -> tuple:
    """This process's streams."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()


def set_streams(streams: tuple) -> None:
    """Puts `get_streams` back."""
    python, numpy, torchs = streams
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch.from_numpy(torchs))


def to_plain(streams: tuple) -> dict:
    """What torch.load(weights_only=True) can read."""
    (version, words, gauss), (kind, keys, *rest), torchs = streams
    return {"python": [version, torch.tensor(words), gauss],
            "numpy": [kind, torch.tensor(keys.astype(np.int64)), *rest],
            "torch": torch.from_numpy(torchs)}


def from_plain(plain: dict) -> tuple:
    """The inverse of `to_plain`."""
    version, words, gauss = plain["python"]
    kind, keys, *rest = plain["numpy"]
    return ((version, tuple(words.tolist()), gauss),
            (kind, keys.numpy().astype(np.uint32), *rest), plain["torch"].numpy())
