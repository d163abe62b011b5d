"""Splits and loaders that draw DomainBed's random numbers, in its order.

DomainBed reads images with eight worker processes per loader. Which numbers it draws depends on
them twice: their prefetching draws indices ahead of need, and each worker augments its images with
random streams of its own. Both are simulated here, so that batches, and what is left in the global
streams, are DomainBed's whatever the number of real processes, and a loader's position can be
saved and put back.
"""

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    TensorDataset,
    default_collate,
)
from torch.utils.data._utils.worker import _generate_state

from domainbed_kd import machine
from domainbed_kd.seeds import seed_hash


class _SplitDataset:
    """The items of a data set at `keys`, read when they are asked for.

    A split of a split refers to the data set itself: `underlying_dataset` is never a split.
    """

    def __init__(self, dataset, keys: list[int], name: str):
        if isinstance(dataset, _SplitDataset):
            keys = [dataset.keys[key] for key in keys]
            dataset = dataset.underlying_dataset
        self.underlying_dataset = dataset
        self.keys = keys
        self.name = name

    def __getitem__(self, index):
        return self.underlying_dataset[self.keys[index]]

    def __len__(self):
        return len(self.keys)


class Splits(NamedTuple):
    """Per environment: the in-split, the out-split, and unlabeled images or None."""

    in_: list
    out: list
    uda: list


def split_dataset(dataset, n: int, seed: int = 0, names: tuple[str, str] = ("", "")) -> tuple:
    """Two views of a data set, shuffled by `seed`: `n` items and the others.

    Args:
        dataset: any map-style data set.
        n: the size of the first view.
        seed: of the shuffle.
        names: what messages call the two.

    Raises:
        ValueError: if n is negative or more than there are.
    """
    if not 0 <= n <= len(dataset):
        raise ValueError(f"Cannot split {n} items off a data set of {len(dataset)}. "
                         "Fractions must be between 0 and 1.")
    keys = list(range(len(dataset)))
    np.random.RandomState(seed).shuffle(keys)
    return _SplitDataset(dataset, keys[:n], names[0]), _SplitDataset(dataset, keys[n:], names[1])


def make_splits(dataset, test_envs: list[int], trial_seed: int, holdout_fraction: float,
                uda_holdout_fraction: float = 0) -> Splits:
    """The splits of every environment, as DomainBed makes them.

    The out-split is `holdout_fraction` of an environment. Of a test environment's in-split,
    `uda_holdout_fraction` is set apart as unlabeled images; even a fraction of 0 reorders it.

    Raises:
        ValueError: if an in-split or out-split is empty.
    """
    splits = Splits([], [], [])
    for i, env in enumerate(dataset):
        seed = seed_hash(trial_seed, i)
        names = f"The out-split of environment {i}", f"The in-split of environment {i}"
        out, in_ = split_dataset(env, int(len(env) * holdout_fraction), seed, names)
        uda = None
        if i in test_envs:
            names = f"The unlabeled split of environment {i}", names[1]
            uda, in_ = split_dataset(in_, int(len(in_) * uda_holdout_fraction), seed, names)
        for split in (out, in_):
            if len(split) == 0:
                raise ValueError(
                    f"{split.name} is empty: it has {len(env)} images, --holdout_fraction is "
                    f"{holdout_fraction}, --uda_holdout_fraction {uda_holdout_fraction}. "
                    "Choose other fractions.")
        splits.in_.append(in_)
        splits.out.append(out)
        splits.uda.append(uda or None)
    return splits


def class_weights(split) -> Tensor:
    """A weight per item, float32 (N,), sum 1: classes weigh the same, and so do a class's items.

    Like DomainBed, this reads every image where reading one draws random numbers (augmented
    images), so that the same numbers are drawn; elsewhere labels are looked up.
    """
    labels = _labels(split)
    counts = Counter(labels)
    return torch.tensor([1 / (counts[y] * len(counts)) for y in labels])


