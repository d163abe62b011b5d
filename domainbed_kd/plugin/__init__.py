"""Our methods inside the DomainBed fork that a lab already has, and a fork's methods here.

    python -m domainbed_kd.plugin -- python -m domainbed.scripts.train --algorithm RISE ...
    python -m domainbed_kd.plugin doctor

The first runs any command. Every Python process that it starts, by whatever launcher, adds our
methods to the fork's `domainbed.algorithms` as soon as that module is imported. No file is edited.
Without this command, one line at the end of the fork's algorithms module does the same:
`import domainbed_kd.plugin; domainbed_kd.plugin.install()`.

`dialects` finds out how a fork calls its algorithms, `sightings` what its process knows of its
data. `guests` are our algorithms in a fork, `visitors` a fork's algorithms here.
"""

import gc
import importlib
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType


def install() -> None:
    """Adds our methods to the fork at hand, now or once its modules are imported.

    Never raises: an error is one line on stderr, and the fork runs as it is.
    """
    install_on_import()
    for name in _LESSONS:
        if name in sys.modules:
            _teach(name, sys.modules[name])


def install_on_import() -> None:
    """Has each of the fork's modules taught once it is imported; imports nothing by itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


#: {a fork's module: our function that is called with it once it is imported}.
_LESSONS = {"domainbed.algorithms": "guests.teach_and_say",
            "domainbed.hparams_registry": "guests.teach_hparams",
            "domainbed.datasets": "sightings.watch_datasets",
            "domainbed.lib.misc": "sightings.watch_splits"}


def _teach(name: str, module: ModuleType) -> None:
    """Gives a fork's module its lesson, once.

    The fork's own methods do not need ours, so whatever fails here must not stop them.
    """
    if hasattr(module, "__taught__"):
        return
    module.__taught__ = True
    collects = gc.isenabled()
    gc.disable()  # collections would walk all that torch imports, and take longer than the lesson
    try:
        ours, function = _LESSONS[name].split(".")
        getattr(importlib.import_module(f"{__name__}.{ours}"), function)(module)
    except Exception as error:
        where = os.path.dirname(getattr(module, "__file__", None) or name)
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"domainbed_kd: the fork in {where} runs without our methods: {reason} For more, "
              "run `python -m domainbed_kd.plugin doctor` there.", file=sys.stderr)
    finally:
        if collects:
            gc.enable()


class _Finder(MetaPathFinder):
    """Finds the fork's modules as Python does, and gives each its lesson after it has run."""

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
