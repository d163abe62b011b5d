"""What a method costs: time and memory of its updates, as ratios measured in one run.

Each method takes turns with ERM on the same student, images and threads; medians are compared.
The floor of a method with a teacher is ERM's update plus one forward pass of the teacher.
Memory is what a process holds at most, above what it holds before the first update.
"""

import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import torch

from domainbed_kd import algorithms, datasets, hparams_registry
from domainbed_kd.scripts import Parser, run_main

METHODS = ("ERM", "CORAL", "SWAD", "KD", "KDDG", "SCMD", "RISE", "MosaicKD", "FourDs")


def build(name: str, batch_size: int):
    """(algorithm, minibatches) on DigitsDG with the last domain held out."""
    dataset = datasets.get_dataset_class("DigitsDG")(None, [3], {})
    hparams = hparams_registry.default_hparams(name, "DigitsDG") | {
        "wrn_depth": 10, "wrn_widen": 1, "total_steps": 1000,
        "class_names": dataset.class_names, "domain_names": dataset.domain_names[:3],
        "dataset": "DigitsDG", "test_envs": [3], "normalization": None,
        "scmd_worst_case": 1.0}  # 1: all rows, as the others' updates
    if algorithms.learns_from_run(name):
        hparams["teacher"], _ = build("ERM", batch_size)
    torch.manual_seed(0)
    cls = algorithms.get_algorithm_class(name)
    minibatches = [tuple(part[:batch_size] for part in env.tensors) for env in dataset.datasets[:3]]
    return cls(dataset.input_shape, 10, 3, hparams), minibatches


def timed(function, *args) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def cost(name: str, batch_size: int, repeats: int) -> dict:
    """Medians, in ms, of a method's update, of ERM's in turn with it, and of its floor."""
    torch.set_num_threads(1)
    (erm, minibatches), (method, _) = build("ERM", batch_size), build(name, batch_size)
    erm.update(minibatches)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    method.update(minibatches)
    x = torch.cat([x for x, _ in minibatches])
    has_teacher = hasattr(method, "teacher_logits")
    times = {"erm": [], "method": [], "floor": []}
    for _ in range(repeats):
        erm_s = timed(erm.update, minibatches)
        times["erm"].append(erm_s)
        times["method"].append(timed(method.update, minibatches))
        times["floor"].append(erm_s + (timed(method.teacher_logits, x) if has_teacher else 0))
    erm_ms, method_ms, floor_ms = (1000 * statistics.median(t) for t in times.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"method": name, "ms": method_ms, "of ERM": method_ms / erm_ms,
            "of floor": method_ms / floor_ms, "MB more": (peak - before) / 1024}


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measures each method in a process of its own; prints a table, writes it and JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME",
                        help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--batch_size", type=int, default=16,
                        help="images per domain, of three; default: 16")
    parser.add_argument("--repeats", type=int, default=30, help="timed updates; default: 30")
    parser.add_argument("--output", type=Path, default=Path("bench"),
                        help="OUTPUT.json and OUTPUT.md are written; default: bench")
    args = parser.parse_args(argv)
    rows = []
    for name in args.methods:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(cost, (name, args.batch_size, args.repeats)))
    args.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows), end="")
    return 0


if __name__ == "__main__":
    run_main(main)
