"""Our algorithms inside a DomainBed fork: `teach` adds them to it, `Guest` is one of them there.

A guest has the fork's backbone and hparams, and the names of its classes and training domains.
"""

import contextlib
import copy
import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

from domainbed_kd import algorithms, averaging, hparams_registry, networks
from domainbed_kd.algorithms import composed
from domainbed_kd.plugin import held_out, sightings
from domainbed_kd.plugin.dialects import Dialect, dialect_of, scope_of

#: The methods that a fork is given.
METHODS = ("KD", "KDDG", "SCMD", "RISE", "MosaicKD", "FourDs", "VL2VADiP", "VL2VSD", "WAKD", "LFME",
           "CLIPood", "XDED", "SWAD", "CLIP", "CLIPLinearProbe")
ADDED = "added"


def teach(module: ModuleType) -> dict[str, str]:
    """Adds our methods to a fork's `domainbed.algorithms`; returns {method: what became of it}.

    Raises:
        ValueError: if the fork's dialect is unknown.
    """
    dialect = dialect_of(module)
    scopes = {id(scope): scope for scope in (vars(module), scope_of(module))}.values()
    found = {}
    for name in METHODS:
        own_averaging = name == "SWAD" and dialect.takes_xy
        if own_averaging or any(
                name in scope and not is_guest(scope[name]) for scope in scopes):
            found[name] = "the fork's own is kept"
            continue
        found[name] = ADDED
        cls = _guest(name, module, dialect)
        for scope in scopes:
            scope[name] = cls
            if name == "FourDs":
                scope["4Ds"] = cls
            if name not in scope.get("ALGORITHMS", [name]):
                scope["ALGORITHMS"].append(name)
    return found


def teach_and_say(module: ModuleType) -> None:
    """Adds our methods, and names on stderr those of which the fork has its own."""
    if kept := [name for name, fate in teach(module).items() if fate != ADDED]:
        print(f"domainbed_kd: this fork has {', '.join(kept)} of its own; it is kept.",
              file=sys.stderr)


def teach_hparams(registry: ModuleType) -> None:
    """Adds our methods' hparams to a fork's `domainbed.hparams_registry`; its draws stay."""
    def is_ours(name):
        if algorithms.canonical_name(name) not in METHODS:
            return False
        module = importlib.import_module(f"{registry.__package__}.algorithms")
        return is_guest(module.get_algorithm_class(name))

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


def is_guest(cls) -> bool:
    """Whether a class in a fork is one of ours."""
    return isinstance(cls, type) and issubclass(cls, Guest)


def _guest(name: str, module: ModuleType, dialect: Dialect) -> type:
    """Our algorithm of that name as a subclass of the fork's Algorithm."""
    def update_xy(self, x, y, **kwargs):
        """One step; x and y hold a tensor per training domain."""
        return self._update(list(zip(x, y)))

    def update(self, minibatches, unlabeled=None, step=None):
        """One step. Steps are counted here, whatever the fork passes."""
        return self._update(minibatches, unlabeled)

    # Its module is the fork's, so that pickle finds it there.
    return type(name, (Guest, vars(module).get("Algorithm") or scope_of(module)["Algorithm"]), {
        "__module__": module.__name__, "method": name, "dialect": dialect,
        "package": module.__name__.split(".")[0],
        "update": update_xy if dialect.takes_xy else update})


