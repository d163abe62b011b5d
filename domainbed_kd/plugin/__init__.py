"""Our methods inside the DomainBed fork that a lab already has, and a fork's methods here.

    python -m domainbed_kd.plugin -- python -m domainbed.scripts.train --algorithm RISE ...
    python -m domainbed_kd.plugin doctor

The first runs any command; every Python that it starts, by whatever launcher, teaches the fork's
`domainbed.algorithms` our methods as soon as that module is imported. No file is edited. Without
this command, one line at the end of the fork's algorithms module does the same:
`import domainbed_kd.plugin; domainbed_kd.plugin.install()`.

`dialects` reads how a fork calls its algorithms, `sightings` what its process knows of its data.
`guests` are our algorithms in a fork, `visitors` a fork's algorithms here.
"""

import gc
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType


def install() -> None:
    """Teaches the fork at hand our methods, now or once its modules are imported.

    Does not raise: what goes wrong is one line on stderr, and the fork runs as it is.
    """
    install_on_import()
    for name in _LESSONS:
        if name in sys.modules:
            _teach(name, sys.modules[name])


def install_on_import() -> None:
    """Teaches each of the fork's modules once it is imported; imports nothing by itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _teach_algorithms(module: ModuleType) -> None:
    from domainbed_kd.plugin import guests

    found = guests.teach(module)
    kept = [name for name, fate in found.items() if fate != guests.ADDED]
    if kept:
        print(f"domainbed_kd: this fork has {', '.join(kept)} of its own; it is kept.",
              file=sys.stderr)


def _teach_hparams(module: ModuleType) -> None:
    from domainbed_kd.plugin import guests

    guests.teach_hparams(module)


def _watch_datasets(module: ModuleType) -> None:
    from domainbed_kd.plugin import sightings

    sightings.watch_datasets(module)


def _watch_splits(module: ModuleType) -> None:
    from domainbed_kd.plugin import sightings

    sightings.watch_splits(module)


_LESSONS = {"domainbed.algorithms": _teach_algorithms,
            "domainbed.hparams_registry": _teach_hparams,
            "domainbed.datasets": _watch_datasets,
            "domainbed.lib.misc": _watch_splits}


def _teach(name: str, module: ModuleType) -> None:
    """Gives a fork's module its lesson, once.

    The fork's own methods need nothing of ours, so whatever fails here must not stop them.
    """
    if hasattr(module, "__taught__"):
        return
    module.__taught__ = True
    collects = gc.isenabled()
    gc.disable()  # collections would walk all that torch imports, and take longer than the lesson
    try:
        _LESSONS[name](module)
    except Exception as error:
        where = os.path.dirname(getattr(module, "__file__", None) or name)
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"domainbed_kd: the fork in {where} goes on without our methods: {reason} For more, "
              "run `python -m domainbed_kd.plugin doctor` there.", file=sys.stderr)
    finally:
        if collects:
            gc.enable()


class _Finder(MetaPathFinder):
    """Finds the fork's modules where they are, and gives each its lesson after it has run."""

    def find_spec(self, fullname, path=None, target=None):
        """The spec of a module to be taught; None for all others."""
        if fullname not in _LESSONS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_teach(module):
            run(module)
            _teach(fullname, module)

        spec.loader.exec_module = run_and_teach
        return spec
