"""Measures costs: every figure as a ratio of two things measured alternately, in one run.

start: importing the package, help and building DigitsDG, compared with importing torch.
updates: each method alternates with ERM on the same images and threads. A method's floor is its
unavoidable cost: ERM's update of its student, or the update of the algorithm under added teachers
(two updates for LFME, whose experts are as large), and one forward pass of its teacher. Memory (on
Linux) is the increase of a process's peak over its memory before the first update.
sweep: a Debug28 sweep of 12 jobs of 3 steps, compared with the same jobs in separate processes.
collect: collect_results on an artificial sweep, the first time and again.
crops: how many training images of PACS a loader reads per CPU second, on one thread.
pacs: 30 steps of ResNet-18 on PACS at 224 pixels, 8 images per domain, and 2 evaluations, on all
cores or on OMP_NUM_THREADS, compared with the plain loop of tools/plain_loop.py. Processes and
memory (on Linux) are peaks of an untimed run of 3 steps, which also builds the cache of decoded
images. Like crops, it needs --data_dir.

With --peer DIR, a DomainBed checkout does the work of sweep and collect too, alternating with us.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import multiprocessing.pool
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from domainbed_kd import algorithms, datasets
from domainbed_kd.console import Parser, run_main
from domainbed_kd.seeds import seed_hash
from domainbed_kd.sweep import listing

METHODS = ("ERM", "CORAL", "SWAD", "KD", "KDDG", "SCMD", "RISE", "MosaicKD", "FourDs", "WAKD",
           "VL2VADiP", "VL2VSD", "CLIPood", "LFME", "XDED", "SDViT", "CORAL + KD(ERM)")
# Methods whose student is CLIP's image network.
TOWERS = ("VL2VSD", "CLIPood")
ROOT = Path(__file__).parents[1]
# Names that every DomainBed knows, so that a peer can read the artificial sweep too.
MADE_UP = {"datasets": ("VLCS", "PACS"),
           "algorithms": ("ERM", "IRM", "GroupDRO", "Mixup", "MLDG", "CORAL", "MMD", "DANN",
                          "CDANN", "MTL")}
# Three test envs of Debug28 and four draws of hparams: 12 jobs. The batch size is smaller than the
# default, as DomainBed waits forever for a batch larger than Debug28's 13 images per split.
SWEEP = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_trials", "1", "--n_hparams", "4",
         "--single_test_envs", "--steps", "3", "--hparams", '{"batch_size": 4}',
         "--data_dir", "none", "--skip_confirmation"]


def build(name: str, batch_size: int, student: str = ""):
    """(algorithm, minibatches) on DigitsDG with the last domain held out.

    Args:
        name: of an algorithm; a following " + KD(ERM)" adds a teacher.
        batch_size: images per domain.
        student: the method whose student ERM trains; ERM's own by default.
    """
    import torch
    from torch import nn

    from domainbed_kd import hparams_registry, teachers
    from domainbed_kd.algorithms import composed

    name, _, on_top = name.partition(" + ")
    dataset = datasets.get_dataset_class("DigitsDG")(None, [3], {})
    hparams = hparams_registry.default_hparams(name, "DigitsDG") | {
        "wrn_depth": 10, "wrn_widen": 1, "total_steps": 1000,
        "class_names": dataset.class_names, "domain_names": dataset.domain_names[:3],
        "dataset": "DigitsDG", "test_envs": [3], "normalization": None,
        "scmd_worst_case": 1.0,  # all rows, as the others' updates
        "vl2v_align_steps": 0}  # the stage in which the student learns
    if student == "SDViT":
        hparams["backbone"] = "small_vit"
    if on_top:
        hparams["teachers"] = ["run:ERM"]
    if on_top or algorithms.learns_from_run(name):
        hparams["teacher"], _ = build("ERM", batch_size)
    torch.manual_seed(0)
    cls = composed.assembled(algorithms.get_algorithm_class(name), hparams)
    minibatches = [tuple(part[:batch_size] for part in env.tensors) for env in dataset.datasets[:3]]
    algorithm = cls(dataset.input_shape, 10, 3, hparams)
    if student in TOWERS:
        tower = teachers.ImageTower(teachers.clip({"clip_backbone": "tiny"}, dataset.input_shape))
        width = tower(torch.zeros(1, *dataset.input_shape)).shape[1]
        algorithm.network = nn.Sequential(tower, nn.Linear(width, 10))
        algorithm.optimizer = algorithm.adam(algorithm.network)
    return algorithm, minibatches


def build_floor(name: str, batch_size: int):
    """(algorithm, minibatches) of the update that a method's own cannot be cheaper than."""
    return build(name.partition(" + ")[0] if " + " in name else "ERM", batch_size, student=name)


