"""What keeps a fork from running with the installed libraries, and what to do about it.

The plug-in only names such obstacles; it patches nothing.
"""

import ast
import importlib.util
import re
from pathlib import Path

# {module that forks import: the package to install}, where the names differ.
PACKAGES = {
    "backpack": "backpack-for-pytorch", "clip": "git+https://github.com/openai/CLIP.git",
    "cv2": "opencv-python-headless", "focal_loss": "focal-loss-torch",
    "pkg_resources": "'setuptools<80'", "sklearn": "scikit-learn", "yaml": "pyyaml"}
NUMPY_NAMES = ("int", "float", "bool", "object")


def describe(error: Exception) -> str:
    """One line on why a fork's modules do not import, and what to do if that is known."""
    reason = " ".join(str(error).split())
    text = f"its domainbed.algorithms does not import: {type(error).__name__}: {reason}."
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name.split(".")[0] == "domainbed":
            return f"{reason}. Expected a folder that holds the package domainbed."
        name = error.name.split(".")[0]
        return f"{text} Try `pip install {PACKAGES.get(name, name)}`."
    return (f"{text} It fails without this package too: try `python -c \"import "
            "domainbed.algorithms\"` in the fork's folder.")


def found(package: Path) -> list[str]:
    """Lines on what a fork's sources use that the installed libraries lack.

    Args:
        package: the fork's folder `domainbed`.
    """
    sources, names = _sources(package)
    lines = []
    if missing := sorted(name for name in names if _is_missing(name, package.parent)):
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        lines.append(f"imports {', '.join(missing)}, not installed: pip install {packages}")

    import numpy as np
    import torch

    gone = [name for name in NUMPY_NAMES if name not in vars(np)]
    if gone and (where := _first(sources, rf"\bnp\.({'|'.join(gone)})\b")):
        lines.append(f"{where}: NumPy {np.__version__} has no such name: use the builtin, or "
                     "pip install 'numpy<1.24'")
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6) and (
            where := _first(sources, r"torch\.load\((?!.*weights_only)")):
        lines.append(f"{where}: torch {torch.__version__.split('+')[0]} refuses pickled objects: "
                     "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 allows files that you trust")
    return lines


def _sources(package: Path) -> tuple[dict[Path, str], set[str]]:
    """{file: text} of the fork's modules that train and sweep import, and names from elsewhere.

    Imports inside functions and `try` are left out, as they may not be needed.
    """
    todo = [package / name for name in (
        "algorithms", "datasets", "hparams_registry", "scripts/train", "scripts/sweep", "trainer")]
    sources, foreign = {}, set()
    while todo:
        path = todo.pop()
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in sources or not path.is_file():
            continue
        sources[path] = path.read_text(encoding="utf-8", errors="replace")
        for name in _imports(sources[path], path, package):
            if name[0] == package.name:
                todo += [package.joinpath(*name[1:n]) for n in range(2, len(name) + 1)]
            else:
                foreign.add(name[0])
    return sources, foreign


def _imports(text: str, path: Path, package: Path) -> list[list[str]]:
    """The parts of each absolute name that a file imports at its top level."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return []
    names = []
    for node in body:
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = [] if not node.level else list(
                path.parents[node.level - 1].relative_to(package.parent).parts)
            start += node.module.split(".") if node.module else []
            names += [[*start, alias.name] for alias in node.names]
    return names


def _is_missing(name: str, folder: Path) -> bool:
    if (folder / name).is_dir() or (folder / f"{name}.py").is_file():
        return False
    try:
        return importlib.util.find_spec(name) is None
    except (ImportError, ValueError):
        return True


def _first(sources: dict[Path, str], pattern: str) -> str | None:
    """FILE:LINE and the text of the first match."""
    for path, text in sorted(sources.items()):
        for number, line in enumerate(text.splitlines(), start=1):
            if match := re.search(pattern, line.split("#")[0]):
                return f"{path.name}:{number}: {match.group().rstrip('(')}"
    return None
