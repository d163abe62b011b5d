"""Kills a sweep's jobs and launchers at random moments; compares with an undisturbed sweep.

With Ray, nodes are lost too: all processes on a node are killed at once, and another node replaces
it. With submitit's local executor, jobs get Slurm's signal that their time is up.

Exits with 0 if the killed sweep ends in the same tables, byte-identical models, and records that
differ only in times and memory, with any launcher; if each job ran to its end exactly once; and if
no process or stray file is left. The seed fixes the order of the kills, not which state they meet.
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
# A finished run's files, without TensorBoard's events, whose names have a number per attempt.
FILES = {"args.json", "done", "err.txt", "memory.json", "model.pkl", "out.txt", "results.jsonl"}
# Two jobs at a time for each launcher, and how often each kind of harm happens to it.
FLAGS = {
    "local": ["--jobs_per_device", "2"],
    "ray": ["--command_launcher", "ray"],
    "slurm": ["--command_launcher", "slurm", "--slurm_cluster", "local", "--slurm_gpus", "0",
              # submitit takes a signal in a job's last ten minutes, here any, for a time-out.
              "--slurm_time", "5", "--slurm_parallel", "2"]}
KILLS = {
    "local": {"job": 6, "launcher": 3, "server": 3, "tracker": 1},
    "ray": {"node": 6, "job": 2, "launcher": 2},
    "slurm": {"time-out": 6, "job": 2, "launcher": 2}}
# Multiprocessing's helpers of a launcher: the server that starts jobs, and the resource tracker.
HELPERS = {"server": b"forkserver", "tracker": b"resource_tracker"}


def build_parser() -> argparse.ArgumentParser:
    """The flags; DigitsDG has 4 jobs for each algorithm, trial and seed of hparams."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("chaos"),
                        help="folder for the two sweeps; it must not exist (default: chaos)")
    parser.add_argument("--launcher", choices=FLAGS, default="local",
                        help="ray: on a cluster of two nodes on this machine; slurm: submitit's "
                             "local executor (default: local)")
    parser.add_argument("--dataset", default="DigitsDG", help="default: DigitsDG")
    parser.add_argument("--algorithms", nargs="+", default=["ERM", "SWAD", "RISE", "MosaicKD"])
    parser.add_argument("--n_trials", type=int, default=1, help="default: 1")
    parser.add_argument("--n_hparams", type=int, default=1, help="seeds of hparams; default: 1")
    parser.add_argument("--steps", type=int, default=30, help="updates in a run (default: 30)")
    parser.add_argument("--kills", type=int, default=25, help="default: 25")
    parser.add_argument("--within_s", type=float, default=12,
                        help="largest number of seconds between kills (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser


def launch(args: argparse.Namespace, folder: Path, flags: list[str]) -> subprocess.Popen:
    """Starts the launcher in `folder`; the sweep's relative path is the same in every folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "launcher.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "domainbed_kd.scripts.sweep", "launch", "--datasets",
             args.dataset, "--algorithms", *args.algorithms, "--n_trials", str(args.n_trials),
             "--n_hparams", str(args.n_hparams), "--steps", str(args.steps),
             "--checkpoint_freq", "10", "--hparams", json.dumps(HPARAMS), "--output_dir", "sweep",
             "--single_test_envs", "--skip_confirmation", "--allow_bad_teacher", *flags],
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"})


def processes(folder: Path) -> list[int]:
    """The processes of a folder's sweep: those with this working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(folder.resolve()):
                found.append(int(process.name))
        except OSError:
            continue  # the process has ended, or is another user's
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


class RayCluster:
    """Ray's head and a node, with a CPU each."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        # Workers inherit these; the rest comes with each job's task.
        os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        self.cluster = Cluster(initialize_head=True, head_node_args={
            **self.size, "include_dashboard": False})
        self.node = self.cluster.add_node(**self.size)

    size = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 * 2**20}  # bytes

    @property
    def flags(self) -> list[str]:
        """Flags by which a launcher finds the cluster."""
        return ["--ray_address", self.cluster.address]

    def lose_node(self) -> None:
        """Kills all processes on the node at once, as if its power failed, and adds another."""
        raylet = self.node.all_processes["raylet"][0].process.pid
        for pid in [raylet, *descendants(raylet)]:
            kill(pid)
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.node = self.cluster.add_node(**self.size)


def children(pid: int, module: bytes) -> list[int]:
    """The children of a process that run a module of multiprocessing."""
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").glob("*")
                for child in (task / "children").read_text().split()
                if module in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []  # it has ended


def descendants(pid: int) -> list[int]:
    """A process's children, their children, and so on."""
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*")
                for child in (task / "children").read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Sends a signal; False if the process has ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def submissions(folder: Path) -> list[int]:
    """The processes in which submitit runs a job."""
    found = []
    for pid in processes(folder):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"submitit.core._submit" in command:
            found.append(pid)
    return found


def strike(kind: str, r: random.Random, folder: Path, launcher: subprocess.Popen,
           cluster: RayCluster | None) -> bool:
    """Harms the sweep in this way; False if there was nothing to harm."""
    if kind == "node":
        cluster.lose_node()
        return True
    if kind == "launcher":
        return launcher.poll() is None and kill(launcher.pid)
    if kind in HELPERS:
        return any([kill(pid) for pid in children(launcher.pid, HELPERS[kind])])
    victims = submissions(folder) if kind == "time-out" else jobs_at_work(folder)
    number = signal.SIGUSR2 if kind == "time-out" else signal.SIGKILL
    return bool(victims) and kill(r.choice(victims), number)


class Watched:
    """Records when a sweep's jobs end.

    Args:
        folder: contains the folder `sweep`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.ends: dict[str, set[int]] = {}

    def look(self) -> None:
        """Records when each job's `done` was last written."""
        for path in self.folder.glob("sweep/*/done"):
            self.ends.setdefault(path.parent.name, set()).add(path.stat().st_mtime_ns)

    def wait(self, seconds: float) -> None:
        """Watches for this many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.look()
            time.sleep(0.05)

    def wait_for(self, launcher: subprocess.Popen) -> int:
        """Watches until the launcher ends; returns its exit status."""
        while launcher.poll() is None:
            self.wait(0.1)
        self.look()
        return launcher.returncode


def until_done(args: argparse.Namespace, folder: Path, cluster: RayCluster | None) -> Watched:
    """Launches repeatedly, with kills, until the launcher reports that all jobs are done.

    Raises:
        SystemExit: if the sweep is not done after several launches without kills.
    """
    r, launcher, launches, sweep = random.Random(args.seed), None, 0, Watched(folder)
    flags = FLAGS[args.launcher] + (cluster.flags if cluster else [])
    killed, kinds = Counter(), KILLS[args.launcher]
    while killed.total() < args.kills:
        if launcher is None or launcher.poll() is not None:
            if launcher is not None and launcher.returncode == 0:
                break
            launcher = launch(args, folder, flags)
            launches += 1
        if r.random() >= 0.1:  # in nine of ten cases, wait until a job has begun
            while launcher.poll() is None and not jobs_at_work(folder):
                sweep.wait(0.1)
        sweep.wait(r.uniform(0, args.within_s))
        kind, = r.choices(list(kinds), list(kinds.values()))
        killed[kind] += strike(kind, r, folder, launcher, cluster)
    if launcher is not None:
        sweep.wait_for(launcher)
    print(", ".join(f"{n} x {kind}" for kind, n in killed.items()) + f"; {launches} launches",
          flush=True)
    for _ in range(5):
        while jobs_at_work(folder):  # jobs without a launcher save their state and end
            sweep.wait(0.2)
        if sweep.wait_for(launch(args, folder, flags)) == 0:
            return sweep
    sys.exit(f"{folder} is not done after 5 launches; see {folder / 'launcher.log'}.")


def comparable(line: str) -> str:
    """A record's line without times and memory."""
    record = json.loads(line)
    return json.dumps({k: v for k, v in record.items() if k not in NOT_COMPARED})


def tables(folder: Path) -> str:
    """What collect_results prints."""
    return subprocess.run(
        [sys.executable, "-m", "domainbed_kd.scripts.collect_results", "--input_dir", "sweep"],
        cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).stdout


def differences(quiet: Path, killed: Path) -> list[str]:
    """How the killed sweep differs from the undisturbed one, in words."""
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
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs an undisturbed and a killed sweep, and prints their differences."""
    args = build_parser().parse_args(argv)
    if args.folder.exists():
        print(f"error: {args.folder} exists. Delete it, or choose another --folder.",
              file=sys.stderr)
        return 2
    quiet, killed = args.folder.resolve() / "quiet", args.folder.resolve() / "killed"
    start = time.monotonic()
    if launch(args, quiet, FLAGS["local"]).wait() != 0:
        print(f"error: the quiet sweep failed; see {quiet / 'launcher.log'}.", file=sys.stderr)
        return 2
    n_jobs = len(list((quiet / "sweep").glob("*/done")))
    print(f"{n_jobs} jobs, quiet: {time.monotonic() - start:.0f} s", flush=True)
    start = time.monotonic()
    cluster = RayCluster() if args.launcher == "ray" else None
    try:
        sweep = until_done(args, killed, cluster)
    finally:
        if cluster:
            cluster.cluster.shutdown()
    found = differences(quiet, killed)
    found += [f"{name}: run to the end twice" for name, ends in sweep.ends.items()
              if len(ends) > 1]
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
