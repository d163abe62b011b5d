"""Who may import whom a module's imports stay within its row."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import domainbed_kd

PACKAGE = Path(domainbed_kd.__file__).parent
ALLOWED = {
    "seeds": set(), "losses": set(), "networks": set(), "digits": set(), "user_input": set(),
    "datasets": {"digits", "user_input"},
    "command_launchers": {"clusters", "user_input", "workers"}, "workers": {"progress", "cores"},
    "progress": {"datasets"},
    "curves": set(), "record_cache": {"curves"}, "records": {"curves", "record_cache"},
    "run_folders": {"curves"},
    "checkpoints": set(), "cores": set(), "fast": set(),
    "averaging": {"networks"},
    "teachers": {"networks", "averaging", "checkpoints", "algorithms", "datasets"},
    "loaders": {"cores", "seeds", "datasets"}, "image_cache": {"checkpoints", "datasets"},
    "algorithms": {"algorithms", "networks", "teachers", "averaging", "losses", "datasets",
                   "user_input"},
    "hparams_registry": {"algorithms", "seeds", "user_input"},
    "extensions": {"algorithms", "datasets", "command_launchers", "forks"},
    "forks": {"algorithms", "checkpoints", "datasets", "hparams_registry", "networks"},
    "hook": {"plugin"},
    "claims": set(), "clusters": {"claims", "workers"}, "costs": set(),
    "jobs": {"algorithms", "claims", "seeds", "datasets", "run_folders"},
    "model_selection": {"curves", "records"},
    "tables": {"model_selection", "datasets", "algorithms"},
    "protocols": {"datasets", "records", "tables"}, "published": {"protocols", "tables"},
    "diagnostics": {"algorithms", "checkpoints"},
    "results": {"checkpoints", "curves"},
    "loggers": {"results"},
    "significance": set(), "summaries": set(),
    "plots": {"significance", "summaries", "tables"},
    "canonical_view": {"checkpoints", "datasets", "networks", "progress"},
    "augmentation": {"datasets", "image_cache"},
    "training": {"algorithms", "augmentation", "averaging", "canonical_view", "checkpoints",
                 "claims", "datasets", "diagnostics", "fast", "hparams_registry", "image_cache",
                 "loaders", "loggers", "progress", "results", "seeds", "teachers"},
    "warm": {"command_launchers", "costs", "extensions", "jobs", "training"},
}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "scripts" not in p.parts
                 and p.stem not in ("__main__", "plugin") and p != PACKAGE / "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of_ours(path):
    """Names of our top-level modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("domainbed_kd."):
                yield name.split(".")[1]
            assert name.split(".")[0] != "domainbed", f"{path} imports a fork"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_design(path):
    assert set(imports_of_ours(path)) - {"__version__"} <= ALLOWED[room(path)]


HEAVY = ("torch", "torchvision", "timm", "open_clip", "pandas", "wilds", "ray", "submitit",
         "matplotlib", "scipy", "statsmodels", "jinja2")
LIGHT = ["domainbed_kd", "domainbed_kd.algorithms", "domainbed_kd.datasets", "domainbed_kd.jobs",
         "domainbed_kd.curves", "domainbed_kd.records", "domainbed_kd.results",
         "domainbed_kd.model_selection",
         "domainbed_kd.tables", "domainbed_kd.published", "domainbed_kd.significance",
         "domainbed_kd.summaries",
         "domainbed_kd.command_launchers", "domainbed_kd.extensions", "domainbed_kd.__main__",
         *(f"domainbed_kd.scripts.{p.stem}" for p in (PACKAGE / "scripts").glob("[!_]*.py"))]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_needs_no_heavy_library(module):
    code = f"import sys, {module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.split() == []
