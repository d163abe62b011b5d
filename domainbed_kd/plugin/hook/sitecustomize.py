"""What every Python under `python -m domainbed_kd.plugin -- COMMAND` runs at its start."""

import os
import sys
from importlib import util
from importlib.machinery import PathFinder

_here = os.path.dirname(os.path.abspath(__file__))
# The environment's own module of this name, which this one hides, has its turn.
_own = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != _here])
if _own is not None:
    _own.loader.exec_module(util.module_from_spec(_own))

from domainbed_kd import plugin  # noqa: E402

plugin.install_on_import()