def _labels(split) -> list[int]:
    dataset = split.underlying_dataset
    if _is_tensors(dataset):
        return dataset.tensors[1][split.keys].tolist()
    augmented = getattr(dataset, "transform", None) is not getattr(dataset, "plain_transform", None)
    if hasattr(dataset, "targets") and not augmented:
        return [dataset.targets[key] for key in split.keys]
    return [int(split[i][1]) for i in range(len(split))]


class InfiniteDataLoader:
    """Endless full batches, drawn with replacement: its own iterator.

    Args:
        dataset: a split, or any map-style data set.
        weights: None, or how often to draw each item: (N,), need not sum to 1.
        batch_size: items per batch.
        num_workers: the number of DomainBed's workers to simulate.
        readers: real processes that read images ahead; None reads them here. Results do not
            depend on it.
        replacement: False visits all items before one returns (DomainBed's auto-lr loader).

    Raises:
        ValueError: if there are fewer items than a batch needs.
    """

    def __init__(self, dataset, weights, batch_size: int, num_workers: int,
                 readers: "Readers | None" = None, replacement: bool = True):
        if weights is not None:
            sampler = _WeightedBatches(weights, batch_size)
        elif len(dataset) < batch_size:
            raise ValueError(
                f"{getattr(dataset, 'name', '') or 'The data set'} holds {len(dataset)} images, "
                f"which is less than a batch of {batch_size}. Lower batch_size, for example with "
                f"--hparams '{{\"batch_size\": {max(len(dataset) // 2, 1)}}}'.")
        else:
            sampler = _Passes(len(dataset), batch_size, replacement, drop_last=True)
        self._batches = _Batches(dataset, sampler, num_workers, readers)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        return self._batches.take()

    @property
    def indices(self) -> list[int]:
        """Which items the batch consists of that was returned last."""
        return self._batches.indices

    def __len__(self):
        raise ValueError("An InfiniteDataLoader has no length.")

    def state_dict(self) -> dict:
        """The position, and every random stream that later batches depend on."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state` was taken, on the same data with the same batch size."""
        self._batches.load_state_dict(state)


