"""The algorithms: every public Algorithm class in this folder, plus what plug-ins add.

Names are read from the files' syntax, so that `ALGORITHMS` needs no torch; a class is imported
when it is first asked for.
"""

import ast
import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_kd.console import did_you_mean

if TYPE_CHECKING:
    from domainbed_kd.algorithms.base import Algorithm

# DomainBed's algorithms in its order, that of the rows of its tables.
DOMAINBED = (
    "ERM", "ERMPlusPlus", "Fish", "IRM", "GroupDRO", "Mixup", "MLDG", "CORAL", "MMD", "DANN",
    "CDANN", "MTL", "SagNet", "ARM", "VREx", "RSC", "SD", "ANDMask", "SANDMask", "IGA", "SelfReg",
    "Fishr", "TRM", "IB_ERM", "IB_IRM", "CAD", "CondCAD", "Transfer", "CausIRL_CORAL",
    "CausIRL_MMD", "EQRM", "RDM", "ADRMX", "URM")
# Files not named here follow in alphabetical order.
_ORDER = (*DOMAINBED, "SMA", "SWAD")
# Files whose classes other methods build on; they are not methods themselves.
_ABSTRACT = ("base", "annealed", "composed", "scheduled", "taught")


def _keys(tree: ast.AST) -> set[str]:
    """The keys of all dicts in a syntax tree."""
    return {key.value for node in ast.walk(tree) if isinstance(node, ast.Dict)
            for key in node.keys
            if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _discover() -> tuple[dict[str, str], set[str], set[str], set[str], dict[str, str]]:
    """{method: module}; classes that are Taught, read a CLIP, predict by one; {class: shown}."""
    bases: dict[str, set[str]] = {}
    files: dict[str, str] = {}
    readers: set[str] = set()
    clips: set[str] = set()
    shown: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
                files[node.name] = path.stem
                if "clip_backbone" in _keys(node):
                    readers.add(node.name)
                declared = {ast.unparse(line.targets[0]): line.value for line in node.body
                            if isinstance(line, ast.Assign)}
                if "display_name" in declared:
                    shown[node.name] = ast.literal_eval(declared["display_name"])
                if "network_is_clips" in declared:
                    clips.add(node.name)

    def descendants(*roots: str) -> set[str]:
        found = set(roots)
        while grown := {name for name, parents in bases.items() if parents & found} - found:
            found |= grown
        return found

    known = descendants("Algorithm")
    order = {name: i for i, name in enumerate(_ORDER)}
    methods = sorted(
        (name for name in known if not name.startswith("_") and files[name] not in _ABSTRACT),
        key=lambda name: (order.get(name, len(order)), name))
    modules = {name: f"{__name__}.{files[name]}" for name in methods}
    return modules, descendants("Taught"), descendants(*readers), clips, shown


_MODULES, _TAUGHT, _CLIP_READERS, _CLIPS, _DISPLAY_NAMES = _discover()
# Names that users may type and a class cannot have: "4Ds" is FourDs.
_ALIASES = {shown: name for name, shown in _DISPLAY_NAMES.items()}
_REGISTERED: "dict[str, type[Algorithm]]" = {}
SHIPPED = tuple(_MODULES)
ALGORITHMS = list(SHIPPED)


def register(cls: "type[Algorithm]") -> "type[Algorithm]":
    """Adds an Algorithm class defined elsewhere; usable as a decorator."""
    if cls.__name__ not in ALGORITHMS:
        ALGORITHMS.append(cls.__name__)
    _REGISTERED[cls.__name__] = cls
    return cls


def canonical_name(name: str) -> str:
    """The class's name for any form in which users type it: "4Ds" is FourDs."""
    return _ALIASES.get(name, name)


def display_name(name: str) -> str:
    """The name that tables show: the class's `display_name` or, without one, its own.

    Keeps what `curves.row` adds to a class's name. Needs no torch.
    """
    base = base_of(name)
    if base in _REGISTERED:
        shown = _REGISTERED[base].display_name or base
    else:
        shown = _DISPLAY_NAMES.get(base, base)
    return shown + name[len(base):]


def base_of(row: str) -> str:
    """The algorithm's name of a table's row, without what `curves.row` adds to it."""
    return re.split("[ (]", row, maxsplit=1)[0]


def learns_from_run(name: str) -> bool:
    """Whether an algorithm takes a finished ERM run as its teacher."""
    if name in _REGISTERED:
        return _REGISTERED[name].learns_from_run
    return name in _TAUGHT


def ignores_clip(name: str) -> bool:
    """Whether an algorithm that ships does not read the hparam `clip_backbone`."""
    return name in _MODULES and name not in _CLIP_READERS


def network_is_clips(name: str) -> bool:
    """Whether an algorithm that ships predicts by the image network of its `clip_backbone`."""
    return name in _CLIPS


def check_name(name: str) -> None:
    """Refuses unknown names of algorithms; needs no torch.

    Raises:
        NotImplementedError: naming the nearest known.
    """
    if canonical_name(name) not in ALGORITHMS:
        raise NotImplementedError(
            f"Algorithm not found: {name}.{did_you_mean(name, [*ALGORITHMS, *_ALIASES])} Known: "
            f"{', '.join(ALGORITHMS)}.")


def check_auto_lr(names: Iterable[str]) -> None:
    """Refuses names of algorithms whose learning rate --auto_lr cannot choose.

    Raises:
        ValueError: naming one, and an algorithm that takes it.
    """
    for name in names:
        if not get_algorithm_class(name).takes_auto_lr:
            raise ValueError(f"--auto_lr: {name} does not take it. Leave the flag out, or choose "
                             "ERMPlusPlus.")


def hparam_names() -> set[str]:
    """Every hparam of the shipped algorithms, and some other words; needs no torch.

    They are the keys of all dicts in the files that declare hparams.
    """
    here = Path(__file__).parent
    trees = (ast.parse(path.read_text(encoding="utf-8"))
             for path in (*here.glob("*.py"), here.parent / "hparams_registry.py"))
    return {key for tree in trees for key in _keys(tree)}


def get_algorithm_class(name: str) -> "type[Algorithm]":
    """The class of that name.

    Raises:
        NotImplementedError: if there is none, naming the nearest known.
    """
    check_name(name)
    name = canonical_name(name)
    if name in _REGISTERED:
        return _REGISTERED[name]
    found: type[Algorithm] = getattr(importlib.import_module(_MODULES[name]), name)
    return found


def __getattr__(name: str) -> "type[Algorithm]":
    if name in _MODULES or name in _REGISTERED:
        return get_algorithm_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
