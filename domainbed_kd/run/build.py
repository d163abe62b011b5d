"""Builds a run's parts in DomainBed's order, as each draws random numbers."""

import contextlib
import ctypes
import os
import platform
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from domainbed_kd import algorithms, datasets, hparams_registry, machine, networks
from domainbed_kd.algorithms import composed
from domainbed_kd.datasets import images
from domainbed_kd.run import (
    augmentation,
    canonical_view,
    image_cache,
    loaders,
    precision,
    records,
    resident,
    splits,
)
from domainbed_kd.run.readers import Readers, pinned
from domainbed_kd.seeds import seed_hash

# GPU memory that images may take, in GB; PACS takes 1.6.
GPU_IMAGE_GB = 8.0


class Loaders(NamedTuple):
    """Endless training and unlabeled loaders, and one-pass evaluation loaders by split."""

    train: list
    uda: list
    evaluation: dict
    #: With --auto_lr, one-pass loaders of the training domains' out-splits.
    validation: list

    def all(self) -> list:
        """Every loader, in the order in which they were made."""
        return [*self.train, *self.uda, *self.evaluation.values(), *self.validation]


@dataclass
class Run:
    """One run: its args and its parts."""

    args: dict
    hparams: dict
    device: torch.device
    dataset: datasets.MultipleDomainDataset
    splits: splits.Splits
    readers: Readers
    loaders: Loaders
    finish: resident.Finish
    algorithm: nn.Module
    #: With --auto_lr, the current stage: an `auto_lr.Search` or `auto_lr.Replay`.
    stage: object = None

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return Path(self.args["output_dir"])

    @property
    def holds_out(self) -> bool:
        """Whether images are held out for validation; not in the last stage of --auto_lr."""
        return any(map(len, self.splits.out))

    @property
    def args_on_record(self) -> dict:
        """The args in its records."""
        return self.args if self.holds_out else self.args | {"holdout_fraction": 0.0}

    @property
    def is_last_stage(self) -> bool:
        """Whether it is finished after its last update."""
        return self.stage is None or self.stage.is_last

    @property
    def updates_before(self) -> int:
        """The number of updates in an earlier stage."""
        return self.stage.updates_before if self.stage else 0

    @property
    def is_fast(self) -> bool:
        """Whether it runs in fast mode."""
        return self.args.get("fast", False)

    @property
    def training(self) -> list[int]:
        """The numbers of the training environments."""
        return training_envs(self.dataset, self.args)

    @property
    def n_steps(self) -> int:
        """The number of updates."""
        return self.args["steps"] or self.dataset.N_STEPS

    @property
    def checkpoint_freq(self) -> int:
        """The number of updates between two evaluations."""
        return self.args["checkpoint_freq"] or self.dataset.CHECKPOINT_FREQ

    def autocast(self) -> contextlib.AbstractContextManager:
        """Inside, layers compute in the run's precision."""
        return precision.autocast(self.device, self.is_fast)

    def to_device(self, batch) -> list:
        """An (x, y) pair on the device, its transform finished there."""
        x, y = batch
        return [self.finish(x) if self.finish.takes(x) else networks.sent(x, self.device),
                networks.sent(y, self.device)]

    def minibatches(self, batches: list) -> list:
        """The same for several batches, finished together."""
        if not all(self.finish.takes(x) for x, _ in batches):
            return [self.to_device(batch) for batch in batches]
        x = self.finish(*(x for x, _ in batches)).split([len(y) for _, y in batches])
        return [[part, networks.sent(y, self.device)] for part, (_, y) in zip(x, batches)]


