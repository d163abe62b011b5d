"""Kills a sweep's jobs and launchers at random moments, and compares what is left with a quiet one.

Exits with 0 if the sweep that was killed ends in the same tables, in byte-identical models and in
records that differ in times and memory alone; if each job ran to its end once; and if neither a
process nor a stray file is left. Times are of this machine; the seed fixes the kills' order, not
what they meet.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HPARAMS = {"batch_size": 8, "wrn_depth": 10, "wrn_widen": 1, "mosaic_kd_steps": 1,
           "mosaic_width": 8, "mosaic_batch": 16, "clip_backbone": "tiny"}
NOT_COMPARED = ("step_time", "mem_gb")
# What a finished run may hold; TensorBoard's events have a number per attempt.
FILES = {"done", "err.txt", "memory.json", "model.pkl", "out.txt", "results.jsonl"}


def build_parser() -> argparse.ArgumentParser:
    """Flags; on DigitsDG there are 4 jobs for each algorithm, trial and seed of hparams."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("chaos"),
                        help="where the two sweeps go; it must not exist (default: chaos)")
    parser.add_argument("--dataset", default="DigitsDG", help="default: DigitsDG")
    parser.add_argument("--algorithms", nargs="+", default=["ERM", "SWAD", "RISE", "MosaicKD"])
    parser.add_argument("--n_trials", type=int, default=1, help="default: 1")
    parser.add_argument("--n_hparams", type=int, default=1, help="seeds of hparams; default: 1")
    parser.add_argument("--steps", type=int, default=30, help="updates in a run (default: 30)")
    parser.add_argument("--kills", type=int, default=25, help="default: 25")
    parser.add_argument("--within_s", type=float, default=12,
                        help="a kill comes up to so many seconds after the last (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser


def launch(args: argparse.Namespace, folder: Path) -> subprocess.Popen:
    """Starts the launcher in a folder of its own; the sweep's paths are the same in each."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "launcher.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "domainbed_kd.scripts.sweep", "launch", "--datasets",
             args.dataset, "--algorithms", *args.algorithms, "--n_trials", str(args.n_trials),
             "--n_hparams", str(args.n_hparams), "--steps", str(args.steps),
             "--checkpoint_freq", "10", "--hparams", json.dumps(HPARAMS), "--output_dir", "sweep",
             "--jobs_per_device", "2", "--single_test_envs", "--skip_confirmation",
             "--allow_bad_teacher"],
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"})


def processes(folder: Path) -> list[int]:
    """The processes of a folder's sweep: those whose working directory it is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(folder.resolve()):
                found.append(int(process.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found


def jobs_at_work(folder: Path) -> list[int]:
    """The processes that have a run's out.txt open."""
    found = []
    for pid in processes(folder):
        try:
            names = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        if any(name.endswith("/out.txt") for name in names):
            found.append(pid)
    return found


def until_done(args: argparse.Namespace, folder: Path, kills: int) -> None:
    """Launches again and again until the launcher is satisfied, with that many kills before.

    Raises:
        SystemExit: if the sweep does not get done although nobody kills any more.
    """
    r, launcher, left, launches = random.Random(args.seed), None, kills, 0
    killed = Counter()
    while left:
        if launcher is None or launcher.poll() is not None:
            if launcher is not None and launcher.returncode == 0:
                break
            launcher = launch(args, folder)
            launches += 1
        at_once = r.random() < 0.1  # in nine of ten cases after a job has begun
        while not at_once and launcher.poll() is None and not jobs_at_work(folder):
            time.sleep(0.05)
        time.sleep(r.uniform(0, args.within_s))
        victims = jobs_at_work(folder)
        if r.random() < 0.3 or not victims:
            victims = [launcher.pid] if launcher.poll() is None else []
        for pid in r.sample(victims, min(1, len(victims))):
            try:
                os.kill(pid, signal.SIGKILL)
                left -= 1
                killed[pid == launcher.pid] += 1
            except ProcessLookupError:
                continue
    if launcher is not None:
        launcher.wait()
    print(f"{killed[False]} jobs and {killed[True]} launchers killed, {launches} launches",
          flush=True)
    for _ in range(5):
        while jobs_at_work(folder):  # saving, as their launcher is gone
            time.sleep(0.2)
        if launch(args, folder).wait() == 0:
            return
    sys.exit(f"{folder} does not get done; see {folder / 'launcher.log'}.")


def comparable(line: str) -> str:
    """A record's line without what depends on the machine."""
    record = json.loads(line)
    return json.dumps({k: v for k, v in record.items() if k not in NOT_COMPARED})


def tables(folder: Path) -> str:
    """What collect_results prints."""
    return subprocess.run(
        [sys.executable, "-m", "domainbed_kd.scripts.collect_results", "--input_dir", "sweep"],
        cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).stdout


def differences(quiet: Path, killed: Path) -> list[str]:
    """What the sweep that was killed lacks, has too much of, or has otherwise; in words."""
    found = []
    names = [sorted(os.listdir(folder / "sweep")) for folder in (quiet, killed)]
    if names[0] != names[1]:
        found.append(f"runs: {set(names[0]) ^ set(names[1])}")
    for name in sorted(set(names[0]) & set(names[1])):
        ours, theirs = killed / "sweep" / name, quiet / "sweep" / name
        if not ours.is_dir():
            continue
        stray = [f.name for f in ours.iterdir()
                 if f.name not in FILES and not f.name.startswith("events.out.tfevents.")]
        if stray:
            found.append(f"{name}: stray {stray}")
        if (ours / "model.pkl").read_bytes() != (theirs / "model.pkl").read_bytes():
            found.append(f"{name}: another model.pkl")
        lines = [(f / "results.jsonl").read_text(encoding="utf-8").splitlines()
                 for f in (ours, theirs)]
        if list(map(comparable, lines[0])) != list(map(comparable, lines[1])):
            found.append(f"{name}: other records")
    if tables(quiet) != tables(killed):
        found.append("other tables")
    log = (killed / "launcher.log").read_text(encoding="utf-8", errors="replace")
    done = [line.split("  (")[0].split("] ", 1)[1] for line in log.splitlines()
            if "] done  " in line]
    if twice := {label for label in done if done.count(label) > 1}:
        found.append(f"run to the end twice: {twice}")
    return found


def main(argv: list[str] | None = None) -> int:
    """A quiet sweep, a killed one, and their differences."""
    args = build_parser().parse_args(argv)
    if args.folder.exists():
        print(f"error: {args.folder} exists. Delete it, or choose another --folder.",
              file=sys.stderr)
        return 2
    quiet, killed = args.folder.resolve() / "quiet", args.folder.resolve() / "killed"
    start = time.monotonic()
    if launch(args, quiet).wait() != 0:
        print(f"error: the quiet sweep failed; see {quiet / 'launcher.log'}.", file=sys.stderr)
        return 2
    n_jobs = len(list((quiet / "sweep").glob("*/done")))
    print(f"{n_jobs} jobs, quiet: {time.monotonic() - start:.0f} s", flush=True)
    start = time.monotonic()
    until_done(args, killed, args.kills)
    found = differences(quiet, killed)
    deadline = time.monotonic() + 15  # a fork server ends a moment after its last child
    while (orphans := processes(killed)) and time.monotonic() < deadline:
        time.sleep(0.2)
    found += [f"orphan process {pid}" for pid in orphans]
    print(f"killed: {time.monotonic() - start:.0f} s, {len(found)} differences", flush=True)
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