class FastDataLoader:
    """Batches of all items once, in a new random order in each pass; the last may be short.

    Arguments are those of InfiniteDataLoader.

    Raises:
        ValueError: if there are no items.
    """

    def __init__(self, dataset, batch_size: int, num_workers: int,
                 readers: "Readers | None" = None):
        if len(dataset) == 0:
            raise ValueError(f"{getattr(dataset, 'name', '') or 'The data set'} is empty.")
        self._length = -(-len(dataset) // batch_size)
        sampler = _Passes(len(dataset), batch_size, replacement=False, drop_last=False)
        self._batches = _Batches(dataset, sampler, num_workers, readers)

    def __iter__(self) -> Iterator:
        for i in range(self._length):
            yield self._batches.take(self._length - i)

    @property
    def indices(self) -> list[int]:
        """Which items the batch consists of that was returned last."""
        return self._batches.indices

    def __len__(self):
        return self._length

    def state_dict(self) -> dict:
        """The position, and every random stream that later batches depend on."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state` was taken, on the same data with the same batch size."""
        self._batches.load_state_dict(state)


# Which items: endless iterators of lists of indices.


def _draw_seed() -> int:
    """What a torch sampler or loader takes from the global stream when it starts."""
    return torch.empty((), dtype=torch.int64).random_().item()


class _Passes:
    """Batches of passes over n items; each pass is seeded from the global stream."""

    def __init__(self, n: int, batch_size: int, replacement: bool, drop_last: bool):
        self._generator = torch.Generator()
        sampler = RandomSampler(range(n), replacement, generator=self._generator)
        self._pass = BatchSampler(sampler, batch_size, drop_last)
        self._length = len(self._pass)
        self._seed, self._taken, self._rest = 0, self._length, iter(())

    def __next__(self) -> list[int]:
        if self._taken == self._length:
            self._start(_draw_seed())
        self._taken += 1
        return next(self._rest)

    def _start(self, seed: int) -> None:
        self._generator.manual_seed(seed)
        self._seed, self._taken, self._rest = seed, 0, iter(self._pass)

    def state_dict(self) -> dict:
        return {"seed": self._seed, "taken": self._taken}

    def load_state_dict(self, state: dict) -> None:
        self._start(state["seed"])
        for _ in range(state["taken"]):
            next(self)


class _WeightedBatches:
    """Batches drawn with replacement by weight, each from the global stream."""

    def __init__(self, weights, batch_size: int):
        self._weights = torch.as_tensor(weights, dtype=torch.double)
        self._batch_size = batch_size

    def __next__(self) -> list[int]:
        return torch.multinomial(self._weights, self._batch_size, replacement=True).tolist()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


# The items themselves.


def _is_tensors(dataset) -> bool:
    return type(dataset).__getitem__ is TensorDataset.__getitem__


def _read(dataset, indices: list[int]):
    """The items, collated: [x (B, ...), y (B,)]."""
    if isinstance(dataset, _SplitDataset) and _is_tensors(dataset.underlying_dataset):
        keys = [dataset.keys[i] for i in indices]
        return [tensor[keys] for tensor in dataset.underlying_dataset.tensors]
    return default_collate([dataset[i] for i in indices])


class _Batches:
    """The batches of a sampler, as a DataLoader with `num_workers` processes returns them.

    Such a loader draws a seed for its workers when it is made, asks the sampler for two batches
    per worker, and then for one more with every batch that it returns.
    """

    def __init__(self, dataset, sampler, num_workers: int, readers: "Readers | None"):
        if num_workers < 0:
            raise ValueError(f"A loader cannot have {num_workers} workers.")
        self._sampler = sampler
        self._workers = _Workers(dataset, num_workers, _draw_seed())
        self._n_returned = 0
        self._ahead = deque(next(sampler) for _ in range(2 * num_workers))
        self._readers = readers if readers and readers.n and self._workers.draw else None
        self._number = self._readers.add(dataset) if self._readers else None
        self._asked = deque()  # what readers are at: the first batches of those ahead

    def take(self, n: float = math.inf):
        """The next batch; `n`, it included, are known to be wanted."""
        self._ahead.append(next(self._sampler))
        if self._readers:
            batch = self._read_elsewhere(n)
        else:
            batch = self._workers.read_here(self._n_returned, self._ahead[0])
        self.indices = self._ahead.popleft()
        self._n_returned += 1
        return batch

    def _read_elsewhere(self, n: float):
        # At most one batch per worker: the next needs the worker's streams as this one left them.
        while len(self._asked) < min(n, 2 * self._readers.n, self._workers.n):
            i = len(self._asked)
            self._asked.append(self._readers.read(
                self._number, self._workers.turn(self._n_returned + i), self._ahead[i]))
        with _loss_said():
            batch, streams = self._asked.popleft().result()
        self._workers.put_back(self._n_returned, streams)
        return batch

    def state_dict(self) -> dict:
        return {
            "n_returned": self._n_returned,
            "ahead": list(self._ahead),
            "sampler": self._sampler.state_dict(),
            "worker_seed": self._workers.seed,
            "workers": {k: _to_plain(streams) for k, streams in self._workers.streams.items()}}

    def load_state_dict(self, state: dict) -> None:
        self._asked.clear()
        self._n_returned = state["n_returned"]
        self._ahead = deque(state["ahead"])
        self._sampler.load_state_dict(state["sampler"])
        self._workers.seed = state["worker_seed"]
        self._workers.streams = {k: _from_plain(plain) for k, plain in state["workers"].items()}


class _Turn(NamedTuple):
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
            _set_streams(self.streams)
        return _read(dataset, indices), _get_streams()


class _Workers:
    """DomainBed's worker processes as what distinguishes them: each one's random streams.

    Batch k is read by worker k mod n, which goes on from where its streams were.
    """

    def __init__(self, dataset, n: int, seed: int):
        self.dataset = dataset
        self.n = n
        self.seed = seed
        self.streams = {}  # of those that have read a batch
        underlying = getattr(dataset, "underlying_dataset", dataset)
        self.draw = n > 0 and not _is_tensors(underlying)  # slices of tensors draw nothing

    def turn(self, k: int) -> _Turn:
        """What batch k's worker needs, if its batch before has been put back."""
        return _Turn(self.seed, k % self.n, self.streams.get(k % self.n))

    def put_back(self, k: int, streams: tuple) -> None:
        """Takes the streams of batch k's worker as the batch left them."""
        self.streams[k % self.n] = streams

    def read_here(self, k: int, indices: list[int]):
        """Batch k; outside, the streams never notice, unless there are no workers."""
        if not self.draw:
            return _read(self.dataset, indices)
        outside = _get_streams()
        try:
            batch, streams = self.turn(k).read(self.dataset, indices)
        finally:
            _set_streams(outside)
        self.put_back(k, streams)
        return batch


# Processes that read.


class Readers:
    """Processes that read batches for all loaders of a run, no more than there are cores.

    They start together when a loader first asks for a batch, and end on leaving `with`.

    Args:
        n: how many are wanted; with 0, loaders read in their own process.
    """

    def __init__(self, n: int):
        self.n = min(n, machine.available())
        self._datasets: list = []
        self._pool: ProcessPoolExecutor | None = None
        self._end: multiprocessing.connection.Connection | None = None

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._pool:
            if isinstance(error, ChildProcessError):
                # It may have held the lock behind which the others would wait for ever.
                self._end.send("a process is lost")
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def add(self, dataset) -> int:
        """Makes a data set known, before the first batch is asked for; returns its number."""
        self._datasets.append(dataset)
        return len(self._datasets) - 1

    def read(self, number: int, turn: _Turn, indices: list[int]) -> Future:
        """What `turn` reads of a data set, as soon as a process is free."""
        if self._pool is None:
            # In a sweep's warm worker the default is a server of its own, which imports torch anew.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
            ended, self._end = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(
                self.n, context, initializer=_begin_to_read, initargs=(self._datasets, ended))
        with _loss_said():
            return self._pool.submit(_read_for_another, number, turn, indices)


@contextlib.contextmanager
def _loss_said() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A loader process ended early. The same command goes on from the run's last state; if "
            "memory ran out, pass a smaller --loader_processes or batch_size.") from error