def timed(function, *args) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def cost(name: str, batch_size: int, repeats: int) -> dict:
    """A method's update in ms, and its ratios to ERM's, measured alternately, and to its floor."""
    import torch

    torch.set_num_threads(1)
    (erm, minibatches), (method, _) = build("ERM", batch_size), build(name, batch_size)
    floor, _ = build_floor(name, batch_size)
    for algorithm in (erm, method, floor):
        algorithm.update(minibatches)
    x = torch.cat([x for x, _ in minibatches])
    has_teacher = method.teacher_is_ready()
    times = {"erm": [], "method": [], "floor": []}
    for _ in range(repeats):
        times["erm"].append(timed(erm.update, minibatches))
        times["method"].append(timed(method.update, minibatches))
        floor_s = timed(floor.update, minibatches) * (2 if name == "LFME" else 1)
        times["floor"].append(floor_s + (timed(method.teacher_logits, x) if has_teacher else 0))
    erm_ms, method_ms, floor_ms = (1000 * statistics.median(t) for t in times.values())
    return {"method": name, "ms": method_ms, "of ERM": method_ms / erm_ms,
            "of floor": method_ms / floor_ms}


def memory(name: str, batch_size: int, is_floor: bool) -> float:
    """The MB that updates of a method, or of its floor, need."""
    import torch

    torch.set_num_threads(1)
    method, minibatches = build(name, batch_size)
    x = torch.cat([x for x, _ in minibatches])
    has_teacher = is_floor and method.teacher_is_ready()
    updated = build_floor(name, batch_size)[0] if is_floor else method
    ctypes.CDLL(None).malloc_trim(0)  # memory freed by building must not hide that of updates
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    for _ in range(3):
        updated.update(minibatches)
        if has_teacher:
            method.teacher_logits(x)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """This process's current memory (VmRSS) or peak memory (VmHWM) in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


def apart(function: Callable, *arguments):
    """What a function returns in a separate process.

    This process must stay small, as its memory counts as that of the commands that it starts.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def updates(args) -> list[dict]:
    """Each method's cost; every figure is from a separate process."""
    rows, erm = [], apart(memory, "ERM", args.batch_size, False)
    for name in args.methods:
        row = apart(cost, name, args.batch_size, args.repeats)
        mb, floor = (apart(memory, name, args.batch_size, is_floor) for is_floor in (False, True))
        rows.append(row | {"MB": mb, "MB of ERM": mb / erm, "MB of floor": mb / floor})
    return rows


