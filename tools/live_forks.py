"""Tries the plug-in in checkouts of DomainBed forks, and prints what works as a Markdown table.

    python tools/live_forks.py ~/DomainBed ~/swad --data_dir DATA > matrix.md

Each DIR holds a fork's package domainbed. All runs are made in copies and take two or four steps
(see `domainbed_kd.plugin.trials`); a fork takes 5 to 20 minutes on two cores. What a fork imports
must be installed. The logs stay in --work_dir.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from domainbed_kd.console import run_main
from domainbed_kd.plugin import trials


def commit(folder: Path) -> str:
    """The commit of a checkout, short."""
    process = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"],
                             capture_output=True, text=True)
    return process.stdout.strip() or "no commit"


def main() -> int:
    """Tries each fork in turn; 0 however many of them fail."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("forks", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--data_dir", type=Path, help="folder that holds PACS (random images)")
    parser.add_argument("--work_dir", type=Path, help="folder for copies and logs (temporary)")
    parser.add_argument("--methods", nargs="+", default=trials.METHODS, help="(all)")
    parser.add_argument("--on_pacs", nargs="+", default=trials.METHODS,
                        help="methods to train on PACS beside Debug28 (all)")
    parser.add_argument("--parts", nargs="*", default=trials.PARTS, choices=trials.PARTS,
                        help="what to try beside training and reloading (all)")
    args = parser.parse_args()
    work = args.work_dir or Path(tempfile.mkdtemp(prefix="live_forks_"))
    done = {}
    for fork in args.forks:
        where = fork.resolve()
        name = (where.parent if where.name == "DomainBed" and not (where / ".git").exists()
                else where).name
        trial = trials.Trial(where, work / name, args.data_dir)
        trial.all(args.methods, args.on_pacs, args.parts)
        done[f"{name} {commit(where)}"] = trial
        print(trials.matrix({name: trial}), file=sys.stderr)
    print(trials.matrix(done))
    return 0


if __name__ == "__main__":
    run_main(main)
