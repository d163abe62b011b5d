"""Asks a DomainBed checkout whether it still derives what we derive, to the bit.

Compares seeds, hparam draws, job folders and the text tables of the sweep in tests/data. Exit
status 0 if all are equal, 1 if some differ, 2 if the checkout cannot be asked.
"""

import argparse
import contextlib
import importlib
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from domainbed_kd import hparams_registry, seeds
from domainbed_kd.algorithms import ALGORITHMS
from domainbed_kd.console import Parser, run_main
from domainbed_kd.datasets import DOMAINBED
from domainbed_kd.scripts import collect_results
from domainbed_kd.sweep import jobs

SWEEP = Path(__file__).parents[1] / "tests" / "data" / "goldens" / "sweep_data"


def import_checkout(folder: Path) -> dict:
    """The modules of the checkout that are asked.

    Raises:
        ValueError: if they cannot be imported.
    """
    sys.path.insert(0, str(folder))
    names = ("lib.misc", "hparams_registry", "algorithms", "scripts.sweep")
    try:
        return {name: importlib.import_module(f"domainbed.{name}") for name in names}
    except ImportError as error:
        raise ValueError(f"{folder} holds no DomainBed that can be imported here ({error}). "
                         "Install what it needs into this environment.") from error


def differences(theirs: dict) -> Iterator[tuple[str, int, list[str]]]:
    """(what was compared, how often, where it differs)."""
    arguments = [(i, name) for i in range(50) for name in ("lr", "batch_size", "ERM")]
    seed_hash = theirs["lib.misc"].seed_hash
    yield "seed_hash", len(arguments), [
        str(a) for a in arguments if seed_hash(*a) != seeds.seed_hash(*a)]

    registry, known = theirs["hparams_registry"], theirs["algorithms"].ALGORITHMS
    algorithms = [name for name in ALGORITHMS if name in known]
    cases = [(a, d, seed) for a in algorithms for d in DOMAINBED for seed in (None, 0, 1)]

    def hparams(module, algorithm, dataset, seed):
        if seed is None:
            return module.default_hparams(algorithm, dataset)
        return module.random_hparams(algorithm, dataset, seed)

    yield "hparams", len(cases), [
        str(case) for case in cases if hparams(registry, *case) != hparams(hparams_registry, *case)]

    sweep = theirs["scripts.sweep"]
    wanted = dict(
        n_trials=2, dataset_names=["RotatedMNIST", "VLCS"], algorithms=["ERM", "CORAL"],
        n_hparams_from=0, n_hparams=3, steps=None, data_dir="/data",
        task="domain_generalization", holdout_fraction=0.2, single_test_envs=False, hparams=None)
    pairs = list(zip(sweep.make_args_list(**wanted), jobs.make_args_list(**wanted), strict=True))
    yield "job folders", len(pairs), [
        str(our) for their, our in pairs
        if sweep.Job(their, "out").output_dir != jobs.Job(our, "out").output_dir]


def our_table() -> str:
    """What our collect_results prints, as DomainBed would, on the sweep in tests/data."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as text:
        copy = shutil.copytree(SWEEP, Path(folder) / "sweep")  # results.txt is written there
        collect_results.main(["--input_dir", str(copy), "--upstream"])
    return text.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Prints a line per comparison."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder that holds domainbed/")
    args: argparse.Namespace = parser.parse_args(argv)
    failed = False
    for what, n, differing in differences(import_checkout(args.checkout)):
        failed |= bool(differing)
        first = f", the first: {differing[0]}" if differing else ""
        print(f"{what}: {n - len(differing)} of {n} equal{first}")
    golden = (SWEEP.parent / "collect_results_text.txt").read_text(encoding="utf-8")
    equal = our_table() == golden
    print(f"table of its own sweep: {'equal' if equal else 'differs'}")
    return 1 if failed or not equal else 0


if __name__ == "__main__":
    run_main(main)
