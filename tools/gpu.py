"""Measures how well we use this machine's GPU, in one command without a network.

    make gpu [DATA=DIR] [PEER=DIR]       or       python tools/gpu.py --data_dir DIR --peer DIR

It keeps within --minutes (6): sections run in the order below, what has not begun by then is
skipped, and a command that is still running is stopped. A section that fails leaves the others
alone. The report is written after each section; it lists what failed and what was skipped.

tests: the tests marked `cuda`.
card: the bounds, with images already on the card: ERM's update and forward pass with a ResNet-50,
3 x 32 images of 224 pixels, in float32 (convolutions in TF32, torch's default) and in bfloat16 with
channels last.
pacs: a run of `train` on PACS with 300 steps and 2 evaluations, exact and with --fast; then steps
and evaluations of such runs, with all cores and with four, compared with these bounds. The loaders
read 8 steps ahead, so at most 1 in 20 of the timed steps was read before. With --peer,
a DomainBed checkout makes the same run; the exact run's records must equal its records, except for
times and memory.
teachers: updates of methods with a frozen teacher, in fast mode, compared with ERM's fast update
plus the teacher's own forward pass. SCMD keeps all images, not the hardest fifth, and VL2V-ADiP is
in the stage in which its student learns, so that both see the same images.
sweep: four jobs with `multi_gpu`, one, two and four at a time.
small: a DigitsDG sweep of 36 jobs, twelve at a time, compared with as many runs one after another.

Every ratio's two figures are from this run. Writes gpu.json and gpu.md. pacs needs --data_dir,
the folder that holds PACS.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from domainbed_kd import algorithms, datasets, hparams_registry, machine
from domainbed_kd.console import Parser, one_line, run_main

ROOT = Path(__file__).parents[1]
SECTIONS = ("tests", "card", "pacs", "teachers", "sweep", "small")
# DomainBed's plain ResNet-50, with weights from the folder that `offline_weights` fills.
PLAIN = {"resnet50_augmix": False}
TEACHERS = ("KD", "SCMD", "RISE", "VL2VADiP")
# With these, the student and the teacher see every image of an update.
ALL_IMAGES = {"scmd_worst_case": 1.0, "vl2v_align_steps": 0}
# Keys in which the records of two equal runs differ.
UNLIKE = ("step_time", "mem_gb", "args")


class Sizes:
    """How much is measured; --quick is for trying the tool without a GPU."""

    def __init__(self, quick: bool):
        self.side, self.batch_size, self.steps = (64, 2, 2) if quick else (224, 32, 300)
        self.updates, self.forwards, self.images = (2, 2, 8) if quick else (40, 40, 256)
        self.loop_steps = 2 if quick else 160
        self.sweep_steps, self.backbone = (2, "resnet18") if quick else (60, "resnet50")
        self.clip = "tiny" if quick else "ViT-B-16"
        # Small runs: dataset, images per domain, algorithms, their draws, numbers of jobs at once.
        self.small, self.small_batch, self.small_algorithms, self.n_hparams, self.at_once = (
            ("Debug28", 4, ("ERM",), 1, (1, 2)) if quick else
            ("DigitsDG", 16, ("ERM", "CORAL", "SD"), 3, (1, 2, 4)))


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes; 1 if anything failed or the peer's records differ."""
    args = parse(argv)
    import torch

    device = machine.device()
    if device.type == "cpu" and not args.quick:
        raise ValueError(f"torch {torch.__version__} sees no GPU here. Run this on a GPU machine, "
                         "or pass --quick to try the tool.")
    sizes = Sizes(args.quick)
    if args.step_of:
        print(fast_step(args, sizes, device, Path(args.step_of)))
        return 0
    report = Report(device, args.minutes)
    report.write(Path(args.output))
    with tempfile.TemporaryDirectory() as folder, offline_weights(Path(folder), sizes):
        for section in args.only:
            if report.seconds_left() <= 0:
                report.skip(f"{section}: {args.minutes:g} minutes were over. Pass --only {section},"
                            " or more --minutes.")
                continue
            measure(section, report, args, sizes, device, Path(folder))
            report.write(Path(args.output))
    print(report.write(Path(args.output)), end="")
    return 1 if report.failures else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; refuses folders that lack what is to be measured there."""
    parser = Parser(prog="python tools/gpu.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", metavar="DIR", help="folder that holds PACS")
    parser.add_argument("--peer", metavar="DIR", help="a DomainBed checkout to compare with")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS),
                        help="what to measure; default: everything")
    parser.add_argument("--minutes", type=float, default=6, metavar="M",
                        help="how long it may take; default: 6")
    parser.add_argument("--output", metavar="DIR", default=".", help="folder for gpu.json, gpu.md")
    parser.add_argument("--quick", action="store_true",
                        help="a few small steps on any device, to try the tool")
    parser.add_argument("--step_of", metavar="CACHE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise ValueError(f"--minutes is {args.minutes:g}. Pass a number above 0.")
    if args.peer and not Path(args.peer, "domainbed", "scripts", "train.py").is_file():
        raise FileNotFoundError(f"--peer {args.peer}: there is no domainbed/scripts/train.py in "
                                "it. Pass a DomainBed checkout.")
    if args.peer and not args.data_dir:
        raise ValueError("--peer trains on PACS. Pass --data_dir, the folder that holds it.")
    if args.data_dir:
        pacs(args)
    return args


def pacs(args):
    """The dataset; an error from reading it names --data_dir."""
    cls = datasets.get_dataset_class("PACS")
    if not os.path.isdir(folder := cls.folder(args.data_dir)):
        raise FileNotFoundError(f"--data_dir {args.data_dir}: there is no folder {folder}. Pass "
                                "the folder that holds PACS.")
    return cls(args.data_dir, [3], {"data_augmentation": False})


def measure(section: str, report: "Report", args, sizes: Sizes, device, folder: Path) -> None:
    """Measures a section; an error in it is a failure, and the next section can begin."""
    import torch

    start = time.monotonic()
    try:
        globals()[f"measure_{section}"](report, args, sizes, device, folder)
    except Exception as error:
        said = one_line(error).removeprefix("error: ")
        report.fail(f"{section}: {type(error).__name__}: {said[:500]}")
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after some errors CUDA refuses everything
            torch.cuda.empty_cache()
    print(f"{section}: {time.monotonic() - start:.0f} s", file=sys.stderr)


class Report:
    """The figures as rows of (what, figure, unit, bound, ratio, bar), failures and omissions."""

    def __init__(self, device, minutes: float = 6):
        import torch
        import torchvision

        name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
        self.about = {
            "card": name, "cores": machine.available(), "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "cudnn": torch.backends.cudnn.version()}
        self._end = time.monotonic() + 60 * minutes
        self.rows: list[dict] = []
        self.found: dict[str, float] = {}
        self.failures: list[str] = []
        self.skipped: list[str] = []

    def seconds_left(self) -> float:
        """Seconds until --minutes are over."""
        return self._end - time.monotonic()

    def add(self, key: str, what: str, figure: float, unit: str, of: str | None = None,
            bar: str = "") -> None:
        """Adds a row; the ratio is to the figure with the key `of`, if that was measured."""
        self.found[key] = figure
        ratio = figure / self.found[of] if of in self.found else None
        self.rows.append({"key": key, "what": what, "figure": figure, "unit": unit, "of": of,
                          "ratio": ratio, "bar": bar})
        print(f"{what}: {figure:.4g} {unit}"
              + (f", {ratio:.2f} of {of}" if ratio is not None else ""), file=sys.stderr)

    def fail(self, what: str) -> None:
        """Reports a failure."""
        self.failures.append(what)
        print(f"FAILED: {what}", file=sys.stderr)

    def skip(self, what: str) -> None:
        """Reports something that could not be measured here."""
        self.skipped.append(what)
        print(f"skipped: {what}", file=sys.stderr)

    def write(self, folder: Path) -> str:
        """Writes gpu.json and gpu.md; returns the latter's text."""
        names = {row["key"]: row["what"] for row in self.rows}
        lines = [", ".join(f"{name} {value}" for name, value in self.about.items()), "",
                 "| what | figure | ratio | bar |", "|---|---|---|---|"]
        for row in self.rows:
            ratio = ("" if row["ratio"] is None else
                     f"{row['ratio']:.2f} of {names[row['of']]}")
            lines.append(f"| {row['what']} | {row['figure']:.4g} {row['unit']} | {ratio} | "
                         f"{row['bar']} |")
        lines += [f"- FAILED: {what}" for what in self.failures]
        lines += [f"- skipped: {what}" for what in self.skipped]
        text = "\n".join(lines) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.md").write_text(text, encoding="utf-8")
        (folder / "gpu.json").write_text(json.dumps(
            {"about": self.about, "rows": self.rows, "failures": self.failures,
             "skipped": self.skipped}, indent=1) + "\n", encoding="utf-8")
        return text