def run(argv: list[str], folder: Path = ROOT, threads: int = 1) -> dict:
    """Runs a command in `folder`, which is also first on its path.

    Returns wall seconds, and for the command and the children it waited for (not for a fork
    server) CPU seconds and the peak MB of a process.

    Raises:
        RuntimeError: if it fails, with its last line on stderr.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads),
                   "PYTHONPATH": str(folder.resolve())}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["it printed no error"])[-1]
            raise RuntimeError(f"{shlex.join(argv)} in {folder} failed: {last}")
    return {"s": seconds, "CPU s": used.ru_utime + used.ru_stime, "MB": used.ru_maxrss / 1024}


def python(*words: str) -> list[str]:
    """A command line for this interpreter."""
    return [sys.executable, *words]


def compare(ways: dict[str, Callable[[], dict]], repeats: int) -> list[dict]:
    """A row per way of doing the same work: medians of its measures, taken alternately.

    `of first` is its wall time as a multiple of the first way's.
    """
    measured = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            measured[name].append(way())
    rows = []
    for name, found in measured.items():
        medians = {key: statistics.median(m[key] for m in found) for key in ("s", "CPU s", "MB")}
        rows.append({"what": name, **medians})
    return [{**row, "of first": row["s"] / rows[0]["s"]} for row in rows]


def seconds_inside(setup: str, statement: str) -> float:
    """The seconds that a statement takes in a separate process, after a setup."""
    code = "\n".join(["import time", setup, "began = time.perf_counter()", statement,
                      "print(time.perf_counter() - began)"])
    return float(subprocess.run(
        python("-c", code), cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def start(args) -> list[dict]:
    """Waiting times before work begins, and their limits."""
    ways = {
        "import torch": (
            "-", lambda: seconds_inside("", "import torch")),
        "import domainbed_kd": (
            50, lambda: seconds_inside("", "import domainbed_kd")),
        "sweep launch --help, with Python's own start": (
            300, lambda: run(python("-m", "domainbed_kd.scripts.sweep", "launch", "--help"))["s"]),
        "build DigitsDG, torch imported": (
            5000, lambda: seconds_inside("import torch; from domainbed_kd import datasets", (
                "datasets.get_dataset_class('DigitsDG')(None, [3], {})")))}
    times = {name: [] for name in ways}
    for _ in range(args.process_repeats):
        for name, (_, seconds) in ways.items():
            times[name].append(1000 * seconds())
    ms = {name: statistics.median(found) for name, found in times.items()}
    return [{"what": name, "ms": ms[name], "of import torch": ms[name] / ms["import torch"],
             "bar, ms": bar} for name, (bar, _) in ways.items()]


def train_apart(folder: Path) -> dict:
    """The sweep's jobs in separate processes, one after another; sums (for MB the largest)."""
    sweep = python("-m", "domainbed_kd.scripts.sweep", "launch", *SWEEP, "--output_dir",
                   str(folder), "--command_launcher", "dummy")
    printed = subprocess.run(sweep, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line.partition(": ")[2]) for line in printed.splitlines()
                if line.startswith("Dummy launcher: ")]
    found = [run([sys.executable, *command[1:]]) for command in commands]
    return {"s": sum(f["s"] for f in found), "CPU s": sum(f["CPU s"] for f in found),
            "MB": max(f["MB"] for f in found)}


