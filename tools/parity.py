"""Compares a DomainBed checkout with this package.

Seeds, hparam draws, job folders and the text tables of the sweep in tests/data must be identical.
Every algorithm then trains here and there for a few updates on the CPU, with shapes, hparams and
seeds drawn from a seed that is printed. Their values, logits and weights must agree to 1e-4. As
some methods amplify the last bit, a case that does not is repeated in float64, and must agree to
1e-8 there. DomainBed's Fishr needs backpack-for-pytorch 1.3.0: later versions have no grad_batch.

The exit status is 0 if all agree, 1 if some differ, 2 if the checkout cannot be imported.
"""

import argparse
import contextlib
import importlib
import io
import math
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import short_runs
import torch

from domainbed_kd import hparams_registry, seeds
from domainbed_kd.algorithms import ALGORITHMS, get_algorithm_class
from domainbed_kd.console import Parser, run_main
from domainbed_kd.datasets import DOMAINBED
from domainbed_kd.scripts import collect_results
from domainbed_kd.sweep import jobs, listing

TOLERANCE, TOLERANCE_IN_FLOAT64 = 1e-4, 1e-8  # relative
SWEEP = Path(__file__).parents[1] / "tests" / "data" / "goldens" / "sweep_data"


def import_checkout(folder: Path) -> dict:
    """The checkout's modules that are compared.

    Raises:
        ValueError: if they cannot be imported.
    """
    sys.path.insert(0, str(folder))
    # BackPACK 1.3.0 imports it for convolutions; Fishr uses BackPACK for linear layers only.
    vars(torch.nn.grad).setdefault("_grad_input_padding", None)
    names = ("lib.misc", "hparams_registry", "algorithms", "scripts.sweep")
    try:
        return {name: importlib.import_module(f"domainbed.{name}") for name in names}
    except ImportError as error:
        raise ValueError(f"{folder} holds no DomainBed that can be imported here ({error}). "
                         "Install what it needs into this environment.") from error


def differences(theirs: dict) -> Iterator[tuple[str, int, list[str]]]:
    """Yields (what was compared, number of cases, cases that differ)."""
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
    pairs = list(zip(sweep.make_args_list(**wanted), listing.make_args_list(**wanted), strict=True))
    yield "job folders", len(pairs), [
        str(our) for their, our in pairs
        if sweep.Job(their, "out").output_dir != jobs.Job(our, "out").output_dir]


def draw_case(algorithm: str, theirs, r: random.Random) -> dict:
    """A short run for `short_runs.run` that DomainBed can train, with its own hparams."""
    shapes = [(1, 28, 28), (2, 28, 28), (3, 28, 28), (3, 32, 32)]
    if algorithm != "ARM":  # its context network takes images
        shapes += 4 * [(r.randint(5, 40),)]
    shape, updates = r.choice(shapes), r.randint(4, 8)
    is_image = len(shape) == 3
    seed = r.choice([None, r.randrange(2**31)])
    hparams = (theirs.default_hparams(algorithm, "Debug28") if seed is None
               else theirs.random_hparams(algorithm, "Debug28", seed))
    # With a usual lr, the last bit of a CNN's gradients would change the fourth digit.
    hparams |= {name: 1e-4 for name in ("lr", "lr_g", "lr_d") if is_image and name in hparams}
    hparams |= {name: r.randint(0, updates) for name in hparams if name.endswith("iters")}
    per_domain = r.randint(4, 8) if is_image else r.choice([4, 7, 16, 32, 40])
    hparams |= {
        "batch_size": per_domain, "linear_steps": r.randint(0, updates),
        "mlp_width": 40, "mlp_depth": 3, "mlp_dropout": r.choice([0.0, 0.5]),
        "nonlinear_classifier": r.random() < 0.3,
        "weight_decay": r.choice([0.0, 10 ** r.uniform(-6, -2)])}
    return {"input_shape": shape, "num_classes": r.randint(2, 7), "num_domains": r.randint(2, 4),
            "per_domain": per_domain, "updates": updates, "evaluate_after": r.randint(1, updates),
            "seed": r.randrange(2**31), "data_seed": r.randrange(2**31), "hparams": hparams}