@contextlib.contextmanager
def offline_weights(folder: Path, sizes: Sizes) -> Iterator[None]:
    """Inside, torchvision finds random ResNet weights on disk, so that it needs no network."""
    import torch
    from torchvision import models

    hub = folder / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    torch.manual_seed(0)
    for name in {sizes.backbone, "resnet50"} if sizes.backbone == "resnet50" else {"resnet18"}:
        url = models.get_model_weights(name).IMAGENET1K_V1.url
        torch.save(getattr(models, name)(weights=None).state_dict(), hub / Path(url).name)
    before = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_HOME"]
        else:
            os.environ["TORCH_HOME"] = before


def python(report: Report, *words: str, cwd: Path = ROOT) -> tuple[float, str, int]:
    """Seconds, output (stdout, then stderr) and status of a Python command.

    Raises:
        TimeoutError: if it is still running when --minutes are over; it is killed.
    """
    start = time.monotonic()
    ran = subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = ran.communicate(timeout=max(1, report.seconds_left()))
    except BaseException as error:
        os.killpg(ran.pid, signal.SIGKILL)  # with the processes that it started
        ran.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"stopped after {time.monotonic() - start:.0f} s, as --minutes were "
                               f"over: python {' '.join(map(str, words[:4]))}") from None
        raise
    return time.monotonic() - start, out + err, ran.returncode


