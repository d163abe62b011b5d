"""What a fork's process knows about its data but does not tell its algorithms."""

import argparse
import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from domainbed_kd import datasets
from domainbed_kd.plugin.dialects import submodules


class Seen(NamedTuple):
    """The dataset that this process built last."""

    dataset: object = None
    test_envs: list[int] | None = None

    @property
    def name(self) -> str | None:
        """The name of its class."""
        return None if self.dataset is None else type(self.dataset).__name__

    def class_names(self, num_classes: int) -> list[str] | None:
        """Words for the classes, in label order: ours where we have the dataset, else its own."""
        if self.name in datasets.DATASETS:
            with contextlib.suppress(ValueError, FileNotFoundError):  # no fixed classes
                words = datasets.class_names(self.name)
                if len(words) == num_classes:
                    return words
        own = getattr(self.dataset, "class_names", None) or next(
            (env.classes for env in self._environments() if hasattr(env, "classes")), None)
        if own is None or len(own) != num_classes:
            return None
        return [str(name).replace("_", " ") for name in own]

    def domain_names(self, num_domains: int) -> list[str] | None:
        """Words for the training domains, or None where the test domains are not known."""
        names = getattr(self.dataset, "ENVIRONMENTS", None) or getattr(
            self.dataset, "environments", None)
        if names is None or self.test_envs is None:
            return None
        if self.name in datasets.DATASETS:
            names = datasets.domain_names(self.name) or names
        words = [str(name).replace("_", " ")
                 for i, name in enumerate(names) if i not in self.test_envs]
        return words if len(words) == num_domains else None

    def splits(self, num_domains: int) -> list[tuple] | None:
        """(held-out images, the others) of each training domain; None if they were not seen."""
        if self.dataset is None or self.test_envs is None:
            return None
        found = [next((parts for whole, parts in _splits if whole is domain), None)
                 for i, domain in enumerate(self.dataset) if i not in self.test_envs]
        return found if len(found) == num_domains and None not in found else None

    def _environments(self) -> list:
        environments = getattr(self.dataset, "datasets", None) or []
        return [getattr(env, "dataset", env) for env in environments]


_seen = Seen()
#: (images, the two parts that the fork made of them), in its order.
_splits: list[tuple] = []


def seen() -> Seen:
    """What has been seen so far."""
    return _seen


def watch_datasets(module: ModuleType) -> None:
    """Notes every dataset that the classes of a fork's `domainbed.datasets` build."""
    classes = {cls for each in (module, *submodules(module)) for cls in vars(each).values()
               if isinstance(cls, type) and cls.__module__.startswith(module.__name__)}
    for cls in classes:
        if ("__init__" in vars(cls) and cls.__name__ != "MultipleDomainDataset"
                and any(base.__name__ == "MultipleDomainDataset" for base in cls.__mro__)):
            cls.__init__ = _noting(cls.__init__)
    if inspect.isfunction(make := getattr(module, "get_dataset", None)):  # SWAD and MIRO
        if "test_envs" in inspect.signature(make).parameters:
            module.get_dataset = _noting_test_envs(make)


def watch_splits(module: ModuleType) -> None:
    """Notes what `split_dataset` of a fork's `domainbed.lib.misc`, if there, holds out."""
    if not inspect.isfunction(split := getattr(module, "split_dataset", None)):
        return

    @functools.wraps(split)
    def wrapped(dataset, *args, **kwargs):
        parts = split(dataset, *args, **kwargs)
        _splits.append((dataset, parts))
        return parts

    module.split_dataset = wrapped


def _noting(init: Callable) -> Callable:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        global _seen
        init(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments.get("test_envs")
        _seen = Seen(self, _seen.test_envs if given is None else _environments(given))

    return wrapped


def _noting_test_envs(make: Callable) -> Callable:
    signature = inspect.signature(make)

    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        global _seen
        _seen = Seen(None, _environments(signature.bind(*args, **kwargs).arguments["test_envs"]))
        return make(*args, **kwargs)

    return wrapped


def _environments(test_envs) -> list[int]:
    """The test domains as a list; a fork may name a single one by its number."""
    return [test_envs] if isinstance(test_envs, int) else list(test_envs)


def total_steps() -> int | None:
    """The steps of the run, by its command line or else by its dataset."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--steps", nargs="?")
    given = parser.parse_known_args(sys.argv[1:])[0].steps or ""
    return int(given) if given.isdecimal() else getattr(_seen.dataset, "N_STEPS", None)