def launch(folder: Path, place: Path = ROOT, package: str = "domainbed_kd") -> dict:
    """Runs the sweep with the local launcher, in a folder that is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    return run(python("-m", f"{package}.scripts.sweep", "launch", *SWEEP, "--output_dir",
                      str(folder), "--command_launcher", "local"), place)


def numbers(folder: Path) -> list[dict]:
    """All records below a folder, without times and paths, in order of folder and line."""
    found = []
    for path in sorted(folder.glob("*/results.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            del record["step_time"], record["args"]["output_dir"]
            found.append(record)
    return found


def sweep(args) -> list[dict]:
    """12 small jobs.

    Raises:
        RuntimeError: if the numbers depend on how the jobs were run.
    """
    with tempfile.TemporaryDirectory() as folder:
        warm, apart = Path(folder, "warm"), Path(folder, "apart")

        def train_all_apart():
            shutil.rmtree(apart, ignore_errors=True)
            return train_apart(apart)

        ways = {"sweep launch, local": functools.partial(launch, warm),
                "12 train processes": train_all_apart}
        if args.peer:
            ways["peer's sweep launch, local"] = functools.partial(
                launch, Path(folder, "peer"), args.peer, "domainbed")
        rows = compare(ways, args.process_repeats)
        if not numbers(warm) or numbers(warm) != numbers(apart):
            raise RuntimeError("The sweep's numbers are not those of separate train processes.")
    return rows


def make_sweep(folder: Path, n_runs: int, n_records: int = 5) -> None:
    """Fills a folder with runs like DomainBed's: random accuracies, 1 kB a record."""
    from domainbed_kd import hparams_registry

    each = sum(len(listing.test_env_sets(4, False)) * 20 for _ in MADE_UP["datasets"]) * len(
        MADE_UP["algorithms"])
    rng = random.Random(0)
    for args in listing.make_args_list(
            -(-n_runs // each), MADE_UP["datasets"], MADE_UP["algorithms"], 0, 20, "data",
            "domain_generalization", 0.2, False, steps=5001)[:n_runs]:
        name = hashlib.md5(json.dumps(args, sort_keys=True).encode()).hexdigest()
        hparams = hparams_registry.random_hparams(
            args["algorithm"], args["dataset"],
            seed_hash(args["hparams_seed"], args["trial_seed"]))
        args |= {"output_dir": str(folder / name), "checkpoint_freq": None, "hparams": None,
                 "save_model_every_checkpoint": False, "skip_model_save": False,
                 "uda_holdout_fraction": 0}
        (folder / name).mkdir(parents=True)
        with (folder / name / "results.jsonl").open("w", encoding="utf-8") as file:
            for step in range(0, 5001, 5000 // (n_records - 1)):
                accuracies = {f"env{i}_{split}_acc": rng.randrange(938) / 937
                              for i in range(4) for split in ("in", "out")}
                record = {"args": args, "hparams": hparams, "step": step, "epoch": step / 33,
                          "loss": rng.random(), "step_time": rng.random(), "mem_gb": 0.0,
                          **accuracies}
                file.write(json.dumps(record, sort_keys=True) + "\n")


def collect(args) -> list[dict]:
    """collect_results on `--runs` runs."""
    def ours(folder, is_first):
        for path in folder.glob(".*") if is_first else ():
            path.unlink()
        return run(python("-m", "domainbed_kd.scripts.collect_results", "--input_dir", str(folder)))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart(make_sweep, folder, args.runs)
        ways = {f"collect_results, {args.runs} runs, first": lambda: ours(folder, True),
                "the same again": lambda: ours(folder, False)}
        if args.peer:
            ways["peer's collect_results"] = lambda: run(python(
                "-m", "domainbed.scripts.collect_results", "--input_dir", str(folder)), args.peer)
        return compare(ways, args.process_repeats)


def count_crops(data_dir: Path, cache: str | None, fast: bool, batch_size: int,
                n_batches: int = 12) -> float:
    """Augmented images of PACS per CPU second, after each domain's first batch."""
    import torch

    from domainbed_kd.run import augmentation, build, image_cache, loaders, splits

    torch.set_num_threads(1)
    dataset = datasets.get_dataset_class("PACS")(data_dir, [3], {"data_augmentation": True})
    if cache:
        image_cache.attach(dataset, Path(cache))
    if fast:
        build.keep_freed_memory()
        augmentation.speed_up(dataset)
    parts = splits.make_splits(dataset, [3], 0, 0.2)
    batches = [loaders.InfiniteDataLoader(parts.in_[i], None, batch_size, 8) for i in range(3)]

    def one_of_each():
        for loader in batches:
            x, _ = next(loader)
            if fast:
                augmentation.distorted(x)

    one_of_each()
    start = time.process_time()
    for _ in range(n_batches):
        one_of_each()
    return n_batches * 3 * batch_size / (time.process_time() - start)


def count_all_crops(data_dir: Path, repeats: int, batch_size: int) -> dict[str, float]:
    """Medians of `count_crops` by way of reading, measured alternately."""
    with tempfile.TemporaryDirectory() as cache:
        ways = {"files": (None, False), "image cache": (cache, False),
                "files, fast": (None, True), "image cache, fast": (cache, True)}
        found = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                found[name].append(count_crops(data_dir, *way, batch_size))
    return {name: statistics.median(rates) for name, rates in found.items()}


def crops(args, batch_size: int = 32) -> list[dict]:
    """The loader alone, with and without a cache of decoded images, exact and fast."""
    medians = apart(count_all_crops, args.data_dir, args.process_repeats, batch_size)
    return [{"what": name, "crops per CPU s": rate, "times as many": rate / medians["files"]}
            for name, rate in medians.items()]


def footprint(argv: list[str], threads: int) -> dict:
    """A command's largest number of simultaneous processes, and their peak memory together in MB.

    A page that several share counts once, and so does shared memory that none has mapped.
    """
    def shared_memory():
        used = os.statvfs("/dev/shm")
        return (used.f_blocks - used.f_bfree) * used.f_frsize / 1024**2

    most, before = {"processes": 0, "MB of all": 0.0}, shared_memory()
    own = descendants(os.getpid())  # such as Python's resource tracker
    with multiprocessing.pool.ThreadPool(1) as pool:
        ended = pool.apply_async(run, (argv, ROOT, threads))
        while not ended.ready():
            started = [pid for pid in descendants(os.getpid()) if pid not in own]
            held = [mb for mb in map(own_memory, started) if mb]
            mb = sum(held) + max(shared_memory() - before, 0)
            most = {"processes": max(most["processes"], len(held)),
                    "MB of all": max(most["MB of all"], mb)}
            ended.wait(1)
        ended.get()
    return most


def descendants(pid: int) -> list[int]:
    """A process's children, their children, and so on."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def own_memory(pid: int) -> float:
    """A process's MB with its share of shared pages, without shared memory; 0 if it has ended."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        fields = dict(line.split(":") for line in
                      Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        return sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_File")) / 1024
    return 0.0


def pacs(args) -> list[dict]:
    """Whole short runs: the plain loop, exact mode and fast mode, both with an image cache."""
    hparams = json.dumps({"resnet18": True, "resnet50_augmix": False, "weights": "none",
                          "batch_size": 8})
    data_dir = str(args.data_dir.resolve())
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def plain(steps):
            return python(str(ROOT / "tools" / "plain_loop.py"), data_dir, hparams, str(steps))

        def train(*flags, steps):
            shutil.rmtree(folder / "run", ignore_errors=True)
            return python(
                "-m", "domainbed_kd.scripts.train", "--dataset", "PACS", "--test_envs", "3",
                "--data_dir", data_dir, "--steps", str(steps), "--checkpoint_freq", str(steps),
                "--skip_model_save", "--hparams", hparams, "--output_dir", str(folder / "run"),
                *flags)

        cache = ["--image_cache", str(folder / "cache")]
        commands = {"plain loop, 8 workers per loader": plain,
                    "exact, image cache": functools.partial(train, *cache),
                    "fast, image cache": functools.partial(train, *cache, "--fast")}
        held = {name: footprint(command(steps=3), threads) for name, command in commands.items()}
        rows = compare({name: lambda command=command: run(command(steps=args.pacs_steps),
                                                          threads=threads)
                        for name, command in commands.items()}, args.process_repeats)
    return [{**row, "times as fast": 1 / row["of first"], **held[row["what"]]} for row in rows]


SECTIONS = {"start": start, "updates": updates, "sweep": sweep, "collect": collect,
            "crops": crops, "pacs": pacs}
NEED_IMAGES = ("crops", "pacs")


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measures each section; prints the tables, and writes them and JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS,
                        help=f"default: {' '.join(SECTIONS)}, or those without images if there "
                             "is no --data_dir")
    parser.add_argument("--data_dir", type=Path, metavar="DIR",
                        help="folder that holds PACS, for crops and pacs")
    parser.add_argument("--pacs_steps", type=int, default=30, metavar="N",
                        help="updates of a run of pacs; default: 30")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME",
                        help=f"for updates; default: {' '.join(METHODS)}")
    parser.add_argument("--batch_size", type=int, default=16,
                        help="images for each of three domains, in updates; default: 16")
    parser.add_argument("--repeats", type=int, default=30, help="timed updates; default: 30")
    parser.add_argument("--process_repeats", type=int, default=3, metavar="N",
                        help="how often each process is timed; default: 3")
    parser.add_argument("--runs", type=int, default=20_000,
                        help="runs of the sweep that collect reads; default: 20000")
    parser.add_argument("--peer", type=Path, metavar="DIR",
                        help="a DomainBed checkout that does the same work alternately")
    parser.add_argument("--output", type=Path, default=Path("bench"),
                        help="OUTPUT.json and OUTPUT.md are written; default: bench")
    args = parser.parse_args(argv)
    if args.peer and not (args.peer / "domainbed" / "scripts").is_dir():
        raise FileNotFoundError(f"--peer {args.peer}: there is no domainbed/scripts in it.")
    chosen = args.only or [s for s in SECTIONS if args.data_dir or s not in NEED_IMAGES]
    if not args.data_dir and set(chosen) & set(NEED_IMAGES):
        raise ValueError("crops and pacs need images. Pass --data_dir, a folder that holds PACS.")
    tables = {}
    for name in chosen:
        tables[name] = SECTIONS[name](args)
        print(f"## {name}\n\n{markdown(tables[name])}", flush=True)
    args.output.with_suffix(".json").write_text(json.dumps(tables, indent=1) + "\n")
    args.output.with_suffix(".md").write_text("\n".join(
        f"## {name}\n\n{markdown(rows)}" for name, rows in tables.items()))
    return 0


if __name__ == "__main__":
    run_main(main)