def last_line(said: str) -> str:
    """The last line of a command's output, where errors are."""
    return said.strip().rpartition("\n")[2][-500:]


@contextlib.contextmanager
def bound(cores: int) -> Iterator[None]:
    """Inside, this thread and the processes that it starts are bound to so many cores."""
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everything)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, everything)


def seconds_each(call: Callable[[], object], n: int, device) -> float:
    """Seconds per call, over n calls after a few others; waits for the card before and after."""
    import torch

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(min(n, 5)):
        call()
    wait()
    start = time.perf_counter()
    for _ in range(n):
        call()
    wait()
    return (time.perf_counter() - start) / n


def measure_tests(report: Report, args, sizes: Sizes, device, folder: Path) -> None:
    """The tests marked `cuda`."""
    beside = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    seconds, output, status = python(report, "-m", "pytest", "-q", "-m", "cuda", "-p",
                                     "no:cacheprovider", *beside, ROOT / "tests")
    count = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", output)}
    report.add("cuda_tests", "CUDA tests that pass", count.get("passed", 0), "tests")
    if status or count.get("failed"):
        failed = re.findall(r"^FAILED (\S+)", output, re.MULTILINE)
        report.fail(f"CUDA tests: {', '.join(failed) or last_line(output)}")
    if count.get("skipped"):
        report.skip(f"{count['skipped']} CUDA tests, as there is no GPU")


def erm(sizes: Sizes, fast: bool, device):
    """(algorithm, minibatches, precision): ERM as `train` builds it, with images on the device."""
    import torch

    from domainbed_kd.run import precision

    hparams = hparams_registry.default_hparams("ERM", "PACS") | PLAIN | {
        "resnet18": sizes.backbone == "resnet18", "batch_size": sizes.batch_size}
    shape = (3, sizes.side, sizes.side)
    torch.manual_seed(0)
    algorithm = algorithms.get_algorithm_class("ERM")(shape, 7, 3, hparams).to(device)
    algorithm = precision.laid_out(algorithm, fast)
    minibatches = [(torch.randn(sizes.batch_size, *shape, device=device),
                    torch.randint(7, (sizes.batch_size,), device=device)) for _ in range(3)]
    if fast:
        minibatches = [(x.contiguous(memory_format=torch.channels_last), y)
                       for x, y in minibatches]
    return algorithm, minibatches, functools.partial(precision.autocast, device, fast)


