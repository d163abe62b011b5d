"""Loaders that draw DomainBed's random numbers, in its order.

DomainBed reads images with eight worker processes per loader. They affect its random numbers in
two ways: prefetching draws indices early, and each worker augments images with its own random
streams. Both are simulated here. Batches and global streams therefore match DomainBed's for any
number of real processes, and a loader's position can be saved and restored.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

from domainbed_kd.checkpoints import from_plain, get_streams, set_streams, to_plain
from domainbed_kd.run.readers import Readers, Turn, loss_said, read
from domainbed_kd.run.splits import Groups, is_tensors, labels


class _Loader:
    """The batches of a sampler, as a DataLoader with `num_workers` processes returns them.

    Such a loader draws a seed for its workers when it is made, asks the sampler for two batches
    per worker, and then for one more with every batch that it returns.
    """

    def __init__(self, dataset, sampler, num_workers: int, readers: Readers | None):
        if num_workers < 0:
            raise ValueError(f"A loader cannot have {num_workers} workers.")
        self._dataset, self._sampler, self._n_workers = dataset, sampler, num_workers
        self._seed = _draw_seed()
        self._streams = {}  # by worker: its random streams after its last batch
        underlying = getattr(dataset, "underlying_dataset", dataset)
        self._draws = num_workers > 0 and not is_tensors(underlying)  # slices of tensors do not
        self._n_returned = 0
        self._ahead = deque(next(sampler) for _ in range(2 * num_workers))
        self._readers = readers if readers and readers.n and self._draws else None
        self._number = self._readers.add(dataset) if self._readers else None
        self._asked = deque()  # pending reads of the first batches in _ahead

    def _take(self, n: float = math.inf):
        """The next batch, of `n` that are still to be taken."""
        self._ahead.append(next(self._sampler))
        if not self._draws:
            batch = read(self._dataset, self._ahead[0])
        else:
            batch, streams = (
                self._read_elsewhere(n) if self._readers
                else self._read_here(self._turn(self._n_returned), self._ahead[0]))
            self._streams[self._n_returned % self._n_workers] = streams
        self.indices = self._ahead.popleft()  # the items of the last batch
        self._n_returned += 1
        return batch

    def _turn(self, k: int) -> Turn:
        """Batch k's turn: worker k mod n reads it, continuing its own streams."""
        worker = k % self._n_workers
        return Turn(self._seed, worker, self._streams.get(worker))

    def read_apart(self, requests: Iterable[tuple[Turn, list[int]]]) -> Iterator[list]:
        """Reads other batches, given by turns and items, without moving this loader."""
        if not self._readers:
            yield from (self._read_here(*each)[0] for each in requests)
            return
        requests = iter(requests)
        asked = deque(self._readers.read(self._number, *each)
                      for each in itertools.islice(requests, 2 * self._readers.n))
        while asked:
            with loss_said():
                batch, _ = asked.popleft().result()
            asked.extend(self._readers.read(self._number, *each)
                         for each in itertools.islice(requests, 1))
            yield batch

    def _read_here(self, turn: Turn, indices: list[int]) -> tuple:
        outside = get_streams()
        try:
            return turn.read(self._dataset, indices)
        finally:
            set_streams(outside)

    def _read_elsewhere(self, n: float) -> tuple:
        # At most one batch per worker: the next needs the worker's streams as this one left them.
        while len(self._asked) < min(n, 2 * self._readers.n, self._n_workers):
            i = len(self._asked)
            self._asked.append(self._readers.read(
                self._number, self._turn(self._n_returned + i), self._ahead[i]))
        with loss_said():
            return self._asked.popleft().result()

    def state_dict(self) -> dict:
        """The position, and every random stream that later batches depend on."""
        return {
            "n_returned": self._n_returned,
            "ahead": list(self._ahead),
            "sampler": self._sampler.state_dict(),
            "worker_seed": self._seed,
            "workers": {k: to_plain(streams) for k, streams in self._streams.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state`, on the same data with the same batch size."""
        self._asked.clear()
        self._n_returned = state["n_returned"]
        self._ahead = deque(state["ahead"])
        self._sampler.load_state_dict(state["sampler"])
        self._seed = state["worker_seed"]
        self._streams = {k: from_plain(plain) for k, plain in state["workers"].items()}


class InfiniteDataLoader(_Loader):
    """Endless full batches, drawn with replacement; its own iterator.

    Args:
        dataset: a split, or any map-style dataset.
        weights: None, or how often to draw each item: (N,), need not sum to 1.
        batch_size: items per batch.
        num_workers: the number of DomainBed's workers to simulate.
        readers: real processes that read images ahead; with None, this process reads them.
            Results do not depend on it.
        replacement: False, for --auto_lr, visits all items before repeating one; with weights,
            no batch contains an item twice.
        groups: restricts each batch to a few classes, instead of weights; None does not.

    Raises:
        ValueError: if there are fewer items than a batch needs.
    """

    def __init__(self, dataset, weights, batch_size: int, num_workers: int,
                 readers: Readers | None = None, replacement: bool = True,
                 groups: Groups | None = None):
        if groups is not None:
            sampler = _GroupedBatches(labels(dataset), groups, batch_size)
        elif weights is not None:
            sampler = _WeightedBatches(weights, batch_size, replacement)
        elif len(dataset) < batch_size:
            raise ValueError(
                f"{getattr(dataset, 'name', '') or 'The dataset'} holds {len(dataset)} images, "
                f"which is less than a batch of {batch_size}. Lower batch_size, for example with "
                f"--hparams '{{\"batch_size\": {max(len(dataset) // 2, 1)}}}'.")
        else:
            sampler = _Passes(len(dataset), batch_size, replacement, drop_last=True)
        super().__init__(dataset, sampler, num_workers, readers)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        return self._take()

    def __len__(self):
        raise ValueError("An InfiniteDataLoader has no length.")


class FastDataLoader(_Loader):
    """One pass over all items, in a new random order each time; the last batch may be short.

    Arguments are those of InfiniteDataLoader.

    Raises:
        ValueError: if there are no items.
    """

    def __init__(self, dataset, batch_size: int, num_workers: int,
                 readers: Readers | None = None):
        if len(dataset) == 0:
            raise ValueError(f"{getattr(dataset, 'name', '') or 'The dataset'} is empty.")
        self._length = -(-len(dataset) // batch_size)
        sampler = _Passes(len(dataset), batch_size, replacement=False, drop_last=False)
        super().__init__(dataset, sampler, num_workers, readers)

    def __iter__(self) -> Iterator:
        for i in range(self._length):
            yield self._take(self._length - i)

    def __len__(self):
        return self._length


# Samplers: endless iterators of lists of indices.


def _draw_seed() -> int:
    """The seed that a torch sampler or loader draws from the global stream when it starts."""
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
    """Batches drawn by weight, each from the global stream."""

    def __init__(self, weights, batch_size: int, replacement: bool):
        self._weights = torch.as_tensor(weights, dtype=torch.double)
        self._batch_size = batch_size
        self._replacement = replacement  # of items within a batch

    def __next__(self) -> list[int]:
        return torch.multinomial(self._weights, self._batch_size, self._replacement).tolist()

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class _GroupedBatches:
    """Batches of a few classes with equal shares of the items, to within one.

    Loaders with the same groups draw the same classes for the same batch, from a separate stream.
    A class's items are drawn from the global stream; within a batch, none repeats before all have
    been drawn.
    """

    def __init__(self, labels: list[int], groups: Groups, batch_size: int):
        self._groups = groups
        of_item = torch.tensor(labels)
        self._items = [(of_item == y).nonzero().flatten() for y in groups.classes]
        self._sizes = [len(part) for part in torch.arange(batch_size).tensor_split(groups.n)]
        self._taken = 0

    def __next__(self) -> list[int]:
        generator = torch.Generator().manual_seed(self._groups.seed + self._taken)
        self._taken += 1
        classes = torch.randperm(len(self._items), generator=generator).tolist()
        return torch.cat([_some(self._items[k], size)
                          for k, size in zip(classes, self._sizes)]).tolist()

    def state_dict(self) -> dict:
        return {"taken": self._taken, "seed": self._groups.seed}

    def load_state_dict(self, state: dict) -> None:
        self._taken, self._groups = state["taken"], self._groups._replace(seed=state["seed"])


def _some(items: Tensor, n: int) -> Tensor:
    rounds = -(-n // len(items))
    return torch.cat([items[torch.randperm(len(items))] for _ in range(rounds)])[:n]
