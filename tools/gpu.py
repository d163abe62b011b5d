"""Measures how well we use this machine's GPU, in one command without a network.

    make gpu [DATA=DIR] [PEER=DIR]       or       python tools/gpu.py --data_dir DIR --peer DIR

tests: the tests marked `cuda`.
card: the bounds, with images already on the card: ERM's update and forward pass with a ResNet-50,
3 x 32 images of 224 pixels, in float32 (convolutions in TF32, torch's default) and in bfloat16 with
channels last.
pacs: a run of `train` on PACS with 300 steps and 2 evaluations, exact and with --fast; then steps
and evaluations of such runs, with all cores and with four, compared with these bounds. With --peer,
a DomainBed checkout makes the same run; the exact run's records must equal its records, except for
times and memory.
teachers: updates of methods with a frozen teacher, in fast mode, compared with ERM's fast update
plus the teacher's own forward pass.
sweep: four jobs with `multi_gpu`, one, two and four at a time.
small: a DigitsDG sweep of 36 jobs, twelve at a time, compared with as many runs one after another.

Every ratio's two figures are from this run. Writes gpu.json and gpu.md. pacs needs --data_dir,
the folder that holds PACS; skipped measurements are listed.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from domainbed_kd import algorithms, datasets, hparams_registry, machine
from domainbed_kd.console import Parser, run_main

ROOT = Path(__file__).parents[1]
SECTIONS = ("tests", "card", "pacs", "teachers", "sweep", "small")
# DomainBed's plain ResNet-50, with weights from the folder that `offline_weights` fills.
PLAIN = {"resnet50_augmix": False}
TEACHERS = ("KD", "SCMD", "RISE")
# Keys in which the records of two equal runs differ.
UNLIKE = ("step_time", "mem_gb", "args")


class Sizes:
    """How much is measured; --quick is for trying the tool without a GPU."""

    def __init__(self, quick: bool):
        self.side, self.batch_size, self.steps = (64, 2, 2) if quick else (224, 32, 300)
        self.updates, self.forwards, self.images = (2, 2, 8) if quick else (40, 40, 256)
        self.sweep_steps, self.backbone = (2, "resnet18") if quick else (60, "resnet50")


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a CUDA test or job fails, or the peer's records differ."""
    parser = Parser(prog="python tools/gpu.py", description=__doc__)
    parser.add_argument("--data_dir", metavar="DIR", help="folder that holds PACS")
    parser.add_argument("--peer", metavar="DIR", help="a DomainBed checkout to compare with")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS),
                        help="what to measure; default: everything")
    parser.add_argument("--output", metavar="DIR", default=".", help="folder for gpu.json, gpu.md")
    parser.add_argument("--quick", action="store_true",
                        help="a few small steps on any device, to try the tool")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available() and not args.quick:
        raise ValueError(f"torch {torch.__version__} sees no GPU here. Run this on a GPU machine, "
                         "or pass --quick to try the tool.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(device)
    sizes = Sizes(args.quick)
    with tempfile.TemporaryDirectory() as folder, offline_weights(Path(folder), sizes):
        for section in args.only:
            start = time.monotonic()
            globals()[f"measure_{section}"](report, args, sizes, device, Path(folder))
            print(f"{section}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    report.write(Path(args.output))
    return 1 if report.failures else 0


class Report:
    """The figures as rows of (what, figure, unit, bound, ratio, bar), failures and omissions."""

    def __init__(self, device):
        import torch
        import torchvision

        name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
        self.about = {
            "card": name, "cores": machine.available(), "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "cudnn": torch.backends.cudnn.version()}
        self.rows: list[dict] = []
        self.found: dict[str, float] = {}
        self.failures: list[str] = []
        self.skipped: list[str] = []

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

    def write(self, folder: Path) -> None:
        """Writes gpu.json and gpu.md, and prints the latter."""
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
        print(text, end="")


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


def python(*words: str, cwd: Path = ROOT) -> tuple[float, str, int]:
    """Seconds, output (stdout, then stderr) and status of a Python command."""
    start = time.monotonic()
    ran = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                         text=True)
    return time.monotonic() - start, ran.stdout + ran.stderr, ran.returncode


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
    seconds, output, status = python("-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider",
                                     *beside, ROOT / "tests")
    count = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", output)}
    report.add("cuda_tests", "CUDA tests that pass", count.get("passed", 0), "tests")
    if status or count.get("failed"):
        failed = re.findall(r"^FAILED (\S+)", output, re.MULTILINE)
        report.fail(f"CUDA tests: {', '.join(failed) or output[-300:]}")
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


def train_pacs(args, sizes: Sizes, output: Path, *flags: str) -> tuple[float, list[dict], str]:
    """Seconds, records and output of a run of ours on PACS."""
    seconds, said, status = python(
        "-m", "domainbed_kd.scripts.train", *pacs_flags(args, sizes), "--hparams",
        hparams_of(sizes), "--output_dir", output, *flags)
    if status:
        raise RuntimeError(said[-500:])
    return seconds, read(output), said


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
    image_cache.attach(datasets.get_dataset_class("PACS")(
        args.data_dir, [3], {"data_augmentation": False}), folder / "cache")
    if args.peer:
        measure_peer(report, args, sizes, folder)
    for mode, flags, bar in (("exact", [], "<= 0.67"), ("fast", ["--fast"], "<= 0.25")):
        try:
            seconds, records, _ = train_pacs(args, sizes, folder / mode, *cache, *flags)
        except RuntimeError as error:
            report.fail(f"a run on PACS, {mode}: {error}")
            continue
        report.add(f"{mode}_run", f"a run of {sizes.steps} steps and 2 evaluations, {mode}",
                   seconds, "s", "peer_run", bar)
        if mode == "exact" and args.peer and (odd := differences(records, read(folder / "peer"))):
            report.fail(f"records of the exact run differ from the peer's in {', '.join(odd)}")
    for mode, cores, bar in (("exact", None, "<= 1.1"), ("fast", None, "<= 1.15"),
                             ("fast", 4, "<= 1.3")):
        measure_loop(report, args, sizes, device, folder, mode, cores, bar)


def measure_loop(report: Report, args, sizes: Sizes, device, folder: Path, mode: str,
                 cores: int | None, bar: str) -> None:
    """A run's step, including loaders, and its evaluation, after a warm-up."""
    from domainbed_kd.folder import args as flags
    from domainbed_kd.run import build, evaluation, training

    everything = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, sorted(everything)[:cores])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run = build.build(flags.on_record(argparse.Namespace(**flags.of_words([
                *pacs_flags(args, sizes), "--hparams", hparams_of(sizes), "--output_dir",
                str(folder), *(["--fast"] if mode == "fast" else [])]))),
                cache_folder=str(folder / "cache"))
        where = " on four cores" if cores else ""
        with run.readers:
            report.add(f"{mode}_step{cores or ''}", f"a step, {mode}{where}", 1000 * seconds_each(
                functools.partial(training.update, run, None), sizes.updates, device),
                "ms", "fp32_step" if mode == "exact" else "bf16_step", bar)
            if cores:
                return
            evaluator = evaluation.Evaluator(run)
            sizes_of = {f"env{i}_{kind}": len(split) for kind, splits in (
                ("in", run.splits.in_), ("out", run.splits.out)) for i, split in enumerate(splits)}
            n = sum(sizes_of[name] for name in evaluator.evaluated)
            seconds = seconds_each(functools.partial(evaluator.accuracies, 0), 1, device)
            report.add(f"{mode}_evaluation", f"evaluation, {mode}", n / seconds, "images/s",
                       "fp32_forward" if mode == "exact" else "bf16_forward",
                       ">= 0.6" if mode == "fast" else "")
    finally:
        os.sched_setaffinity(0, everything)


def measure_peer(report: Report, args, sizes: Sizes, folder: Path) -> None:
    """The same run by a DomainBed checkout."""
    hparams = PLAIN | {"resnet18": sizes.backbone == "resnet18", "batch_size": sizes.batch_size}
    seconds, said, status = python(
        "-m", "domainbed.scripts.train", *pacs_flags(args, sizes), "--hparams",
        json.dumps(hparams), "--output_dir", folder / "peer", cwd=Path(args.peer))
    if status:
        return report.fail(f"the peer's run: {said[-500:]}")
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

    backbone = "ViT-B-32" if sizes.side < 224 else "ViT-B-16"
    path = folder / f"{backbone}.pt"
    torch.save(open_clip.create_model(backbone, pretrained=None).state_dict(), path)
    student, minibatches, autocast = erm(sizes, True, device)
    report.add("erm_fast", "ERM's fast update", 1000 * seconds_each(
        functools.partial(update, student, minibatches, autocast), sizes.updates, device), "ms")
    x = torch.cat([x for x, _ in minibatches])
    for name in TEACHERS:
        context = {"dataset": "PACS", "test_envs": [3], "total_steps": 5001, "class_names": [
            "dog", "elephant", "giraffe", "guitar", "horse", "house", "person"],
            "normalization": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            "teacher": erm(sizes, False, device)[0]}
        hparams = hparams_registry.default_hparams(name, "PACS") | PLAIN | context | {
            "resnet18": sizes.backbone == "resnet18", "batch_size": sizes.batch_size}
        if "clip_backbone" in hparams:
            hparams["clip_backbone"] = f"{backbone}/{path}"
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


def digits(sizes: Sizes) -> list[str]:
    """Flags that a run and a sweep of small runs share."""
    return ["--steps", str(sizes.sweep_steps), "--checkpoint_freq", str(sizes.sweep_steps),
            "--hparams", '{"wrn_depth": 10, "wrn_widen": 1, "batch_size": 16}',
            "--skip_model_save"]


def sweep(report: Report, sizes: Sizes, output: Path, device, *flags: str) -> float | None:
    """Seconds of a DigitsDG sweep; None, and a failure, unless all jobs are done."""
    seconds, said, status = python(
        "-m", "domainbed_kd.scripts.sweep", "launch", "--datasets", "DigitsDG", "--n_trials", "1",
        "--single_test_envs", *digits(sizes), "--skip_confirmation", "--command_launcher",
        "multi_gpu" if device.type == "cuda" else "local", "--output_dir", output, *flags)
    jobs = [path for path in output.iterdir() if path.is_dir()] if output.is_dir() else []
    if status or not all((job / "done").exists() for job in jobs):
        report.fail(f"sweep {' '.join(map(str, flags))}: {said.strip().splitlines()[-1:]}")
        return None
    return seconds


def measure_sweep(report: Report, args, sizes: Sizes, device, folder: Path) -> None:
    """Several jobs at a time on one card."""
    for n in (1, 2, 4):
        seconds = sweep(report, sizes, folder / f"four{n}", device, "--algorithms", "ERM",
                        "--n_hparams", "1", "--jobs_per_device", n)
        if seconds:
            report.add(f"four{n}", f"four DigitsDG jobs, {n} at a time", seconds, "s",
                       "four1" if n > 1 else None)


def measure_small(report: Report, args, sizes: Sizes, device, folder: Path) -> None:
    """A sweep of small runs."""
    algorithms, n_hparams = ("ERM", "CORAL", "SD"), 1 if sizes.steps <= 2 else 3
    n_jobs, seconds = 4 * len(algorithms) * n_hparams, 0
    for name in algorithms:
        took, said, status = python(
            "-m", "domainbed_kd.scripts.train", "--dataset", "DigitsDG", "--algorithm", name,
            *digits(sizes), "--output_dir", folder / "alone" / name)
        seconds += took
        if status:
            return report.fail(f"a run of {name} on DigitsDG: {said[-500:]}")
    report.add("alone", f"{n_jobs} DigitsDG runs one after another, from three",
               seconds * n_jobs / len(algorithms), "s")
    took = sweep(report, sizes, folder / "many", device, "--algorithms", *algorithms,
                 "--n_hparams", n_hparams, "--jobs_per_device", 12)
    if took:
        report.add("many", f"a sweep of {n_jobs} DigitsDG jobs, twelve at a time", took, "s",
                   "alone", "<= 0.2")


if __name__ == "__main__":
    run_main(main)
