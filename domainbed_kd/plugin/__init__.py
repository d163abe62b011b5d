"""Our methods inside the DomainBed fork that a lab already has.

    python -m domainbed_kd.plugin -- python -m domainbed.scripts.train --algorithm RISE ...
    python -m domainbed_kd.plugin doctor

The first runs any command; every Python that it starts, by whatever launcher, teaches the fork's
`domainbed.algorithms` our methods as soon as that module is imported. No file is edited. Without
this command, one line at the end of the fork's algorithms module does the same:
`import domainbed_kd.plugin; domainbed_kd.plugin.install()`.
"""

import importlib
import os
import shutil
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent
USAGE = ("usage: python -m domainbed_kd.plugin -- COMMAND ...   run a fork's command with our "
         "methods\n       python -m domainbed_kd.plugin doctor           say what was found in "
         "this folder, and what to do next")


def install() -> None:
    """Teaches the fork at hand our methods, now or once its modules are imported.

    Raises:
        ValueError: if its dialect is unknown; the message names what was expected.
    """
    install_on_import()
    for name, teach in _LESSONS.items():
        if name in sys.modules and not hasattr(sys.modules[name], "__taught__"):
            teach(sys.modules[name])


def install_on_import() -> None:
    """Teaches each of the fork's modules once it is imported; imports nothing by itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _teach_algorithms(module: ModuleType) -> None:
    from domainbed_kd.plugin import forks

    module.__taught__ = forks.teach(module)
    kept = [name for name, fate in module.__taught__.items() if fate != "added"]
    if kept:
        print(f"domainbed_kd: this fork has {', '.join(kept)} of its own; it is kept.",
              file=sys.stderr)


def _teach_hparams(module: ModuleType) -> None:
    from domainbed_kd.plugin import forks

    module.__taught__ = True
    forks.teach_hparams(module)


def _teach_datasets(module: ModuleType) -> None:
    from domainbed_kd.plugin import forks

    module.__taught__ = True
    forks.watch_datasets(module)


_LESSONS = {"domainbed.algorithms": _teach_algorithms,
            "domainbed.hparams_registry": _teach_hparams,
            "domainbed.datasets": _teach_datasets}


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
            if hasattr(module, "__taught__"):  # the module called install() itself
                return
            try:
                _LESSONS[fullname](module)
            except ValueError as error:
                print(f"error: domainbed_kd: {error}", file=sys.stderr)
                sys.exit(2)

        spec.loader.exec_module = run_and_teach
        return spec


def run(command: list[str]) -> None:
    """Becomes the command, in an environment in which every Python teaches its fork.

    Raises:
        FileNotFoundError: if there is no such program.
    """
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]}: there is no such program. After `--` comes a "
                                "command, such as python -m domainbed.scripts.train --help.")
    paths = [str(PACKAGE / "hook"), os.environ.get("PYTHONPATH", ""), str(PACKAGE.parents[1])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.stdout.flush()
    os.execvp(command[0], command)


def doctor() -> int:
    """Prints which fork is here, what it was taught, which teachers it has; 1 if there is none."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    spec = PathFinder.find_spec("domainbed", sys.path)
    if spec is None:
        print(f"No fork: there is no package domainbed in {os.getcwd()} nor among the installed.\n"
              "Next: run this in the folder that holds your fork's domainbed/.")
        return 1
    from domainbed_kd.plugin import forks

    print(f"Fork:     {next(iter(spec.submodule_search_locations))}")
    try:
        module = importlib.import_module("domainbed.algorithms")
    except ImportError as error:
        print(f"Its domainbed.algorithms does not import: {error}\nNext:     install or mend that, "
              "and see that `python -c \"import domainbed.algorithms\"` works.")
        return 1
    dialect = forks.dialect_of(module)
    form = "update(x, y, **kwargs)" if dialect.takes_xy else "update(minibatches, ...)"
    print(f"Dialect:  {dialect.name}: {form}; predict returns "
          f"{'a dict' if dialect.predicts_dict else 'logits'}")
    found = getattr(module, "__taught__", None) or forks.teach(module)
    for name, fate in found.items():
        print(f"Method:   {name}: {fate}")
    print("Teacher:  trained by the method itself in its first updates (KD, KDDG, MosaicKD, 4Ds)"
          "\nTeacher:  a finished run: --hparams '{\"teacher\": \"FOLDER\"}'"
          "\nTeacher:  tiny CLIP for digits: ships with this package")
    print(f"Teacher:  {_hub()}")
    script = ("python train_all.py NAME --algorithm KDDG" if dialect.takes_xy else
              "python -m domainbed.scripts.train --algorithm KDDG --dataset PACS --data_dir DATA")
    print(f"Next:     python -m domainbed_kd.plugin -- {script}")
    return 0


def _hub() -> str:
    """Whether the weights of CLIP are at hand, asking nobody but this machine."""
    from huggingface_hub import constants

    cached = sorted(path.name.replace("--", "/") for path in
                    Path(constants.HF_HUB_CACHE).glob("models--*clip*"))
    if cached:
        return f"CLIP, downloaded before: {', '.join(cached)}"
    return ("CLIP by open_clip: nothing downloaded yet; the first run fetches it, or name a file: "
            "--hparams '{\"clip_backbone\": \"ViT-B-16/FILE.pt\"}'")


def main(argv: list[str] | None = None) -> int:
    """Runs a command with our methods, or the doctor."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--"] and argv[1:]:
        run(argv[1:])
    if argv == ["doctor"]:
        return doctor()
    if argv in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    raise ValueError(f"found {' '.join(argv) or 'no command'}. Expected `-- COMMAND ...` or "
                     "`doctor` (see --help).")
