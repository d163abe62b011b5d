"""Every Python process under `python -m domainbed_kd.plugin -- COMMAND` runs this at its start."""

import os
import sys
from importlib import util
from importlib.machinery import PathFinder

_here = os.path.dirname(os.path.abspath(__file__))
# This module hides the environment's own one of the same name, which is run first.
_own = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != _here])
if _own is not None:
    _own.loader.exec_module(util.module_from_spec(_own))

from domainbed_kd import plugin  # noqa: E402

plugin.install_on_import()
