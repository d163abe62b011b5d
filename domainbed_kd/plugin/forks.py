"""DomainBed forks: the dialect that one speaks, and algorithms carried across in both directions.

A fork is recognised by the signatures of its own classes, never by its name. `Guest` makes one
of our algorithms a citizen of a fork, `Visitor` one of a fork's a citizen here. The dialects are
those of DomainBed, SWAD, MIRO, SCMD and domainbedv2 (see docs/forks.md).
"""

import argparse
import contextlib
import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

from domainbed_kd import algorithms, datasets, hparams_registry

#: What a fork is given. Methods whose training needs our own loop (SWAD) are not among them.
METHODS = ("KD", "KDDG", "SCMD", "RISE", "MosaicKD", "FourDs", "CLIP", "CLIPLinearProbe")
EXPECTED = ("update(minibatches), update(minibatches, unlabeled), update(minibatches, unlabeled, "
            "step) or update(x, y, **kwargs)")


class Dialect(NamedTuple):
    """How a fork calls its algorithms."""

    name: str
    takes_xy: bool  # update(x=[...], y=[...], step=n), not update([(x, y), ...])
    predicts_dict: bool  # predict returns {"": logits}


def dialect_of(module: ModuleType) -> Dialect:
    """The dialect of a fork's `domainbed.algorithms`.

    Raises:
        ValueError: if its base class is unlike any that is known.
    """
    base = getattr(module, "Algorithm", None)
    where = getattr(module, "__file__", module.__name__)
    if not isinstance(base, type) or not hasattr(base, "update"):
        raise ValueError(f"{where} has no class Algorithm with an update method. Expected one "
                         f"with {EXPECTED}.")
    names = _parameters(base.update)
    built = set(_parameters(getattr(module, "ERM", base).__init__))
    predicts_dict = {"what_is_trainable", "path_for_init"} <= built
    if names[:2] == ["x", "y"]:
        return Dialect("MIRO" if "kwargs" in built else "SWAD", True, predicts_dict)
    if names[:1] != ["minibatches"]:
        raise ValueError(f"{where}: Algorithm.update({', '.join(names)}) is no dialect that is "
                         f"known. Expected {EXPECTED}.")
    if predicts_dict:
        return Dialect("domainbedv2", False, True)
    # Only the fork's own: builtins that it imports (OrderedDict) have an update without signature.
    if any(isinstance(cls, type) and issubclass(cls, base) and "step" in _parameters(cls.update)
           for cls in vars(module).values()):
        return Dialect("SCMD", False, False)
    return Dialect("DomainBed" if "unlabeled" in names else "older DomainBed", False, False)


def _parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)[1:] if callable(function) else []


# What a fork knows of its data, and tells nobody.


class Seen(NamedTuple):
    """The data set that this process built last."""

    dataset: object = None
    test_envs: list[int] | None = None

    @property
    def name(self) -> str | None:
        """The name of its class."""
        return None if self.dataset is None else type(self.dataset).__name__

    def class_names(self, num_classes: int) -> list[str] | None:
        """Words for the classes, in label order: ours where we have the data set, else its own."""
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

    def _environments(self) -> list:
        environments = getattr(self.dataset, "datasets", None) or []
        return [getattr(env, "dataset", env) for env in environments]


_seen = Seen()


def watch_datasets(module: ModuleType) -> None:
    """Notes every data set that the classes of a fork's `domainbed.datasets` build."""
    for cls in list(vars(module).values()):
        if (isinstance(cls, type) and "__init__" in vars(cls)
                and cls.__module__.startswith(module.__name__)
                and cls.__name__ != "MultipleDomainDataset" and _is_multiple(cls)):
            cls.__init__ = _noting(cls.__init__)
    if inspect.isfunction(make := getattr(module, "get_dataset", None)):  # SWAD and MIRO
        if "test_envs" in inspect.signature(make).parameters:
            module.get_dataset = _noting_test_envs(make)


def _is_multiple(cls: type) -> bool:
    return any(base.__name__ == "MultipleDomainDataset" for base in cls.__mro__)


