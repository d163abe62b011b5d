"""The dialect of a DomainBed fork: how it calls its algorithms.

A fork is recognised by its classes and their signatures, never by its folder's name. The dialects
are those of DomainBed, SWAD, MIRO, SCMD and domainbedv2 (see docs/forks.md).
"""

import inspect
import sys
from types import ModuleType
from typing import NamedTuple

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
        ValueError: if its base class fits none of them.
    """
    scope = scope_of(module)
    base = scope.get("Algorithm")
    where = getattr(module, "__file__", module.__name__)
    if not isinstance(base, type) or not hasattr(base, "update"):
        raise ValueError(f"{where} has no class Algorithm with an update method. Expected one "
                         f"with {EXPECTED}.")
    names = parameters(base.update)
    # Only the fork's own: the update of what it imports (OrderedDict) may have no signature.
    own = [cls for cls in scope.values() if isinstance(cls, type) and issubclass(cls, base)]
    predicts_dict = {"what_is_trainable", "path_for_init"} <= set(
        parameters(scope.get("ERM", base).__init__))
    if names[:2] == ["x", "y"]:
        name = "MIRO" if any(cls.__name__ == "MIRO" for cls in own) else "SWAD"
        return Dialect(name, True, predicts_dict)
    if names[:1] != ["minibatches"]:
        raise ValueError(f"{where}: Algorithm.update({', '.join(names)}) is not a known dialect. "
                         f"Expected {EXPECTED}.")
    if predicts_dict:
        return Dialect("domainbedv2", False, True)
    if any("step" in parameters(cls.update) for cls in own):
        return Dialect("SCMD", False, False)
    return Dialect("DomainBed" if "unlabeled" in names else "older DomainBed", False, False)


def parameters(method) -> list[str]:
    """The names of a method's parameters, without self."""
    return [name for name in inspect.signature(method).parameters if name != "self"]


def scope_of(module: ModuleType) -> dict:
    """The namespace in which `get_algorithm_class` looks names up.

    If the fork's algorithms are a package, it may be that of a module in the package.
    """
    for each in (module, *submodules(module)):
        find = vars(each).get("get_algorithm_class")
        if hasattr(find, "__globals__"):
            return find.__globals__
    return vars(module)


def submodules(module: ModuleType) -> list[ModuleType]:
    """The imported submodules of a package; none of a plain module."""
    return [each for name, each in list(sys.modules.items())
            if name.startswith(f"{module.__name__}.")]