def update(algorithm, minibatches, autocast) -> None:
    """Makes one update."""
    with autocast():
        algorithm.update(minibatches)


def forward(predict: Callable, x, autocast) -> None:
    """Makes one pass without gradients."""
    import torch

    with torch.no_grad(), autocast():
        predict(x)


def measure_card(report: Report, args, sizes: Sizes, device, folder: Path) -> None:
    """ERM's update and forward pass on images on the device, which bound every loop."""
    import torch

    for fast, words in ((False, "float32"), (True, "bfloat16, channels last")):
        algorithm, minibatches, autocast = erm(sizes, fast, device)
        key = "bf16" if fast else "fp32"
        report.add(f"{key}_step", f"the card's own step, {words}", 1000 * seconds_each(
            functools.partial(update, algorithm, minibatches, autocast), sizes.updates, device),
            "ms")
        x = torch.randn(sizes.images, 3, sizes.side, sizes.side, device=device)
        algorithm.eval()
        seconds = seconds_each(functools.partial(forward, algorithm.predict, x, autocast),
                               sizes.forwards, device)
        report.add(f"{key}_forward", f"the card's own forward pass, {words}",
                   sizes.images / seconds, "images/s")


def hparams_of(sizes: Sizes) -> str:
    """The --hparams of runs on PACS."""
    hparams = PLAIN | {"resnet18": sizes.backbone == "resnet18", "batch_size": sizes.batch_size}
    return json.dumps(hparams | ({} if sizes.side == 224 else {"image_size": sizes.side}))


def train_pacs(report: Report, args, sizes: Sizes, output: Path, *flags: str
               ) -> tuple[float, list[dict]]:
    """Seconds and records of a run of ours on PACS."""
    seconds, said, status = python(
        report, "-m", "domainbed_kd.scripts.train", *pacs_flags(args, sizes), "--hparams",
        hparams_of(sizes), "--output_dir", output, *flags)
    if status:
        raise RuntimeError(last_line(said))
    return seconds, read(output)


def pacs_flags(args, sizes: Sizes) -> list[str]:
    """Flags that the peer's `train` has too."""
    return ["--data_dir", os.path.abspath(args.data_dir), "--dataset", "PACS", "--algorithm", "ERM",
            "--test_envs", "3", "--steps", str(sizes.steps), "--checkpoint_freq", str(sizes.steps),
            "--skip_model_save"]