def _noting(init: Callable) -> Callable:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        global _seen
        init(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments.get("test_envs")
        _seen = Seen(self, _seen.test_envs if given is None else list(given))

    return wrapped


def _noting_test_envs(make: Callable) -> Callable:
    signature = inspect.signature(make)

    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        global _seen
        _seen = Seen(None, list(signature.bind(*args, **kwargs).arguments["test_envs"]))
        return make(*args, **kwargs)

    return wrapped


def _total_steps() -> int | None:
    """The length of the run: its command line's, else its data set's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--steps", type=int)
    return parser.parse_known_args(sys.argv[1:])[0].steps or getattr(
        _seen.dataset, "N_STEPS", None)


# Our algorithms in a fork.


def teach(module: ModuleType) -> dict[str, str]:
    """Adds our methods to a fork's `domainbed.algorithms`; {method: what became of it}.

    Raises:
        ValueError: if the fork's dialect is unknown.
    """
    dialect = dialect_of(module)
    scopes = {id(scope): scope for scope in (  # SWAD looks names up in a module of the package
        vars(module), getattr(module.get_algorithm_class, "__globals__", vars(module)))}.values()
    found = {}
    for name in METHODS:
        if any(name in scope for scope in scopes):
            found[name] = "the fork's own is kept"
            continue
        found[name] = "added"
        cls = _guest(name, module, dialect)
        for scope in scopes:
            scope[name] = cls
            if name == "FourDs":
                scope["4Ds"] = cls
            if name not in scope.get("ALGORITHMS", [name]):
                scope["ALGORITHMS"].append(name)
    return found


def teach_hparams(registry: ModuleType) -> None:
    """Adds our methods' hparams to a fork's `domainbed.hparams_registry`; no draw of its moves."""
    def is_ours(name):
        if algorithms.canonical_name(name) not in METHODS:
            return False
        module = importlib.import_module(f"{registry.__package__}.algorithms")
        return getattr(module.get_algorithm_class(name), "is_guest", False)

    def wrap(function, ours):
        @functools.wraps(function)
        def wrapped(algorithm, dataset, *seed):
            if not is_ours(algorithm):
                return function(algorithm, dataset, *seed)
            name = algorithms.canonical_name(algorithm)
            own = algorithms.get_algorithm_class(name).search_space(dataset)
            drawn = ours(name, dataset, *seed)
            return {**function("ERM", dataset, *seed), **{key: drawn[key] for key in own}}

        return wrapped

    registry.default_hparams = wrap(registry.default_hparams, hparams_registry.default_hparams)
    registry.random_hparams = wrap(registry.random_hparams, hparams_registry.random_hparams)


def _guest(name: str, module: ModuleType, dialect: Dialect) -> type:
    """A subclass of the fork's Algorithm that holds our algorithm of that name as `core`."""
    class Guest(module.Algorithm):
        """One of our algorithms, as its fork's loops call it."""

        is_guest = True

        def __init__(self, input_shape, num_classes, num_domains, hparams, *args, **kwargs):
            super().__init__(input_shape, num_classes, num_domains, hparams)
            self.input_shape = input_shape
            self.num_classes = num_classes
            self.num_domains = num_domains
            networks = importlib.import_module(f"{_root(module)}.networks")
            with borrowed_featurizer(networks, input_shape, hparams):
                self.core = algorithms.get_algorithm_class(name)(
                    input_shape, num_classes, num_domains,
                    context(name, hparams, num_classes, num_domains))

        @property
        def network(self):
            """What `predict` runs."""
            return self.core.network

        @property
        def optimizer(self):
            """The student's optimiser, or None."""
            return getattr(self.core, "optimizer", None)

        def _update(self, minibatches, unlabeled=None):
            if unlabeled is not None:
                unlabeled = [x[0] if isinstance(x, (tuple, list)) else x for x in unlabeled]
            return self.core.update(minibatches, unlabeled)

        def predict(self, x):
            """Logits, in the form that the fork reads."""
            logits = self.core.predict(x)
            return {"": logits} if dialect.predicts_dict else logits

        def forward(self, x):
            """The same as `predict`."""
            return self.predict(x)

        def new_optimizer(self, parameters):
            """DomainBed's Adam, over other parameters."""
            import torch

            return torch.optim.Adam(parameters, lr=self.core.hparams["lr"],
                                    weight_decay=self.core.hparams["weight_decay"])

        def clone(self):
            """A copy that trains on its own."""
            return copy.deepcopy(self)

        def get_forward_model(self):
            """A copy of what predicts, without what only training needs."""
            return copy.deepcopy(self.core.network)

        def _warmed_up(self):
            left = getattr(self.core, "warm_up_left", None)
            return left is not None and int(left) == 0 and any(True for _ in self._teacher())

        def _teacher(self):
            return (key for key in super().state_dict() if key.startswith("core.teacher."))

        def state_dict(self, *args, **kwargs):
            """The student; a teacher that it warmed up is left out once it has done its work."""
            state = super().state_dict(*args, **kwargs)
            if self._warmed_up():
                prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
                for key in self._teacher():
                    del state[prefix + key]
            return state

        def load_state_dict(self, state_dict, *args, **kwargs):
            """Takes a state with or without the teacher."""
            own = super().state_dict()
            absent = {key: own[key] for key in self._teacher() if key not in state_dict}
            return super().load_state_dict({**state_dict, **absent}, *args, **kwargs)

        def __deepcopy__(self, memo):
            if self._warmed_up():
                teacher = self.core.teacher
                memo |= {id(part): part for part in (teacher, *teacher.parameters())}
            copied = memo[id(self)] = type(self).__new__(type(self))
            vars(copied).update(copy.deepcopy(vars(self), memo))
            return copied

    if dialect.takes_xy:
        def update(self, x, y, **kwargs):
            """One step; x and y hold a tensor per training domain."""
            return self._update(list(zip(x, y)))
    else:
        def update(self, minibatches, unlabeled=None, step=None):
            """One step; steps are counted here, whatever the fork passes."""
            return self._update(minibatches, unlabeled)
    Guest.update = update
    Guest.__name__ = Guest.__qualname__ = name
    Guest.__module__ = module.__name__
    return Guest


def context(name: str, hparams, num_classes: int, num_domains: int) -> dict:
    """The hparams of our algorithm: defaults, what the process knows of the data, the fork's."""
    given = dict(hparams.items())  # a dict, or SWAD's attribute-style Config
    known = {"total_steps": _total_steps(), "dataset": _seen.name, "test_envs": _seen.test_envs,
             "class_names": _seen.class_names(num_classes),
             "domain_names": _seen.domain_names(num_domains)}
    # SCMD's data sets write them there, the test domain's among them.
    if len(given.get("domain_names") or ()) != num_domains:
        given.pop("domain_names", None)
    if given.get("canonical_view"):
        raise ValueError("domainbed_kd: canonical_view needs our own training loop, which knows "
                         "which images a batch consists of. Leave it out in a fork.")
    defaults = hparams_registry.default_hparams(name, _seen.name or "PACS")
    return defaults | {key: value for key, value in known.items() if value is not None} | given


@contextlib.contextmanager
def borrowed_featurizer(networks: ModuleType, input_shape, hparams) -> Iterator[None]:
    """Inside, our algorithms build the fork's Featurizer, so that all rows share a backbone."""
    from domainbed_kd import networks as ours

    def Featurizer(shape, _):
        if tuple(shape) != tuple(input_shape):
            return original(shape, _)
        return _with_stages(networks.Featurizer(input_shape, hparams), input_shape)

    original, ours.Featurizer = ours.Featurizer, Featurizer
    try:
        yield
    finally:
        ours.Featurizer = original


def _with_stages(featurizer, input_shape):
    """The featurizer, cut into stages as ours of the same architecture are, if it is one."""
    import torch

    from domainbed_kd import networks

    if hasattr(featurizer, "stages"):
        return featurizer
    x = torch.linspace(-1, 1, 2 * torch.Size(input_shape).numel()).view(2, *input_shape)
    mode, own = featurizer.training, type(featurizer)
    featurizer.eval()  # a statement: the train() of many forks returns None
    expected = featurizer(x)
    if isinstance(expected, torch.Tensor):  # MIRO's may return the maps too
        for cls in (networks.ResNet, networks.WideResNet, networks.MNIST_CNN):
            # A class of its own, since methods bound to an instance would follow its copies.
            featurizer.__class__ = type(own.__name__, (own,),
                                        {"stages": cls.stages, "pool": cls.pool})
            with contextlib.suppress(AttributeError):  # another architecture
                found = x
                for stage in featurizer.stages():
                    found = stage(found)
                found = featurizer.pool(found)
                if found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5):
                    break
            featurizer.__class__ = own
    featurizer.train(mode)
    return featurizer


