"""`python -m domainbed_kd.plugin`: runs a fork's command with our methods, or the doctor."""

import importlib
import os
import shutil
import sys
import tempfile
from importlib.machinery import PathFinder
from pathlib import Path

from domainbed_kd.console import run_main

PACKAGE = Path(__file__).parent
USAGE = ("usage: python -m domainbed_kd.plugin -- COMMAND ...   run a fork's command with our "
         "methods\n       python -m domainbed_kd.plugin doctor           say what was found in "
         "this folder, and what to do next\n       python -m domainbed_kd.plugin doctor --try    "
         " also train each method for two steps in a copy (minutes)")


def run(command: list[str]) -> None:
    """Replaces this process by the command, under which every Python adds our methods to its fork.

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
    """Prints which fork is here, which methods it gets, which teachers there are; 1 without one."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    spec = PathFinder.find_spec("domainbed", sys.path)
    if spec is None:
        print(f"No fork: there is no package domainbed in {os.getcwd()} nor among the installed.\n"
              "Next: run this in the folder that holds your fork's domainbed/.")
        return 1
    from domainbed_kd.plugin import dialects, guests, obstacles

    package = Path(next(iter(spec.submodule_search_locations)))
    print(f"Fork:     {package}")
    for line in obstacles.found(package):
        print(f"Obstacle: {line}")
    try:
        module = importlib.import_module("domainbed.algorithms")
    except Exception as error:  # a fork's modules run any code
        print(f"Next:     {obstacles.describe(error)}")
        return 1
    try:
        dialect = dialects.dialect_of(module)
        found = guests.teach(module)
    except ValueError as error:
        print(f"Next:     {error}")
        return 1
    form = "update(x, y, **kwargs)" if dialect.takes_xy else "update(minibatches, ...)"
    print(f"Dialect:  {dialect.name}: {form}; predict returns "
          f"{'a dict' if dialect.predicts_dict else 'logits'}")
    for name, fate in found.items():
        print(f"Method:   {name}: {fate}")
    print("Method:   SDViT: left out, as it needs a transformer and the backbone is the fork's own")
    print("Averages: 'sma' on any of them: --hparams '{\"averaging\": \"sma\"}'\nAverages: " + (
        "not 'swad', which this fork has of its own" if dialect.takes_xy else
        "'swad' likewise, in loops that split by domainbed.lib.misc.split_dataset; select the "
        "last record"))
    print("Teacher:  trained by the method itself in its first updates (KD, KDDG, MosaicKD, 4Ds)"
          "\nTeacher:  a finished run: --hparams '{\"teacher\": \"FOLDER\"}'"
          "\nTeacher:  tiny CLIP for digits: ships with this package")
    print(f"Teacher:  {_hub()}")
    script = ("python train_all.py NAME --algorithm KDDG" if dialect.takes_xy else
              "python -m domainbed.scripts.train --algorithm KDDG --dataset PACS --data_dir DATA")
    print(f"Next:     python -m domainbed_kd.plugin -- {script}")
    return 0


def try_out() -> int:
    """Trains each method in a copy of the fork, prints which of them work; 1 if one does not."""
    from domainbed_kd.plugin import trials

    with tempfile.TemporaryDirectory() as folder:
        trial = trials.Trial(Path.cwd(), Path(folder) / "trial")
        trial.doctor()
        dataset = "PACS" if trial.takes_xy else "Debug28"
        trial.train(dataset, ["ERM", *trials.METHODS])
        trial.reload(dataset)
        trial.compare_erm(dataset)
        trial.unchanged()
    for (kind, name), problem in trial.results.items():
        print(f"Tried:    {kind}: {name}: {problem or 'works'}")
    return int(any(trial.results.values()))


def _hub() -> str:
    """Whether CLIP's weights are on this machine; nothing is downloaded."""
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
    if argv == ["doctor", "--try"]:
        return doctor() or try_out()
    if argv in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    raise ValueError(f"found {' '.join(argv) or 'no command'}. Expected `-- COMMAND ...` or "
                     "`doctor [--try]` (see --help).")


if __name__ == "__main__":
    run_main(main)
