"""Who may import whom: the six rules of the house, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import domainbed_kd

PACKAGE = Path(domainbed_kd.__file__).parent
# Each floor imports from itself and from those below it, but the rooms of MIDDLE never from each
# other: what passes between them is the folder of a run.
GROUND = {"seeds", "console", "machine", "networks", "backbones", "segmenters", "losses",
          "averaging", "loss_valley", "checkpoints", "datasets", "folder", "tasks"}
METHODS = {"teachers", "clip_teacher", "algorithms", "hparams_registry"}
MIDDLE = ("run", "sweep", "results")
BRIDGES = {"plugin", "extensions"}
# DomainBed's names, which point into a room.
POINTERS = {"model_selection": {"results"}, "command_launchers": {"sweep"}}
ALLOWED = {
    **dict.fromkeys(GROUND, GROUND),
    **dict.fromkeys(METHODS, GROUND | METHODS),
    **{room: GROUND | METHODS | {room} for room in MIDDLE},
    **dict.fromkeys(BRIDGES, GROUND | METHODS | BRIDGES | {"command_launchers"}),
    **{name: GROUND | rooms for name, rooms in POINTERS.items()},
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "scripts" not in p.parts
                 and p not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_design(path):
    names = [name.split(".") for name in imports_of(path)]
    assert not any(parts[0] == "domainbed" for parts in names), f"{path} imports a fork"
    ours = {parts[1] for parts in names if parts[0] == "domainbed_kd"} - {"__version__"}
    assert ours <= ALLOWED[room(path)]


HEAVY = ("torch", "torchvision", "timm", "open_clip", "pandas", "wilds", "ray", "submitit",
         "matplotlib", "scipy", "statsmodels", "jinja2")
LIGHT = ["domainbed_kd", "domainbed_kd.algorithms", "domainbed_kd.datasets",
         "domainbed_kd.model_selection", "domainbed_kd.command_launchers",
         "domainbed_kd.extensions", "domainbed_kd.__main__", "domainbed_kd.plugin",
         "domainbed_kd.sweep.jobs", "domainbed_kd.results.records", "domainbed_kd.results.tables",
         "domainbed_kd.results.logits", "domainbed_kd.results.published",
         "domainbed_kd.results.significance", "domainbed_kd.results.summaries",
         *(f"domainbed_kd.folder.{p.stem}" for p in (PACKAGE / "folder").glob("[!_]*.py")),
         *(f"domainbed_kd.scripts.{p.stem}" for p in (PACKAGE / "scripts").glob("[!_]*.py"))]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_needs_no_heavy_library(module):
    code = f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.split() == []


def test_no_module_is_too_long_to_read_at_once():
    long = [str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py")
            if len(p.read_text().splitlines()) > (150 if p.parent.name == "scripts" else 350)]
    assert long == []


def test_the_tests_are_sorted_into_the_packages_rooms():
    rooms = {p.parent.name for p in PACKAGE.glob("*/__init__.py")} | {"tools"}
    folders = {p.parent.name for p in Path(__file__).parent.glob("*/test_*.py")}
    assert folders == rooms
    names = [p.name for p in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))  # pytest imports them by these