def read(output: Path) -> list[dict]:
    """A run's records."""
    lines = (output / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def measure_pacs(report: Report, args, sizes: Sizes, device, folder: Path) -> None:
    """Whole runs on PACS, ours and the peer's."""
    if not args.data_dir:
        return report.skip("pacs: it needs --data_dir, the folder that holds PACS")
    from domainbed_kd.run import image_cache

    cache = ["--image_cache", str(folder / "cache")]
    image_cache.attach(pacs(args), folder / "cache")
    if args.peer:
        measure_peer(report, args, sizes, folder)
    for mode, flags, bar in (("exact", [], "<= 0.67"), ("fast", ["--fast"], "<= 0.25")):
        try:
            seconds, records = train_pacs(report, args, sizes, folder / mode, *cache, *flags)
        except RuntimeError as error:
            report.fail(f"a run on PACS, {mode}: {error}")
            continue
        report.add(f"{mode}_run", f"a run of {sizes.steps} steps and 2 evaluations, {mode}",
                   seconds, "s", "peer_run", bar)
        if mode == "exact" and "peer_run" in report.found and (
                odd := differences(records, read(folder / "peer"))):
            report.fail(f"records of the exact run differ from the peer's in {', '.join(odd)}")
    for mode, of, bar in (("exact", "fp32", "<= 1.1"), ("fast", "bf16", "<= 1.15")):
        measure_loop(report, args, sizes, device, folder, mode, of, bar)
    with bound(4):  # a process of its own, as CUDA's threads in this one keep all cores
        _, said, status = python(
            report, ROOT / "tools" / "gpu.py", "--step_of", folder / "cache", "--data_dir",
            os.path.abspath(args.data_dir), *["--quick"] * args.quick)
    if status:
        return report.fail(f"a fast step on four cores: {last_line(said)}")
    report.add("fast_step4", "a step, fast, on four cores", float(said.split()[0]), "ms",
               "bf16_step", "<= 1.3")


def built(args, sizes: Sizes, cache: Path, mode: str):
    """A run on PACS, ready for its first step."""
    from domainbed_kd.folder import args as flags
    from domainbed_kd.run import build

    words = [*pacs_flags(args, sizes), "--hparams", hparams_of(sizes), "--output_dir",
             str(cache.parent), *["--fast"] * (mode == "fast")]
    with contextlib.redirect_stdout(io.StringIO()):
        return build.build(flags.on_record(argparse.Namespace(**flags.of_words(words))),
                           cache_folder=str(cache))


def step_ms(run, sizes: Sizes, device) -> float:
    """Milliseconds of a run's step, including loaders."""
    from domainbed_kd.run import training

    return 1000 * seconds_each(functools.partial(training.update, run, None), sizes.loop_steps,
                               device)


def fast_step(args, sizes: Sizes, device, cache: Path) -> float:
    """Milliseconds of a fast step in this process."""
    run = built(args, sizes, cache, "fast")
    with run.readers:
        return step_ms(run, sizes, device)


def measure_loop(report: Report, args, sizes: Sizes, device, folder: Path, mode: str, of: str,
                 bar: str) -> None:
    """A run's step, including loaders, and its evaluation, after a warm-up."""
    from domainbed_kd.run import evaluation

    run = built(args, sizes, folder / "cache", mode)
    with run.readers:
        report.add(f"{mode}_step", f"a step, {mode}", step_ms(run, sizes, device), "ms",
                   f"{of}_step", bar)
        evaluator = evaluation.Evaluator(run)
        sizes_of = {f"env{i}_{kind}": len(split) for kind, splits in (
            ("in", run.splits.in_), ("out", run.splits.out)) for i, split in enumerate(splits)}
        n = sum(sizes_of[name] for name in evaluator.evaluated)
        seconds = seconds_each(functools.partial(evaluator.accuracies, 0), 1, device)
        report.add(f"{mode}_evaluation", f"evaluation, {mode}", n / seconds, "images/s",
                   f"{of}_forward", ">= 0.6" if mode == "fast" else "")


def measure_peer(report: Report, args, sizes: Sizes, folder: Path) -> None:
    """The same run by a DomainBed checkout."""
    hparams = PLAIN | {"resnet18": sizes.backbone == "resnet18", "batch_size": sizes.batch_size}
    seconds, said, status = python(
        report, "-m", "domainbed.scripts.train", *pacs_flags(args, sizes), "--hparams",
        json.dumps(hparams), "--output_dir", folder / "peer", cwd=Path(args.peer))
    if status:
        return report.fail(f"the peer's run: {last_line(said)}")
    report.add("peer_step", "a step of the peer's train",
               1000 * read(folder / "peer")[-1]["step_time"], "ms", "fp32_step")
    report.add("peer_run", f"the peer's run of {sizes.steps} steps", seconds, "s")


def differences(ours: list[dict], theirs: list[dict]) -> list[str]:
    """The keys in which two runs' records differ, except those in UNLIKE."""
    if len(ours) != len(theirs):
        return [f"their number ({len(ours)} and {len(theirs)})"]
    names = dict.fromkeys(name for record in (*ours, *theirs) for name in record)
    return [name for name in names if name not in UNLIKE and any(
        our.get(name) != their.get(name) for our, their in zip(ours, theirs))]


def measure_teachers(report: Report, args, sizes: Sizes, device, folder: Path) -> None:
    """Fast updates of methods with a frozen teacher, and ERM's plus the teacher's forward pass."""
    import open_clip
    import torch

    from domainbed_kd.run import precision

    clip = sizes.clip
    if clip != "tiny":  # random weights, from disk as real ones
        path = folder / f"{clip}.pt"
        torch.save(open_clip.create_model(clip, pretrained=None).state_dict(), path)
        clip = f"{clip}/{path}"
    student, minibatches, autocast = erm(sizes, True, device)
    report.add("erm_fast", "ERM's fast update", 1000 * seconds_each(
        functools.partial(update, student, minibatches, autocast), sizes.updates, device), "ms")
    x = torch.cat([x for x, _ in minibatches])
    for name in TEACHERS:
        context = {"dataset": "PACS", "test_envs": [3], "total_steps": 5001, "class_names": [
            "dog", "elephant", "giraffe", "guitar", "horse", "house", "person"],
            "normalization": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            "teacher": erm(sizes, False, device)[0]}
        hparams = hparams_registry.default_hparams(name, "PACS") | PLAIN | context | ALL_IMAGES | {
            "resnet18": sizes.backbone == "resnet18", "batch_size": sizes.batch_size}
        if "clip_backbone" in hparams:
            hparams["clip_backbone"] = clip
        torch.manual_seed(0)
        method = algorithms.get_algorithm_class(name)(x.shape[1:], 7, 3, hparams).to(device)
        method = precision.laid_out(method, True)
        seconds = seconds_each(functools.partial(forward, method.teacher_logits, x, autocast),
                               sizes.forwards, device)
        report.add(f"{name}_floor", f"ERM's fast update and {name}'s teacher's forward pass",
                   report.found["erm_fast"] + 1000 * seconds, "ms")
        report.add(f"{name}_fast", f"{name}'s fast update", 1000 * seconds_each(
            functools.partial(update, method, minibatches, autocast), sizes.updates, device),
            "ms", f"{name}_floor", "<= 1.15")


def small_runs(sizes: Sizes) -> list[str]:
    """Flags that a small run and a sweep of such runs share."""
    return ["--steps", str(sizes.sweep_steps), "--checkpoint_freq", str(sizes.sweep_steps),
            "--hparams", json.dumps({
                "wrn_depth": 10, "wrn_widen": 1, "batch_size": sizes.small_batch}),
            "--skip_model_save"]


def n_envs(sizes: Sizes) -> int:
    """The number of test environments, and so of jobs, of an algorithm on the small dataset."""
    return len(datasets.get_dataset_class(sizes.small).ENVIRONMENTS)


def sweep(report: Report, sizes: Sizes, output: Path, device, *flags: str) -> float | None:
    """Seconds of a sweep of small runs; None, and a failure, unless all jobs are done."""
    seconds, said, status = python(
        report, "-m", "domainbed_kd.scripts.sweep", "launch", "--datasets", sizes.small,
        "--n_trials", "1", "--single_test_envs", *small_runs(sizes), "--skip_confirmation",
        "--command_launcher", "multi_gpu" if device.type == "cuda" else "local", "--output_dir",
        output, *flags)
    jobs = [path for path in output.iterdir() if path.is_dir()] if output.is_dir() else []
    if status or not all((job / "done").exists() for job in jobs):
        report.fail(f"sweep {' '.join(map(str, flags))}: {last_line(said)}")
        return None
    return seconds


def measure_sweep(report: Report, args, sizes: Sizes, device, folder: Path) -> None:
    """Several jobs at a time on one card."""
    for n in sizes.at_once:
        seconds = sweep(report, sizes, folder / f"four{n}", device, "--algorithms", "ERM",
                        "--n_hparams", "1", "--jobs_per_device", n)
        if seconds:
            report.add(f"four{n}", f"{n_envs(sizes)} {sizes.small} jobs, {n} at a time", seconds,
                       "s", "four1" if n > 1 else None)


def measure_small(report: Report, args, sizes: Sizes, device, folder: Path) -> None:
    """A sweep of small runs."""
    algorithms, seconds = sizes.small_algorithms, 0
    n_jobs = n_envs(sizes) * len(algorithms) * sizes.n_hparams
    for name in algorithms:
        took, said, status = python(
            report, "-m", "domainbed_kd.scripts.train", "--dataset", sizes.small, "--algorithm",
            name, *small_runs(sizes), "--output_dir", folder / "alone" / name)
        seconds += took
        if status:
            return report.fail(f"a run of {name} on {sizes.small}: {last_line(said)}")
    report.add("alone", f"{n_jobs} {sizes.small} runs one after another, from {len(algorithms)}",
               seconds * n_jobs / len(algorithms), "s")
    took = sweep(report, sizes, folder / "many", device, "--algorithms", *algorithms,
                 "--n_hparams", sizes.n_hparams, "--jobs_per_device", 12)
    if took:
        report.add("many", f"a sweep of {n_jobs} {sizes.small} jobs, twelve at a time", took, "s",
                   "alone", "<= 0.2")


if __name__ == "__main__":
    run_main(main)
