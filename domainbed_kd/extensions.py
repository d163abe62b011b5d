"""Algorithms, datasets and launchers from outside the package.

A module given by name or as a .py file adds every Algorithm and MultipleDomainDataset class that
it defines, and the functions in its dict `LAUNCHERS`, if it has one. An installed package adds
its own through the entry point groups `domainbed_kd.algorithms`, `domainbed_kd.datasets` and
`domainbed_kd.launchers`; these are imported only if named. A folder with a package `domainbed` is
a DomainBed fork, and adds the fork's algorithms.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from domainbed_kd import algorithms, command_launchers, datasets

KINDS = ("algorithms", "datasets", "launchers")


def names(kind: str) -> list[str]:
    """The names of a kind in KINDS that installed packages offer; imports nothing."""
    return sorted(importlib.metadata.entry_points(group=f"domainbed_kd.{kind}").names)


def load(modules: Iterable[str] = (), wanted: Iterable[str] = ()) -> None:
    """Registers what the modules define, and the wanted names that entry points offer.

    Args:
        modules: dotted names, searched in the working directory too, or paths of .py files or of
            forks.
        wanted: names of algorithms, datasets or launchers; those without an entry point are
            ignored.

    Raises:
        ValueError: if a module cannot be imported, defines nothing of use, or takes a name that
            is in use.
    """
    for module in modules:
        if os.path.isdir(os.path.join(module, "domainbed")):
            from domainbed_kd.plugin import visitors

            visitors.load(os.path.abspath(module))
        else:
            _register_module(module)
    known = {*algorithms.ALGORITHMS, *datasets.DATASETS, *command_launchers.REGISTRY}
    missing = set(wanted) - known
    for kind in KINDS if missing else ():
        for entry_point in importlib.metadata.entry_points(group=f"domainbed_kd.{kind}"):
            if entry_point.name in missing:
                _register_entry_point(kind, entry_point)


def _register_module(name: str) -> None:
    module = _import(name)
    own = [value for key, value in vars(module).items()
           if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__]
    launchers = getattr(module, "LAUNCHERS", {})
    found = {kind: [value for value in own if _is_a(kind, value)]
             for kind in ("algorithms", "datasets")}
    if not any(found.values()) and not launchers:
        raise ValueError(f"--plugin {name} defines no Algorithm, no MultipleDomainDataset and no "
                         "LAUNCHERS.")
    for kind, classes in found.items():
        for cls in classes:
            _register(kind, cls.__name__, cls, f"--plugin {name}")
    for key, function in launchers.items():
        _register("launchers", key, function, f"--plugin {name}")


def _register_entry_point(kind: str, entry_point: importlib.metadata.EntryPoint) -> None:
    who = f"entry point {entry_point.name} = {entry_point.value}"
    try:
        value = entry_point.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{who}: {error}") from error
    if kind != "launchers" and getattr(value, "__name__", None) != entry_point.name:
        raise ValueError(f"{who}: the entry point must have the class's name.")
    _register(kind, entry_point.name, value, who)


def _register(kind: str, name: str, value, who: str) -> None:
    if not _is_a(kind, value):
        raise ValueError(f"{who}: {name} is not one of the {kind}.")
    registry, get, add = {
        "algorithms": (algorithms.ALGORITHMS, algorithms.get_algorithm_class, algorithms.register),
        "datasets": (datasets.DATASETS, datasets.get_dataset_class, datasets.register),
        "launchers": (command_launchers.REGISTRY, command_launchers.get_launcher,
                      lambda f: command_launchers.REGISTRY.setdefault(name, f)),
    }[kind]
    if name in registry and get(name) is not value:
        raise ValueError(f"{who}: {name} is already one of the {kind}; choose another name.")
    add(value)


def _is_a(kind: str, value) -> bool:
    if kind == "launchers":
        return callable(value)
    if not isinstance(value, type):
        return False
    if kind == "datasets":
        return issubclass(value, datasets.MultipleDomainDataset)
    from domainbed_kd.algorithms.base import Algorithm

    return issubclass(value, Algorithm)


def _import(name: str):
    """The module of a dotted name or a .py file."""
    if not name.endswith(".py") and not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"--plugin or --fork {name!r}: the former takes a .py file or a module's "
                         "dotted name, the latter a folder that holds a package domainbed.")
    try:
        if not name.endswith(".py"):
            if os.getcwd() not in sys.path:  # as with `python -m`; console scripts lack it
                sys.path.append(os.getcwd())
            return importlib.import_module(name)
        path = Path(name).resolve()
        if not path.is_file():
            raise ValueError(f"--plugin {name}: there is no such file.")
        # Named by its path, so that a plug-in called random.py does not hide a module.
        key = f"plugin {path}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, path)
            sys.modules[key] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[key])
            except BaseException:
                del sys.modules[key]
                raise
        return sys.modules[key]
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"--plugin {name}: {error}") from error
    except SystemExit as error:
        raise ValueError(f"--plugin {name} ends the program when it is imported, by "
                         f"sys.exit({error.code!r}). Put that under if __name__ == \"__main__\"."
                         ) from error