_datasets: list = []  # in a reading process: what can be asked for


def _begin_to_read(datasets: list, ended: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the run saves its state first, and needs batches
    threading.Thread(target=_end_with_others, args=[ended], daemon=True).start()
    _datasets[:] = datasets


def _end_with_others(ended: multiprocessing.connection.Connection) -> None:
    """Ends this process when its run has ended, or another process that reads has."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel, ended])
    os._exit(1)


def _read_for_another(number: int, turn: _Turn, indices: list[int]) -> tuple:
    return turn.read(_datasets[number], indices)


# Random streams: (random's, NumPy's, torch's as an array, which crosses processes as plain bytes).


def _get_streams() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()


def _set_streams(streams: tuple) -> None:
    python, numpy, torchs = streams
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch.from_numpy(torchs))


def _to_plain(streams: tuple) -> dict:
    """What torch.load(weights_only=True) can read."""
    (version, words, gauss), (kind, keys, *rest), torchs = streams
    return {"python": [version, torch.tensor(words), gauss],
            "numpy": [kind, torch.tensor(keys.astype(np.int64)), *rest],
            "torch": torch.from_numpy(torchs)}


def _from_plain(plain: dict) -> tuple:
    version, words, gauss = plain["python"]
    kind, keys, *rest = plain["numpy"]
    return ((version, tuple(words.tolist()), gauss),
            (kind, keys.numpy().astype(np.uint32), *rest), plain["torch"].numpy())
