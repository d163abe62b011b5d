"""Splits domains into training and validation images, identically to DomainBed."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from domainbed_kd.seeds import seed_hash


def is_tensors(dataset) -> bool:
    """Whether a dataset's items are slices of tensors, so that reading one draws nothing."""
    return type(dataset).__getitem__ is TensorDataset.__getitem__


class Groups(NamedTuple):
    """How many classes each batch has, and from which; the same for all training domains."""

    n: int
    #: The classes in every training domain's in-split.
    classes: list[int]
    #: For drawing classes.
    seed: int


class SplitDataset:
    """The items of a dataset at `keys`, read on access.

    A split of a split refers to the dataset itself: `underlying_dataset` is never a split.
    """

    def __init__(self, dataset, keys: list[int], name: str):
        if isinstance(dataset, SplitDataset):
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
    """Two splits of a dataset, shuffled by `seed`: `n` items and the rest; `names` for messages."""
    if not 0 <= n <= len(dataset):
        raise ValueError(f"Cannot split {n} items off a dataset of {len(dataset)}. "
                         "Fractions must be between 0 and 1.")
    keys = list(range(len(dataset)))
    np.random.RandomState(seed).shuffle(keys)
    return SplitDataset(dataset, keys[:n], names[0]), SplitDataset(dataset, keys[n:], names[1])


def make_splits(dataset, test_envs: list[int], trial_seed: int, holdout_fraction: float,
                uda_holdout_fraction: float = 0, holds_out: bool = True) -> Splits:
    """The splits of every environment, as DomainBed makes them.

    The out-split is `holdout_fraction` of an environment, unless its `n_train` says how many of
    its items are for training; see `_as_published`. Without `holds_out`, for --auto_lr's last
    stage, in-splits have all images, in their order. `uda_holdout_fraction` of a test environment's
    in-split becomes its unlabeled images; even a fraction of 0 reorders the in-split.
    """
    splits = Splits([], [], [])
    for i, env in enumerate(dataset):
        seed = seed_hash(trial_seed, i)
        names = f"The out-split of environment {i}", f"The in-split of environment {i}"
        if not holds_out:
            out, in_ = SplitDataset(env, [], ""), SplitDataset(env, range(len(env)), "")
        elif getattr(env, "n_train", None) is None:
            out, in_ = split_dataset(env, int(len(env) * holdout_fraction), seed, names)
        else:
            out, in_ = _as_published(env, i in test_envs, names)
        uda = None
        if i in test_envs:
            names = f"The unlabeled split of environment {i}", names[1]
            uda, in_ = split_dataset(in_, int(len(in_) * uda_holdout_fraction), seed, names)
        for split in (out, in_) if holds_out else ():
            if len(split) == 0:
                raise ValueError(
                    f"{split.name} is empty: it has {len(env)} images, --holdout_fraction is "
                    f"{holdout_fraction}, --uda_holdout_fraction {uda_holdout_fraction}. "
                    "Choose other fractions.")
        splits.in_.append(in_)
        splits.out.append(out)
        splits.uda.append(uda or None)
    return splits


def _as_published(env, is_test: bool, names: tuple[str, str]) -> tuple:
    """The out-split and the in-split of a domain that comes with validation images.

    They are a training domain's out-split, and its training images the in-split. They are a test
    domain's in-split, which tables report; its out-split is a fifth of its training images.
    """
    train, val = list(range(env.n_train)), list(range(env.n_train, len(env)))
    if not is_test:
        return SplitDataset(env, val, names[0]), SplitDataset(env, train, names[1])
    part, _ = split_dataset(SplitDataset(env, train, ""), len(train) // 5, 0, names)
    return part, SplitDataset(env, val, names[1])


def class_groups(parts: list, n: int, batch_size: int) -> Groups:
    """Groups of `n` classes for batches of the training domains' in-splits."""
    shared = sorted(set.intersection(*(set(labels(split)) for split in parts)))
    most = min(batch_size, len(shared))
    if type(n) is not int or not 1 <= n <= most:
        raise ValueError(f"class_groups is {n!r}; it takes a whole number from 1 to {most}, as "
                         f"batch_size is {batch_size} and all training domains show "
                         f"{len(shared)} of the classes.")
    return Groups(n, shared, torch.randint(2**62, ()).item())


def class_weights(split) -> Tensor:
    """A weight per item, float32 (N,), sum 1: classes have equal weight, as do a class's items.

    Like DomainBed, this reads every augmented image, which draws random numbers; otherwise labels
    are looked up.
    """
    dataset = split.underlying_dataset
    augmented = getattr(dataset, "transform", None) is not getattr(dataset, "plain_transform", None)
    of_each = [int(split[i][1]) for i in range(len(split))] if augmented else labels(split)
    counts = Counter(of_each)
    return torch.tensor([1 / (counts[y] * len(counts)) for y in of_each])


def labels(split) -> list[int]:
    """The labels of a split's items; these are read only if the dataset has no list of labels."""
    dataset = split.underlying_dataset
    if is_tensors(dataset):
        return dataset.tensors[1][split.keys].tolist()
    if hasattr(dataset, "targets"):
        return [int(dataset.targets[key]) for key in split.keys]
    return [int(split[i][1]) for i in range(len(split))]