def build(args: dict, loader_processes: int | None = None, cache_folder: str | None = None,
          gpu_image_gb: float = GPU_IMAGE_GB) -> Run:
    """Makes a run's parts, and prints its settings; takes the arguments of `training.train`."""
    keep_freed_memory()
    hparams = choose_hparams(args)
    records.print_settings("Environment", records.environment())
    records.print_settings("Args", dict(sorted(args.items())))
    records.print_settings("HParams", dict(sorted(hparams.items())))
    seed_everything(args["seed"])
    device = machine.device()
    dataset = make_dataset(args, hparams, cache_folder)
    if dataset.TASK.per_pixel:
        _check_fits_pixels(args, hparams)
    finish = resident.Finish(device, args.get("fast", False))
    if resident.pays_on(device):
        resident.settle(dataset, finish, int(gpu_image_gb * 1e9))
    if finish.is_fast:
        augmentation.speed_up(dataset)
    parts = make_splits(dataset, args)
    if loader_processes is None:
        n_streams = dataset.N_WORKERS * len(training_envs(dataset, args))
        loader_processes = min(threads(), n_streams) if device.type == "cuda" else 0
    readers = Readers(loader_processes, pinned if device.type == "cuda" else None)
    load = make_loaders(dataset, parts, args, hparams, readers)
    algorithm = make_algorithm(args, hparams, dataset, device)
    return Run(args, hparams, device, dataset, parts, readers, load, finish, algorithm)


def choose_hparams(args: dict) -> dict:
    """Defaults or a random draw, with --hparams merged on top."""
    seed = None
    if args["hparams_seed"] == 0:
        hparams = hparams_registry.default_hparams(args["algorithm"], args["dataset"])
    else:
        seed = seed_hash(args["hparams_seed"], args["trial_seed"])
        hparams = hparams_registry.random_hparams(args["algorithm"], args["dataset"], seed)
    hparams_registry.refuse_label_smoothing(args["algorithm"], args["hparams"])
    takes = algorithms.get_algorithm_class(args["algorithm"]).takes
    hparams |= hparams_registry.of_teachers(args["hparams"], seed)
    hparams = hparams_registry.override(hparams, args["hparams"], takes)
    if "batch_size" not in hparams:
        raise ValueError(f"{args['algorithm']}: its hparams hold no batch_size, which every run "
                         "needs. Pass --hparams '{\"batch_size\": 32}'.")
    return hparams


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next update, as new pages cost time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets pages of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


def threads() -> int:
    """The number of threads that the run may use."""
    return (torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ
            else machine.available())


def seed_everything(seed: int) -> None:
    """Seeds the global streams and makes cuDNN deterministic."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def make_dataset(args: dict, hparams: dict, cache_folder: str | None = None):
    """The dataset, with a cache of decoded images if `cache_folder` is given."""
    cls = datasets.get_dataset_class(args["dataset"])
    check_view(cls, hparams, args.get("fast", False))
    dataset = cls(args["data_dir"], args["test_envs"], hparams)
    if cache_folder:
        image_cache.attach(dataset, Path(cache_folder))
    return dataset


def check_view(dataset: type, hparams: dict, is_fast: bool) -> None:
    """Refuses view_ hparams that the dataset or fast mode does not support."""
    asked = [name for name in hparams if name.startswith("view_")]
    if asked and dataset.NORMALIZATION is None:
        raise ValueError(f"{dataset.__name__}: {asked[0]} has no meaning, as its images are not "
                         "augmented. Leave it out.")
    if asked and is_fast and images.differs_in_colour(hparams):
        raise ValueError(f"{', '.join(asked)}: --fast distorts and normalizes colours as DomainBed "
                         "does. Leave out that flag, or these hparams except view_crop.")


def training_envs(dataset, args: dict) -> list[int]:
    """The numbers of the environments that are not held out."""
    return [i for i in range(len(dataset)) if i not in args["test_envs"]]


def make_splits(dataset, args: dict) -> splits.Splits:
    """The run's splits."""
    datasets.check_test_envs(args["dataset"], len(dataset), args["test_envs"])
    made = splits.make_splits(dataset, args["test_envs"], args["trial_seed"],
                              args["holdout_fraction"], args["uda_holdout_fraction"])
    if args["task"] == "domain_adaptation" and not any(made.uda):
        raise ValueError("Not enough unlabeled samples for domain adaptation. "
                         "Pass --uda_holdout_fraction, for example 0.5.")
    return made