class Guest:
    """One of our algorithms, its `core`, as its fork's loops call it.

    Subclasses inherit from the fork's Algorithm too, and name the `method`, the fork's `dialect`
    and its `package`.

    Raises:
        ValueError: if an hparam asks for what only our own training loop can do.
    """

    method: str
    dialect: Dialect
    package: str

    def __init__(self, input_shape, num_classes, num_domains, hparams, *args, **kwargs):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.input_shape = input_shape
        self.num_classes = num_classes
        self.num_domains = num_domains
        known = context(self.method, hparams, num_classes, num_domains)
        if known.get("averaging") == "swad" and self.dialect.takes_xy:
            raise ValueError(f"{self.method}: averaging by 'swad' validates on held-out images, "
                             "which this fork's loop keeps to its own SWAD. Use that, or 'sma'.")
        cls = composed.assembled(algorithms.get_algorithm_class(self.method), known)
        theirs = importlib.import_module(f"{self.package}.networks")
        with borrowed_featurizer(theirs, input_shape, hparams):
            self.core = cls(input_shape, num_classes, num_domains, known)
        if "clip_backbone" in known:
            # A process that loads the checkpoint has no dataset to read them from.
            for name in ("class_names", "domain_names"):
                if name in known:
                    hparams[name] = known[name]
        self.steps = 0

    @property
    def network(self):
        """What `predict` runs."""
        return self.core.network

    def __setattr__(self, name, value):
        # T3A wraps the network of every algorithm in DataParallel. Our methods use parts of their
        # network, so it stays as it is, and so do the names of its weights.
        if name != "network" or getattr(value, "module", None) is not self.network:
            super().__setattr__(name, value)

    @property
    def optimizer(self):
        """The student's optimiser, or None."""
        return getattr(self.core, "optimizer", None)

    def _update(self, minibatches, unlabeled=None):
        if unlabeled is not None:
            unlabeled = [x[0] if isinstance(x, (tuple, list)) else x for x in unlabeled]
        values = self.core.update(minibatches, unlabeled)
        if isinstance(self.core, averaging.WithLossValley):
            held_out.end_step(self.core, self.method, self.num_domains, self.steps)
        self.steps += 1
        return {name: float(value) for name, value in values.items()}

    def predict(self, x):
        """Logits, in the form that the fork reads."""
        logits = self.core.predict(x)
        return {"": logits} if self.dialect.predicts_dict else logits

    def forward(self, x):
        """The same as `predict`."""
        return self.predict(x)

    def new_optimizer(self, parameters):
        """DomainBed's Adam, over other parameters."""
        return torch.optim.Adam(parameters, lr=self.core.hparams["lr"],
                                weight_decay=self.core.hparams["weight_decay"])

    def clone(self):
        """A copy that trains on its own."""
        return copy.deepcopy(self)

    def get_forward_model(self):
        """A copy of the network that predicts, without what only training needs."""
        averages = hasattr(self.core, "average") and self.core.hparams.get("scmd_sma", True)
        return copy.deepcopy((self.core.average if averages else self.core).network)

    def _teacher(self) -> list[str]:
        return [key for key in super().state_dict() if key.startswith("core.teacher.")]

    def _warmed_up(self) -> bool:
        left = getattr(self.core, "warm_up_left", None)
        return left is not None and int(left) == 0 and bool(self._teacher())

    def state_dict(self, *args, **kwargs):
        """The student's state; a teacher that it trained is left out once it is not needed."""
        state = super().state_dict(*args, **kwargs)
        if self._warmed_up():
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            for key in self._teacher():
                del state[prefix + key]
        return state

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Loads a state with or without the teacher."""
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


def context(method: str, hparams, num_classes: int, num_domains: int) -> dict:
    """The hparams of our algorithm: defaults, then facts on the data, then the fork's own.

    Raises:
        ValueError: if one of them asks for what only our own training loop can do.
    """
    given = dict(hparams.items())  # a dict, or SWAD's attribute-style Config
    seen = sightings.seen()
    known = {"total_steps": sightings.total_steps(), "dataset": seen.name,
             "test_envs": seen.test_envs, "class_names": seen.class_names(num_classes),
             "domain_names": seen.domain_names(num_domains)}
    # SCMD's datasets write the names of all domains there, including the test domain's.
    if len(given.get("domain_names") or ()) != num_domains:
        given.pop("domain_names", None)
    if given.get("canonical_view"):
        raise ValueError(f"{method}: canonical_view needs our own training loop, which knows "
                         "which images a batch consists of. Leave it out in a fork.")
    if given.get("class_groups"):
        raise ValueError(f"{method}: class_groups needs our own training loop, whose loaders draw "
                         "the same classes in every domain. Leave it out in a fork.")
    defaults = hparams_registry.default_hparams(method, seen.name or "PACS")
    return defaults | {key: value for key, value in known.items() if value is not None} | given


@contextlib.contextmanager
def borrowed_featurizer(theirs: ModuleType, input_shape, hparams) -> Iterator[None]:
    """Has our algorithms build the fork's Featurizer, so that all rows share a backbone."""
    def Featurizer(shape, _):
        if tuple(shape) != tuple(input_shape):
            return original(shape, _)
        return _with_stages(theirs.Featurizer(input_shape, hparams), input_shape)

    original, networks.Featurizer = networks.Featurizer, Featurizer
    try:
        yield
    finally:
        networks.Featurizer = original


@torch.no_grad()
def _with_stages(featurizer: nn.Module, input_shape) -> nn.Module:
    """The featurizer; one of an architecture that we have is cut into stages as ours are."""
    if hasattr(featurizer, "stages"):
        return featurizer
    x = torch.linspace(-1, 1, 2 * torch.Size(input_shape).numel()).view(2, *input_shape)
    mode, own = featurizer.training, type(featurizer)
    featurizer.eval()  # on a line of its own, as it returns None in many forks
    expected = featurizer(x)
    if isinstance(expected, Tensor):  # MIRO's may return the maps too
        for cls in (networks.ResNet, networks.WideResNet, networks.MNIST_CNN):
            methods = {"stages": cls.stages, "pool": cls.pool, "__module__": own.__module__}
            if not hasattr(featurizer, "activation"):  # as in older forks
                methods["activation"] = nn.Identity()
            # A class of its own: methods bound to this instance would stay bound to it in copies.
            featurizer.__class__ = type(own.__name__, (own,), methods)
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
