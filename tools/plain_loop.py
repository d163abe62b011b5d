"""A plain training loop on PACS, with which tools/bench.py compares ours.

ERM in float32 with contiguous weights. Every loader is torch's DataLoader with eight worker
processes that prefetch endlessly, and both splits of every domain are evaluated, 64 images at a
time.
"""

import itertools
import json
import sys

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from domainbed_kd import algorithms, datasets, hparams_registry
from domainbed_kd.run import splits

N_WORKERS, HELD_OUT = 8, 3


def endless(split, batch_size: int, drop_last: bool):
    """Endless batches of shuffled passes over a split."""
    batches = BatchSampler(RandomSampler(split), batch_size, drop_last)
    passes = itertools.chain.from_iterable(itertools.repeat(batches))
    return iter(DataLoader(split, batch_sampler=passes, num_workers=N_WORKERS))


def accuracy(algorithm, batches, n: int) -> float:
    """Accuracy on the next n batches."""
    correct = total = 0
    algorithm.eval()
    with torch.no_grad():
        for x, y in itertools.islice(batches, n):
            correct += (algorithm.predict(x).argmax(1) == y).sum().item()
            total += len(y)
    algorithm.train()
    return correct / total


def main(data_dir: str, hparams: dict, n_steps: int) -> None:
    """Trains, and evaluates after the first and the last update."""
    hparams = hparams_registry.default_hparams("ERM", "PACS") | hparams
    torch.manual_seed(0)
    dataset = datasets.get_dataset_class("PACS")(data_dir, [HELD_OUT], hparams)
    parts = splits.make_splits(dataset, [HELD_OUT], 0, 0.2)
    training = [endless(split, hparams["batch_size"], True)
                for i, split in enumerate(parts.in_) if i != HELD_OUT]
    evaluated = [(endless(split, 64, False), -(-len(split) // 64))
                 for split in (*parts.in_, *parts.out)]
    algorithm = algorithms.get_algorithm_class("ERM")(
        dataset.input_shape, dataset.num_classes, len(training), hparams)
    for step in range(n_steps):
        algorithm.update([tuple(next(batches)) for batches in training])
        if step in (0, n_steps - 1):
            for batches, n in evaluated:
                accuracy(algorithm, batches, n)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
