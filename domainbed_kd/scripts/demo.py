"""Trains a small sweep on digits that ship with the package, then prints tables and a report.

It needs no data, network or GPU. Any flag of `sweep launch` may follow, and overrides the demo's
own: `domainbed-kd demo --algorithms ERM CORAL`. The same command continues a demo that was
interrupted.
"""

import argparse
import importlib.util
import shlex
from pathlib import Path

import domainbed_kd
from domainbed_kd import results
from domainbed_kd.console import Parser, run_main
from domainbed_kd.scripts import collect_results, report, sweep

FLAGS = Path(domainbed_kd.__file__).parent / "assets" / "demo.args"


def build_parser() -> argparse.ArgumentParser:
    """The demo's only flag of its own."""
    parser = Parser(prog="domainbed-kd demo", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo", metavar="FOLDER",
                        help="where the sweep and its report go (default: demo)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Launches, prints tables, writes the report, and ends with three lines on the outcome."""
    args, flags = build_parser().parse_known_args(argv)
    folder, page = Path(args.output_dir, "sweep"), Path(args.output_dir, "report.html")
    launch = ["launch", f"@{FLAGS}", "--output_dir", str(folder), *flags]
    print(f"domainbed-kd sweep {shlex.join(launch)}", flush=True)
    if status := sweep.main(launch):
        return status
    collect_results.main(["--input_dir", str(folder)])
    drawn = all(importlib.util.find_spec(name) for name in ("matplotlib", "scipy", "jinja2"))
    if drawn:
        report.main(["--input_dir", str(folder), "--output", str(page)])
    print("\n" + summary(folder))
    print(f"Report: {page}" if drawn else
          f"Report: pip install 'domainbed_kd[report]', then domainbed-kd report --input_dir "
          f"{folder}")
    print("Next: domainbed-kd train --dataset Folder:NAME --data_dir DATA --algorithm KD "
          "--test_envs 0, with images in DATA/NAME/DOMAIN/CLASS/")
    return 0


def summary(folder: Path) -> str:
    """A sentence on the best method: its mean accuracy, and how it compares with ERM."""
    frame = results.to_frame(folder)
    scores = frame[frame["selected"]].pivot_table(
        index=["args.test_envs", "args.trial_seed"], columns="args.algorithm",
        values="test_acc") * 100
    means = scores.mean()
    best = means.idxmax()
    text = f"{best} is best, with {means[best]:.1f} % on domains that it never trained on"
    if "ERM" not in scores or best == "ERM":
        return f"{text}."
    gains = (scores[best] - scores["ERM"]).dropna()
    return (f"{text}; ERM has {means['ERM']:.1f} %. {best} is ahead in {(gains > 0).sum()} of "
            f"{len(gains)} pairs of held-out domain and trial.")


if __name__ == "__main__":
    run_main(main)
