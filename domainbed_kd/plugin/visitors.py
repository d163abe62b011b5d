"""A DomainBed fork's algorithms here: `load` registers them, `Visitor` is one of them.

Data, splits and the loop are ours; networks and hparams are the fork's.
"""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from domainbed_kd import algorithms, checkpoints
from domainbed_kd.algorithms.base import Algorithm
from domainbed_kd.plugin import obstacles
from domainbed_kd.plugin.dialects import Dialect, dialect_of, parameters, scope_of


def load(folder: str) -> list[str]:
    """Registers the algorithms of the fork in a folder; returns their names.

    A name that both have stays ours.

    Raises:
        ValueError: if the folder holds no fork, one that does not import, one of an unknown
            dialect, or the second of a process.
    """
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module("domainbed.algorithms")
        registry = importlib.import_module("domainbed.hparams_registry")
    except Exception as error:  # a fork's modules run any code
        raise ValueError(f"--fork {folder}: {obstacles.describe(error)}") from error
    if Path(folder).resolve() not in Path(module.__file__).resolve().parents:
        raise ValueError(f"--fork {folder}: domainbed is {Path(module.__file__).parent} in this "
                         "process. One command takes one fork.")
    dialect = dialect_of(module)
    scope = scope_of(module)
    base = scope["Algorithm"]
    candidates = [name for name, cls in scope.items() if isinstance(cls, type)
                  and issubclass(cls, base) and cls is not base]
    names = [name for name in scope.get("ALGORITHMS", candidates)
             if name in candidates and name not in algorithms.ALGORITHMS]
    config = _config(Path(folder))
    for name in names:
        algorithms.register(_visitor(scope[name], registry, dialect, config))
    return names


def _config(folder: Path) -> dict:
    """The hparams that a fork's `config.yaml` sets on top of its registry's, as SWAD's does."""
    if not (folder / "config.yaml").is_file():
        return {}
    import yaml

    values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    # These are for the fork's own loop, which averages checkpoints.
    return {name: value for name, value in values.items() if not name.startswith("swad")}


def _visitor(cls: type, registry: ModuleType, dialect: Dialect, config: dict) -> type:
    """A fork's algorithm as a subclass of ours."""
    def all_hparams(dataset, seed):
        """The fork's own: defaults where seed is None, else its draw."""
        drawn = (registry.default_hparams(cls.__name__, dataset) if seed is None else
                 registry.random_hparams(cls.__name__, dataset, seed))
        drawn = {name: value.item() if isinstance(value, np.generic) else value
                 for name, value in drawn.items()}
        # Our loop and datasets read these; where a fork lacks them, they are DomainBed's.
        return {"class_balanced": False, "data_augmentation": True, **drawn, **config}

    return type(cls.__name__, (Visitor,), {
        "theirs": cls, "dialect": dialect, "all_hparams": staticmethod(all_hparams)})


class Hparams(dict):
    """Hparams that are attributes too, as SWAD's code reads them."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Visitor(Algorithm):
    """A fork's algorithm, `inner`, as our loop calls it.

    Subclasses name the fork's class, `theirs`, and its `dialect`.

    Raises:
        ValueError: if the fork's code asks for a GPU by `.cuda()` and there is none.
    """

    theirs: type
    dialect: Dialect

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        # domainbedv2 fails on its constructors' defaults; these are its command line's.
        more = {"what_is_trainable": "0", "path_for_init": ""}
        known = parameters(self.theirs.__init__)
        more = {name: value for name, value in more.items() if {name, "kwargs"} & {*known}}
        with self._needing_no_gpu():
            self.inner = self.theirs(
                input_shape, num_classes, num_domains, Hparams(hparams), **more)
        self.count_updates()
        self.optimizers = checkpoints.optimizers(self.inner)

    @property
    def network(self):
        """The attribute of that name of the fork's algorithm."""
        return self.inner.network

    def update(self, minibatches, unlabeled=None):
        """One step, in the fork's dialect; returns its values as floats."""
        step = int(self.update_count)
        self.update_count += 1
        takes = parameters(self.inner.update)
        with self._needing_no_gpu():
            if self.dialect.takes_xy:
                x, y = (list(part) for part in zip(*minibatches))
                values = self.inner.update(x=x, y=y, step=step)
            elif "step" in takes:
                values = self.inner.update(minibatches, unlabeled, step)
            elif "unlabeled" in takes:
                values = self.inner.update(minibatches, unlabeled)
            else:
                values = self.inner.update(minibatches)
        self.optimizers = checkpoints.optimizers(self.inner)  # some make new ones
        return {name: float(value) for name, value in values.items()}

    @contextlib.contextmanager
    def _needing_no_gpu(self) -> Iterator[None]:
        try:
            yield
        except (AssertionError, RuntimeError) as error:
            if not re.search("CUDA|NVIDIA", str(error)) or torch.cuda.is_available():
                raise
            raise ValueError(f"{type(self).__name__}: the fork's code moves tensors by .cuda(), "
                             "and this machine has no GPU. Run it on one.") from error

    def predict(self, x):
        """Logits (B, C)."""
        logits = self.inner.predict(x)
        return logits[""] if isinstance(logits, dict) else logits

    def get_extra_state(self):
        """The plain numbers that the fork's algorithm keeps, such as counters."""
        return {name: value for name, value in vars(self.inner).items()
                if isinstance(value, (bool, int, float)) and name != "training"}

    def set_extra_state(self, state):
        """Puts them back."""
        vars(self.inner).update(state)
