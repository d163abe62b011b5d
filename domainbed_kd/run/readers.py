"""Reads a run's images with the random streams of DomainBed's workers, and ahead of time."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.worker import _generate_state

from domainbed_kd import machine
from domainbed_kd.checkpoints import get_streams, set_streams
from domainbed_kd.run.splits import SplitDataset, is_tensors


def read(dataset, indices: list[int]):
    """The items, collated: [x (B, ...), y (B,)]."""
    if isinstance(dataset, SplitDataset) and is_tensors(dataset.underlying_dataset):
        keys = [dataset.keys[i] for i in indices]
        return [tensor[keys] for tensor in dataset.underlying_dataset.tensors]
    return default_collate([dataset[i] for i in indices])


class Turn(NamedTuple):
    """A worker's number, the base of all seeds, and its streams; None before its first batch."""

    seed: int
    worker: int
    streams: tuple | None

    def read(self, dataset, indices: list[int]) -> tuple:
        """The items, collated, and the streams afterwards, now this process's own."""
        if self.streams is None:
            random.seed(self.seed + self.worker)
            torch.default_generator.manual_seed(self.seed + self.worker)  # the CPU's only
            np.random.seed(_generate_state(self.seed, self.worker))
        else:
            set_streams(self.streams)
        return read(dataset, indices), get_streams()


class Readers:
    """Processes that read batches for all loaders of a run, at most one per core.

    They start together when a loader first asks for a batch, and end on leaving `with`.

    Args:
        n: the number of processes; with 0, loaders read in their own process.
        finish: applied to each batch ahead of time by a thread of this process, such as `pinned`
            for a GPU.
    """

    def __init__(self, n: int, finish: Callable[[list], list] | None = None):
        self.n = min(n, machine.available())
        self._finish = finish
        self._thread: ThreadPoolExecutor | None = None
        self._datasets: list = []
        self._pool: ProcessPoolExecutor | None = None
        self._end: multiprocessing.connection.Connection | None = None

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._pool:
            if isinstance(error, ChildProcessError):
                # The lost process may have held a lock that the others wait for.
                self._end.send("a process is lost")
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def add(self, dataset) -> int:
        """Registers a dataset, before the first batch is requested; returns its number."""
        self._datasets.append(dataset)
        return len(self._datasets) - 1

    def read(self, number: int, turn: Turn, indices: list[int]) -> Future:
        """Reads items of a dataset in `turn`, as soon as a process is free."""
        if self._pool is None:
            # In a sweep's worker the default would start a new server, which imports torch again.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
            ended, self._end = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(
                self.n, context, initializer=_begin_to_read, initargs=(self._datasets, ended))
        with loss_said():
            future = self._pool.submit(_read_for_another, number, turn, indices)
        if self._finish is None:
            return future
        if self._thread is None:  # only now: a process with threads should not be forked
            self._thread = ThreadPoolExecutor(1)
        return self._thread.submit(self._finished, future)

    def _finished(self, future: Future) -> tuple:
        batch, streams = future.result()
        return self._finish(batch), streams


def pinned(batch: list) -> list:
    """The batch in pinned memory, which a GPU copies while the CPU continues."""
    return [part.pin_memory() for part in batch]


@contextlib.contextmanager
def loss_said() -> Iterator[None]:
    """Inside, a reading process that ends early raises a ChildProcessError with advice."""
    try:
        yield
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A loader process ended early. The same command continues from the run's last state. "
            "If memory ran out, pass a smaller --loader_processes or batch_size.") from error


_datasets: list = []  # in a reading process: the datasets by number


def _begin_to_read(datasets: list, ended: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the run still needs batches to save its state
    threading.Thread(target=_end_with_others, args=[ended], daemon=True).start()
    _datasets[:] = datasets


def _end_with_others(ended: multiprocessing.connection.Connection) -> None:
    """Ends this process when its run or another reading process has ended."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel, ended])
    os._exit(1)


def _read_for_another(number: int, turn: Turn, indices: list[int]) -> tuple:
    return turn.read(_datasets[number], indices)
