"""Tries the plug-in in checkouts of DomainBed forks, and prints what works as a Markdown table.

    python tools/live_forks.py ~/DomainBed ~/swad --data_dir DATA > matrix.md

Each DIR holds a fork's package domainbed. All runs are made in copies and take two or four steps
(see `domainbed_kd.plugin.trials`); a fork takes 5 to 20 minutes on two cores. Packages that a fork
imports must be installed. Logs stay in --work_dir.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Container
from pathlib import Path

from domainbed_kd.console import run_main
from domainbed_kd.plugin import trials

PARTS = ("erm", "sweep", "sources", "install", "fork")
INSTALL = "\nimport domainbed_kd.plugin; domainbed_kd.plugin.install()\n"


class LiveTrial(trials.Trial):
    """Adds to `doctor --try`: sweeps, the line in a fork's source, and its methods here."""

    def sweep(self) -> None:
        """Runs the fork's own sweep and table of ERM, RISE and KDDG on Debug28."""
        if not (self.copy / "domainbed" / "scripts" / "sweep.py").exists():
            self.results["sweep", "launch"] = "the fork has no sweep"
            return
        process = self.python(
            "-m", "domainbed.scripts.sweep", "launch", "--data_dir", str(self.folder / "data"),
            "--output_dir", "trial/sweep", "--command_launcher", "local", "--algorithms", "ERM",
            "RISE", "KDDG", "--datasets", "Debug28", "--n_hparams", "1", "--n_trials", "1",
            "--steps", "2", "--single_test_envs", "--hparams", json.dumps(trials.SMALL))
        done = len(list(self.copy.glob("trial/sweep/*/done")))
        error = (process.stderr.strip().splitlines() or [""])[-1][:200]
        self.results["sweep", "launch"] = "" if done == 9 else f"{done} of 9 jobs done: {error}"
        process = self.python("-m", "domainbed.scripts.collect_results", "--input_dir",
                              "trial/sweep")
        rows = {line.split()[0] for line in process.stdout.splitlines() if line.strip()}
        self.results["sweep", "collect_results"] = "" if {"ERM", "RISE", "KDDG"} <= rows else (
            process.stderr.strip().splitlines() or ["a row is missing"])[-1][:200]

    def install(self, dataset: str) -> None:
        """Adds the one line to the copy's algorithms module and trains KDDG without the command."""
        package = self.copy / "domainbed" / "algorithms"
        module = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
        text = module.read_text(encoding="utf-8")
        module.write_text(text + INSTALL, encoding="utf-8")
        self._child("install()", plugged=False, runs={
            "KDDG": self.command("KDDG", dataset, f"trial/{dataset}_line")})
        module.write_text(text, encoding="utf-8")

    def visit(self) -> None:
        """Trains, stops and resumes every algorithm of the fork here; then sweeps one of them."""
        listing = self.python("-c", "from domainbed_kd.plugin import visitors; import os, json\n"
                              "print('\\n' + json.dumps(visitors.load(os.getcwd())))",
                              plugged=False)
        if listing.returncode:
            self.results["--fork", "load"] = listing.stderr.strip().splitlines()[-1]
            return
        names = json.loads(listing.stdout.strip().splitlines()[-1])
        shared = ["--fork", str(self.copy), "--dataset", "Debug28", "--hparams",
                  '{"batch_size": 4}', "--steps", "4"]
        self._child("--fork", plugged=False, visits={name: [
            "domainbed_kd.scripts.train", *shared, "--algorithm", name, "--output_dir",
            f"trial/here/{name}"] for name in names})
        good = [name for name in names if not self.results["--fork", name]][:1]
        process = self.python(
            "-m", "domainbed_kd.scripts.sweep", "launch", "--fork", str(self.copy), "--datasets",
            "Debug28", "--algorithms", "ERM", *good, "--single_test_envs", "--n_trials", "1",
            "--n_hparams", "1", "--steps", "2", "--hparams", '{"batch_size": 4}',
            "--skip_confirmation", "--output_dir", "trial/ours", plugged=False)
        error = (process.stderr.strip().splitlines() or [""])[-1][:200]
        self.results["--fork sweep", "launch"] = error if process.returncode else ""
        process = self.python("-m", "domainbed_kd.scripts.collect_results", "--input_dir",
                              "trial/ours", plugged=False)
        rows = {line.split()[0] for line in process.stdout.splitlines() if line.strip()}
        self.results["--fork sweep", "table"] = "" if {"ERM", *good} <= rows else "a row is missing"

    def all(self, methods: list[str], on_pacs: list[str], parts: Container[str]) -> None:
        """Tries everything requested, in order; stops at once if the fork cannot be imported.

        Args:
            methods: to train on Debug28, or on PACS if the fork only has that.
            on_pacs: methods to train on PACS too.
            parts: a selection of PARTS.
        """
        self.doctor()
        if self.results["doctor", "doctor"]:
            return
        sets = {"PACS": methods} if self.takes_xy else {"Debug28": methods, "PACS": on_pacs}
        for dataset, names in sets.items():
            self.train(dataset, ["ERM", *names])
            self.reload(dataset)
        first = next(iter(sets))
        for part, step in {"erm": lambda: self.compare_erm(first), "sweep": self.sweep,
                           "sources": self.unchanged, "install": lambda: self.install(first),
                           "fork": self.visit}.items():
            if part in parts:
                step()