def make_loaders(dataset, parts: splits.Splits, args: dict, hparams: dict,
                 readers: Readers) -> Loaders:
    """The loaders, made in DomainBed's order."""
    uda = [split for split in parts.uda if split is not None]
    in_weights, uda_weights = [None] * len(dataset), [None] * len(uda)
    if hparams["class_balanced"]:
        in_weights, uda_weights = [], []
        for split, out_split, uda_split in zip(*parts):
            in_weights.append(splits.class_weights(split))
            splits.class_weights(out_split)  # not used, but may draw random numbers
            if uda_split is not None:
                uda_weights.append(splits.class_weights(uda_split))

    groups = None
    if (n := hparams.get("class_groups")) is not None:
        groups = splits.class_groups([parts.in_[i] for i in training_envs(dataset, args)], n,
                                     hparams["batch_size"])

    def infinite(split, weights, groups=None):
        return iter(loaders.InfiniteDataLoader(
            split, weights, hparams["batch_size"], dataset.N_WORKERS, readers,
            replacement=not args.get("auto_lr"), groups=groups))

    def one_pass(split):
        if dataset.TASK.per_pixel:  # whole images, not the crops of training
            split = datasets.plain(split)
        is_resident = args.get("fast") and isinstance(split.underlying_dataset, resident.Domain)
        return loaders.FastDataLoader(
            split, 512 if is_resident else dataset.EVALUATION_BATCH, dataset.N_WORKERS, readers)

    train = [infinite(parts.in_[i], in_weights[i], groups)
             for i in training_envs(dataset, args)]
    unlabeled = [infinite(split, weights) for split, weights in zip(uda, uda_weights)]
    groups = {"env{}_in": parts.in_, "env{}_out": parts.out, "env{}_uda": uda}
    if not any(map(len, parts.out)):
        groups = {"fd_env{}_in": [*parts.in_, *uda]}
    evaluation = {name.format(i): one_pass(split) for name, group in groups.items()
                  for i, split in enumerate(group)}
    validation = []
    if args.get("auto_lr"):
        validation = [one_pass(split) for i in training_envs(dataset, args)
                      if len(split := parts.out[i])]
    return Loaders(train, unlabeled, evaluation, validation)


def make_algorithm(args: dict, hparams: dict, dataset, device: torch.device) -> nn.Module:
    """The algorithm; it learns about the data from its hparams, without recording that.

    These are the names of classes and training domains (never the test domain's), the number of
    steps, the normalization and the like.
    """
    training = training_envs(dataset, args)
    context = {
        "dataset": args["dataset"], "test_envs": args["test_envs"], "task": dataset.TASK.name,
        "trial_seed": args["trial_seed"], "total_steps": args["steps"] or dataset.N_STEPS,
        "class_names": dataset.class_names, "normalization": dataset.NORMALIZATION}
    taught_by = {"teacher": args["teacher"]} if "teacher" in args else {}
    if dataset.domain_names is not None:
        context["domain_names"] = [dataset.domain_names[i] for i in training]
    known = context | hparams
    cls = composed.assembled(algorithms.get_algorithm_class(args["algorithm"]), known)
    algorithm = cls(dataset.input_shape, dataset.num_classes, len(training),
                    known | taught_by).to(device)
    if hparams.get("canonical_view"):
        canonical_view.check(algorithm)
    algorithm = precision.laid_out(algorithm, args.get("fast", False))
    if args.get("compile"):
        precision.compile_featurizer(algorithm)
    return algorithm


def _check_fits_pixels(args: dict, hparams: dict) -> None:
    """Refuses algorithms, hparams and flags that do not work with a label per pixel."""
    cls = algorithms.get_algorithm_class(args["algorithm"])
    kept = "it would keep a prediction for every pixel"
    for name, asked, reason in (
            (cls.display_name or cls.__name__, cls.needs_image_labels, cls.needs_image_labels),
            ("class_balanced", hparams.get("class_balanced"),
             "an image has no class to balance by"),
            ("class_groups", hparams.get("class_groups"), "an image has no class to group by"),
            ("canonical_view", hparams.get("canonical_view"), kept),
            ("--save_logits", args.get("save_logits"), kept),
            ("--diagnostics", args.get("diagnostics"), "what it measures is of images"),
            ("--auto_lr", args.get("auto_lr"), "the loss that it follows is of images")):
        if asked:
            raise ValueError(f"{name}: needs one label per image, and {args['dataset']} has one "
                             f"per pixel: {reason}.")