def _root(module: ModuleType) -> str:
    """The fork's package, as it is called."""
    return module.__name__.split(".")[0]


# A fork's algorithms here.


def load(folder: str) -> list[str]:
    """Registers the algorithms of the fork in a folder under their names; returns these.

    A name that we have too stays ours.

    Raises:
        ValueError: if the folder holds no fork, or one of an unknown dialect.
    """
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module("domainbed.algorithms")
        registry = importlib.import_module("domainbed.hparams_registry")
    except ImportError as error:
        raise ValueError(f"--fork {folder}: {error}. Expected a folder that holds the package "
                         "domainbed.") from error
    dialect = dialect_of(module)
    scope = getattr(module.get_algorithm_class, "__globals__", vars(module))
    candidates = [name for name, cls in scope.items() if isinstance(cls, type)
                  and issubclass(cls, module.Algorithm) and cls is not module.Algorithm]
    names = [name for name in scope.get("ALGORITHMS", candidates)
             if name in candidates and name not in algorithms.ALGORITHMS]
    for name in names:
        algorithms.register(_visitor(scope[name], registry, dialect))
    return names


class _Hparams(dict):
    """Hparams that are attributes too, as SWAD's code reads them."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


def _visitor(cls: type, registry: ModuleType, dialect: Dialect) -> type:
    """An Algorithm of ours that holds a fork's as `inner`."""
    import torch

    from domainbed_kd import checkpoints
    from domainbed_kd.algorithms.base import Algorithm

    passes_step = "step" in _parameters(cls.update)

    class Visitor(Algorithm):
        """A fork's algorithm, as our loop calls it."""

        @staticmethod
        def all_hparams(dataset, seed):
            """The fork's own: defaults where seed is None, else its draw."""
            drawn = (registry.default_hparams(cls.__name__, dataset) if seed is None else
                     registry.random_hparams(cls.__name__, dataset, seed))
            # What our loop and data sets read, and forks may lack, as DomainBed has it.
            return {"class_balanced": False, "data_augmentation": True, **drawn}

        def __init__(self, input_shape, num_classes, num_domains, hparams):
            super().__init__(input_shape, num_classes, num_domains, hparams)
            self.inner = cls(input_shape, num_classes, num_domains, _Hparams(hparams))
            self.register_buffer("update_count", torch.tensor(0))
            self.optimizers = checkpoints.optimizers(self.inner)

        @property
        def network(self):
            """What the fork's algorithm calls so."""
            return self.inner.network

        def update(self, minibatches, unlabeled=None):
            """One step, in the fork's dialect; its values as floats."""
            step = int(self.update_count)
            self.update_count += 1
            if dialect.takes_xy:
                x, y = (list(part) for part in zip(*minibatches))
                values = self.inner.update(x=x, y=y, step=step)
            elif passes_step:
                values = self.inner.update(minibatches, unlabeled, step)
            elif "unlabeled" in _parameters(cls.update):
                values = self.inner.update(minibatches, unlabeled)
            else:
                values = self.inner.update(minibatches)
            self.optimizers = checkpoints.optimizers(self.inner)  # some make new ones
            return {name: float(value) for name, value in values.items()}

        def predict(self, x):
            """Logits (B, C)."""
            logits = self.inner.predict(x)
            return logits[""] if isinstance(logits, dict) else logits

        def get_extra_state(self):
            """Counters that the fork's algorithm keeps as plain numbers."""
            return {name: value for name, value in vars(self.inner).items()
                    if isinstance(value, (bool, int, float)) and name != "training"}

        def set_extra_state(self, state):
            """Puts them back."""
            vars(self.inner).update(state)

    Visitor.__name__ = Visitor.__qualname__ = cls.__name__
    return Visitor