def matrix(tried: dict[str, LiveTrial]) -> str:
    """A Markdown table with a column per fork and a row per trial, and the reasons of failures."""
    kinds = list(dict.fromkeys(key for trial in tried.values() for key in trial.results))
    lines = ["| | " + " | ".join(tried) + " |", "|---" * (len(tried) + 1) + "|"]
    notes = []

    def cell(fork, trial, keys):
        found = [(key, trial.results[key]) for key in keys if key in trial.results]
        failed = [(key, reason) for key, reason in found if reason]
        notes.extend(f"- {fork}: {' '.join(key)}: {reason}" for key, reason in failed)
        if not found:
            return "its own" if keys[0][1] in trial.kept else ""
        return "yes" if not failed else "no" if len(found) == 1 else (
            f"{len(found) - len(failed)} of {len(found)}")

    rows = dict.fromkeys((kind if kind in ("--fork", "--fork sweep", "sweep") else (kind, name))
                         for kind, name in kinds)
    for row in rows:
        keys = [key for key in kinds if row in (key, key[0])]
        words = row if isinstance(row, str) else f"{row[0]}: {row[1]}"
        lines.append(f"| {words} | " + " | ".join(
            cell(fork, trial, keys) for fork, trial in tried.items()) + " |")
    return "\n".join([*lines, "", *notes])


def commit(folder: Path) -> str:
    """A checkout's abbreviated commit."""
    process = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"],
                             capture_output=True, text=True)
    return process.stdout.strip() or "no commit"


def main() -> int:
    """Tries each fork; returns 0 even if some fail."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("forks", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--data_dir", type=Path, help="folder that holds PACS (random images)")
    parser.add_argument("--work_dir", type=Path, help="folder for copies and logs (temporary)")
    parser.add_argument("--methods", nargs="+", default=trials.METHODS, help="(all)")
    parser.add_argument("--on_pacs", nargs="+", default=trials.METHODS,
                        help="methods to train on PACS in addition to Debug28 (all)")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS,
                        help="what to try in addition to training and reloading (all)")
    args = parser.parse_args()
    work = args.work_dir or Path(tempfile.mkdtemp(prefix="live_forks_"))
    done = {}
    for fork in args.forks:
        where = fork.resolve()
        name = (where.parent if where.name == "DomainBed" and not (where / ".git").exists()
                else where).name
        trial = LiveTrial(where, work / name, args.data_dir)
        trial.all(args.methods, args.on_pacs, args.parts)
        done[f"{name} {commit(where)}"] = trial
        print(matrix({name: trial}), file=sys.stderr)
    print(matrix(done))
    return 0


if __name__ == "__main__":
    run_main(main)