class CheckoutFails(Exception):
    """The checkout's own algorithm cannot make a case's updates."""


def compare_algorithm(ours: Callable, theirs: Callable, case: dict,
                      dtype: torch.dtype = torch.float32) -> float:
    """The largest difference in a case.

    Raises:
        CheckoutFails: with the reason.
    """
    torch.set_default_dtype(dtype)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = short_runs.run(theirs, case)
            except Exception as error:  # whatever a checkout's own code raises
                raise CheckoutFails(f"{type(error).__name__}: {error}") from error
            return max(short_runs.differences(short_runs.run(ours, case), expected).values())
    finally:
        torch.set_default_dtype(torch.float32)


def compare_algorithms(theirs: dict, seed: int, n: int) -> Iterator[
        tuple[str, int, float, float, list]]:
    """Yields (algorithm, cases, largest difference, that in float64, cases that differ).

    The difference in float64 is over the cases that had to be repeated, 0 if there are none.
    """
    torch.set_num_threads(1)  # the order of sums depends on it
    if not torch.cuda.is_available():  # TRM and RDM call .cuda()
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    for algorithm in (name for name in ALGORITHMS if name in theirs["algorithms"].ALGORITHMS):
        r = random.Random(f"{seed} {algorithm}")
        cases = [draw_case(algorithm, theirs["hparams_registry"], r) for _ in range(n)]
        pair = (get_algorithm_class(algorithm),
                theirs["algorithms"].get_algorithm_class(algorithm))
        try:
            apart = [compare_algorithm(*pair, case) for case in cases]
            doubled = [compare_algorithm(*pair, case, torch.float64)
                       if TOLERANCE < found < math.inf else 0.0
                       for case, found in zip(cases, apart)]
        except CheckoutFails as error:
            yield algorithm, n, math.nan, 0.0, [f"the checkout's own fails ({error})"]
            continue
        yield algorithm, n, max(apart), max(doubled), [
            case for case, found, precise in zip(cases, apart, doubled)
            if found == math.inf or precise > TOLERANCE_IN_FLOAT64]


def our_table() -> str:
    """The output of our collect_results --upstream on the sweep in tests/data."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as text:
        copy = shutil.copytree(SWEEP, Path(folder) / "sweep")  # results.txt is written there
        collect_results.main(["--input_dir", str(copy), "--upstream"])
    return text.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Prints a line per comparison."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder that holds domainbed/")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6),
                        help="draws the algorithms' cases; at random by default")
    parser.add_argument("--cases", type=int, default=5, help="per algorithm (5)")
    args: argparse.Namespace = parser.parse_args(argv)
    theirs, failed = import_checkout(args.checkout), False
    for what, n, differing in differences(theirs):
        failed |= bool(differing)
        first = f", the first: {differing[0]}" if differing else ""
        print(f"{what}: {n - len(differing)} of {n} equal{first}")
    golden = (SWEEP.parent / "collect_results_text.txt").read_text(encoding="utf-8")
    equal = our_table() == golden
    print(f"table of its own sweep: {'equal' if equal else 'differs'}")
    print(f"algorithms, --seed {args.seed}:")
    for algorithm, n, apart, doubled, differing in compare_algorithms(
            theirs, args.seed, args.cases):
        failed |= bool(differing)
        first = f", the first: {differing[0]}" if differing else ""
        precise = f", in float64 {doubled:.1e}" if doubled else ""
        print(f"{algorithm}: not compared, {differing[0]}" if math.isnan(apart) else
              f"{algorithm}: {n - len(differing)} of {n} agree, "
              f"largest difference {apart:.1e}{precise}{first}", flush=True)
    return 1 if failed or not equal else 0


if __name__ == "__main__":
    run_main(main)
