"""One run, from its arguments to its last record: DomainBed's training loop, restartable.

The order in which random numbers are drawn is DomainBed's (seeds, data set, splits, loaders,
algorithm, steps), so that a run trains to the same losses from the same seeds.
"""

import contextlib
import ctypes
import functools
import math
import os
import platform
import random
import resource
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from domainbed_kd import (
    algorithms,
    averaging,
    checkpoints,
    console,
    datasets,
    hparams_registry,
    teachers,
)
from domainbed_kd.algorithms.base import forked_rng
from domainbed_kd.folder import files
from domainbed_kd.folder.args import identity
from domainbed_kd.folder.claims import STOPPED
from domainbed_kd.run import (
    augmentation,
    canonical_view,
    diagnostics,
    evaluation,
    image_cache,
    loaders,
    loggers,
    precision,
)
from domainbed_kd.seeds import seed_hash


def train(args: dict, resume: str = "auto", loader_processes: int | None = None,
          log_test_domains: bool = False, wandb: bool = False,
          cache_folder: str | None = None, teacher_cache: str | None = None) -> int:
    """Trains one algorithm and leaves results.jsonl, model.pkl, TensorBoard events and `done`.

    Args:
        args: the flags of scripts/train.py that go on record, by name.
        resume: "auto" continues an unfinished run of the same args; "never" starts afresh and
            appends to what is there, as DomainBed does.
        loader_processes: processes that read images, for all loaders together; results do not
            depend on it. None: none on a CPU, which they would take from the updates; on a GPU,
            which would wait for images, as many as the run has threads, up to DomainBed's 8.
        log_test_domains: show accuracies on the test domains in TensorBoard too.
        wandb: log to Weights & Biases too.
        cache_folder: where decoded images are kept; results do not depend on it.
        teacher_cache: folder that keeps what teachers make of images without augmentation.

    Returns:
        0 if the run is finished, `claims.STOPPED` if a signal stopped it (its state is saved).
    """
    began, folder = time.monotonic(), Path(args["output_dir"])
    if resume == "auto" and _already_finished(folder, args):
        print(f"{folder} holds this run, finished. Delete the folder, choose another --output_dir, "
              "or pass --resume never to train again.", file=sys.stderr)
        return 0

    keep_freed_memory()
    hparams = choose_hparams(args)
    print_settings("Environment", environment())
    print_settings("Args", dict(sorted(args.items())))
    print_settings("HParams", dict(sorted(hparams.items())))
    seed_everything(args["seed"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = datasets.get_dataset_class(args["dataset"])(
        args["data_dir"], args["test_envs"], hparams)
    if cache_folder:
        image_cache.attach(dataset, Path(cache_folder))
    is_fast = args.get("fast", False)
    if is_fast:
        augmentation.speed_up(dataset)
    training = [i for i in range(len(dataset)) if i not in args["test_envs"]]
    splits = make_splits(dataset, args)
    if loader_processes is None:
        loader_processes = (min(torch.get_num_threads(), dataset.N_WORKERS)
                            if device.type == "cuda" else 0)
    readers = loaders.Readers(loader_processes)
    load = make_loaders(dataset, splits, training, args, hparams, readers)
    n_steps = args["steps"] or dataset.N_STEPS
    checkpoint_freq = args["checkpoint_freq"] or dataset.CHECKPOINT_FREQ
    steps_per_epoch = min(len(split) / hparams["batch_size"] for split in splits.in_)
    algorithm = make_algorithm(args, hparams, dataset, training, n_steps).to(device)
    if hparams.get("canonical_view"):
        canonical_view.check(algorithm)
    algorithm = precision.laid_out(algorithm, is_fast)
    if args.get("compile"):
        precision.compile_featurizer(algorithm)
    autocast = functools.partial(precision.autocast, device, is_fast)
    evaluated = splits_to_keep(splits, args) if is_fast else load.evaluation
    validate = functools.partial(validation_loss, algorithm, splits, training, device)
    batches = functools.partial(
        extra_minibatches, splits, training, hparams["batch_size"], args["seed"], device,
        is_fast)

    measures = None
    if args.get("diagnostics"):
        measures = diagnostics.Diagnostics(
            algorithm, splits.out, training, functools.partial(in_order, device=device))
    kept = splits_to_keep(splits, args) if args.get("save_logits") else {}
    first_step, pending = 0, defaultdict(list)  # values since the last record, by name
    if resume == "auto":
        first_step = restore(folder, args, algorithm, load, pending, measures)
    if first_step:
        began -= seconds_before(folder, first_step)
    teacher = audit_teacher(algorithm, splits, training, device, args) if not first_step else None
    views = None
    if hparams.get("canonical_view"):
        with autocast():
            views = canonical_view.CanonicalViews(
                algorithm, [splits.in_[i] for i in training],
                functools.partial(in_order, device=device), teacher_cache,
                key=f"{device.type} {'fast' if is_fast else 'exact'}")
    header, divergence = None, Divergence(args["algorithm"])
    with stop_signals() as stopped, readers, loggers.watching(
            folder, args, hparams, first_step, log_test_domains, wandb) as logger:
        for step in console.bar(
                range(first_step, n_steps), initial=first_step, total=n_steps, unit="step"):
            start, last = time.time(), step == n_steps - 1
            minibatches = [to_device(batch, device, is_fast) for batch in map(next, load.train)]
            unlabeled = None
            if args["task"] == "domain_adaptation":
                unlabeled = [to_device(batch, device, is_fast)[0]
                             for batch in map(next, load.uda)]
            recalled = views.recalled(load.train) if views else contextlib.nullcontext()
            with autocast(), recalled:
                values = algorithm.update(minibatches, unlabeled)
            values["step_time"] = time.time() - start
            for name, value in values.items():
                pending[name].append(value)
            divergence.look(values, step)
            algorithm.checkpoint(step, last, validate, batches)
            if measures:
                measures.after_step()

            at_checkpoint = step % checkpoint_freq == 0 or last
            if at_checkpoint:
                logits = {name: [] for name in kept}
                with autocast():
                    accuracies = {
                        f"{name}_acc": accuracy(
                            algorithm, loader, device, is_fast, logits.get(name))
                        for name, loader in load.evaluation.items() if name in evaluated}
                record = {
                    "step": step, "epoch": step / steps_per_epoch,
                    **{name: float(np.mean(v)) for name, v in pending.items()},
                    **accuracies,
                    "mem_gb": peak_memory_gb(device)}
                with console.lifted():
                    header = print_record(record, header)
                    divergence.tell()
                if algorithm.selects_last:
                    record["selection"] = "last"
                if teacher:
                    record["teacher"], teacher = teacher, None  # once a run
                if measures:
                    record["diagnostics"] = measures.measure()
                if kept:
                    evaluation.save_logits(folder / files.LOGITS / f"step{step}.npz", logits, kept)
                record |= {"hparams": hparams, "args": args}
                files.append_record(folder, record)
                save_cost(folder, device, time.monotonic() - began, step + 1, divergence.first)
                logger.log(record)
                pending.clear()
                if args["save_model_every_checkpoint"]:
                    save_model(folder / f"model_step{step}.pkl", args, hparams, dataset, algorithm)
            if resume == "auto" and not last and (at_checkpoint or stopped()):
                save_state(folder, args, algorithm, load, pending, step + 1, measures)
            if stopped() and not last:
                print(f"Stopped after step {step}. The same command continues.", file=sys.stderr)
                return STOPPED
        logger.finish()
    if not args["skip_model_save"]:
        save_model(folder / files.MODEL, args, hparams, dataset, algorithm)
    files.write_atomically(folder / files.DONE, lambda path: path.write_text("done"))
    (folder / files.STATE).unlink(missing_ok=True)
    return 0


# What a run is made of, in the order in which it is made.


def choose_hparams(args: dict) -> dict:
    """Defaults or a random draw, with --hparams merged on top.

    Raises:
        ValueError: if a fork's lack what every run needs.
    """
    if args["hparams_seed"] == 0:
        hparams = hparams_registry.default_hparams(args["algorithm"], args["dataset"])
    else:
        hparams = hparams_registry.random_hparams(
            args["algorithm"], args["dataset"],
            seed_hash(args["hparams_seed"], args["trial_seed"]))
    hparams = hparams_registry.override(hparams, args["hparams"])
    if "batch_size" not in hparams:
        raise ValueError(f"{args['algorithm']}: its hparams hold no batch_size, which every run "
                         "needs. Pass --hparams '{\"batch_size\": 32}'.")
    return hparams


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next update: fresh pages from the system cost more."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets pages of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


def seed_everything(seed: int) -> None:
    """Seeds the global streams and makes cuDNN deterministic."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def make_splits(dataset, args: dict) -> loaders.Splits:
    """The run's splits.

    Raises:
        ValueError: if a test env does not exist, none is left for training, or a split is empty.
    """
    datasets.check_test_envs(args["dataset"], len(dataset), args["test_envs"])
    splits = loaders.make_splits(dataset, args["test_envs"], args["trial_seed"],
                                 args["holdout_fraction"], args["uda_holdout_fraction"])
    if args["task"] == "domain_adaptation" and not any(splits.uda):
        raise ValueError("Not enough unlabeled samples for domain adaptation. "
                         "Pass --uda_holdout_fraction, for example 0.5.")
    return splits


class Loaders(NamedTuple):
    """Endless training and unlabeled loaders, and one-pass evaluation loaders by split."""

    train: list
    uda: list
    evaluation: dict

    def all(self) -> list:
        """Every loader, in the order in which they were made."""
        return [*self.train, *self.uda, *self.evaluation.values()]


def make_loaders(dataset, splits: loaders.Splits, training: list[int], args: dict, hparams: dict,
                 readers: loaders.Readers) -> Loaders:
    """The loaders, made in DomainBed's order, since each draws from the global stream."""
    uda = [split for split in splits.uda if split is not None]
    in_weights, uda_weights = [None] * len(dataset), [None] * len(uda)
    if hparams["class_balanced"]:
        in_weights, uda_weights = [], []
        for split, out_split, uda_split in zip(*splits):
            in_weights.append(loaders.class_weights(split))
            loaders.class_weights(out_split)  # not used, but it may draw random numbers
            if uda_split is not None:
                uda_weights.append(loaders.class_weights(uda_split))

    def infinite(split, weights):
        return iter(loaders.InfiniteDataLoader(
            split, weights, hparams["batch_size"], dataset.N_WORKERS, readers))

    def one_pass(split):
        return loaders.FastDataLoader(split, 64, dataset.N_WORKERS, readers)

    train = [infinite(splits.in_[i], in_weights[i]) for i in training]
    unlabeled = [infinite(split, weights) for split, weights in zip(uda, uda_weights)]
    evaluation = {f"env{i}_{name}": one_pass(split)
                  for name, group in (("in", splits.in_), ("out", splits.out), ("uda", uda))
                  for i, split in enumerate(group)}
    return Loaders(train, unlabeled, evaluation)


def make_algorithm(args: dict, hparams: dict, dataset, training: list[int], n_steps: int):
    """The algorithm, which also learns through its hparams what it cannot know otherwise.

    Class names, the training domains' names (never the test domain's), the number of steps and
    how images were normalized are not hparams of the run and do not go on record.
    """
    context = {
        "dataset": args["dataset"], "test_envs": args["test_envs"], "total_steps": n_steps,
        "class_names": dataset.class_names, "normalization": dataset.NORMALIZATION}
    if "teacher" in args:
        context["teacher"] = args["teacher"]
    if dataset.domain_names is not None:
        context["domain_names"] = [dataset.domain_names[i] for i in training]
    cls = averaging.averaged(
        algorithms.get_algorithm_class(args["algorithm"]), hparams.get("averaging"))
    return cls(dataset.input_shape, dataset.num_classes, len(training), context | hparams)


# What a step needs.


def to_device(batch, device, is_fast: bool = False):
    """An (x, y) pair on the device; fast mode finishes there what it left of augmentation."""
    x, y = (part.to(device) for part in batch)
    return [augmentation.distorted(x) if is_fast and x.dtype == torch.uint8 else x, y]


def accuracy(algorithm, loader, device, is_fast: bool = False, kept: list | None = None) -> float:
    """Share of the loader's images, in [0, 1], whose class `predict` finds.

    A list that is given gathers each batch's (indices, labels, logits), on the CPU.
    """
    correct = total = 0
    algorithm.eval()
    with torch.no_grad():
        for batch in loader:
            x, y = to_device(batch, device, is_fast)
            logits = algorithm.predict(x)
            guess = logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0
            correct += (guess == y).sum().item()
            total += len(y)
            if kept is not None:
                kept.append((loader.indices, batch[1], logits.float().cpu()))
    algorithm.train()
    return correct / total


def splits_to_keep(splits: loaders.Splits, args: dict) -> dict[str, list[int]]:
    """{name of a split that model selection looks at: its items' numbers in their domain}."""
    return ({f"env{i}_out": split.keys for i, split in enumerate(splits.out)}
            | {f"env{i}_in": splits.in_[i].keys for i in args["test_envs"]})


def in_order(split, device) -> Iterator[tuple[Tensor, Tensor]]:
    """A split's (x, y), 64 images at a time, not augmented; no random stream moves."""
    for batch in DataLoader(datasets.plain(split), batch_size=64, generator=torch.Generator()):
        yield to_device(batch, device)


def validation_loss(algorithm, splits: loaders.Splits, training: list[int], device,
                    predict: Callable[[Tensor], Tensor]) -> float:
    """Mean over the training domains of the cross-entropy on the out-split, not augmented."""
    losses = []
    algorithm.eval()
    with torch.no_grad():
        for i in training:
            total = sum(F.cross_entropy(predict(x), y, reduction="sum").item()
                        for x, y in in_order(splits.out[i], device))
            losses.append(total / len(splits.out[i]))
    algorithm.train()
    return sum(losses) / len(losses)


def audit_teacher(algorithm, splits: loaders.Splits, training: list[int], device,
                  args: dict) -> dict | None:
    """What a method's teacher is worth on the training domains, which is also printed.

    Raises:
        ValueError: if it is worth nothing and --allow_bad_teacher is not given.
    """
    algorithm.eval()
    found = teachers.audit(
        algorithm, (batch for i in training for batch in in_order(splits.out[i], device)),
        args.get("allow_bad_teacher", False))
    algorithm.train()
    if found:
        print_settings("Teacher", found)
    return found


def extra_minibatches(splits: loaders.Splits, training: list[int], batch_size: int, seed: int,
                      device, is_fast: bool, n: int) -> Iterator[list]:
    """`n` lists of minibatches like those of training, from random streams of their own."""
    def indices(i):
        generator = torch.Generator().manual_seed(seed_hash(seed, "extra minibatches", i))
        return iter(RandomSampler(splits.in_[i], True, n * batch_size, generator=generator))

    samplers = {i: indices(i) for i in training}
    for k in range(n):
        with forked_rng():
            torch.manual_seed(seed_hash(seed, "extra augmentation", k))
            minibatches = []
            for i, sampler in samplers.items():
                x, y = zip(*(splits.in_[i][next(sampler)] for _ in range(batch_size)))
                minibatches.append(to_device((torch.stack(x), torch.tensor(y)), device, is_fast))
        yield minibatches


def peak_memory_gb(device) -> float:
    """The GPU memory that the run has held at most so far, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1024**3 if device.type == "cuda" else 0.0


def save_cost(folder: Path, device, seconds: float, steps: int,
              diverged: str | None = None) -> None:
    """Leaves in memory.json what the run has taken so far, for `sweep status` and `sweep plan`.

    That is what the process has held at most, in MiB, and the seconds that `steps` updates and
    their evaluations took, in all attempts together. The CPU threads, which the last bits of
    results depend on, stand there too, and how the run `diverged`, if it did.
    """
    cost = {"rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # KiB on Linux
            "gpu_mb": 1024 * peak_memory_gb(device), "seconds": seconds, "steps": steps,
            "threads": torch.get_num_threads()}
    cost |= {"diverged": diverged} if diverged else {}
    files.write_json(folder / files.MEMORY, cost)


def seconds_before(folder: Path, first_step: int) -> float:
    """What a run that goes on had taken until that step, as far as its memory.json tells."""
    cost = files.cost(folder)
    return cost.get("seconds", 0.0) * first_step / cost["steps"] if cost.get("steps") else 0.0


# What a run prints and writes.


def environment() -> dict:
    """Versions that results may depend on."""
    return {"Python": platform.python_version(), "PyTorch": torch.__version__,
            "Torchvision": torchvision.__version__, "CUDA": torch.version.cuda,
            "CUDNN": torch.backends.cudnn.version(), "NumPy": np.__version__,
            "PIL": PIL.__version__}


def print_settings(title: str, settings: dict) -> None:
    """A heading and one indented line per setting."""
    print(f"{title}:")
    for name, value in settings.items():
        print(f"\t{name}: {value}")


def print_record(record: dict, header: list[str] | None) -> list[str]:
    """A row of 12-column cells, under their names where these changed; returns the names."""
    def row(cells):
        texts = (f"{c:.10f}" if isinstance(c, float) else str(c) for c in cells)
        print("  ".join(text.ljust(12)[:12] for text in texts), "")

    names = sorted(record)
    if names != header:
        row(names)
    row(record[name] for name in names)
    return names


class Divergence:
    """Looks whether a loss is infinite or no number, and tells so on stderr, once.

    The run goes on, as DomainBed's would, which tells nothing.
    """

    def __init__(self, algorithm: str):
        self.algorithm = algorithm
        #: The first such loss, its value and its step; None as long as there is none.
        self.first: str | None = None
        self._told = False

    def look(self, values: dict[str, float], step: int) -> None:
        """Takes in what an update returned."""
        if self.first is None:
            self.first = next(
                (f"{name} is {value} since step {step}" for name, value in values.items()
                 if "loss" in name and not math.isfinite(value)), None)

    def tell(self) -> None:
        """Prints the line, if there is something to tell and it has not been told."""
        if self.first and not self._told:
            self._told = True
            print(f"{self.algorithm} has diverged: {self.first}. The run goes on, as DomainBed's "
                  "would. To mend it, lower lr, or what else is extreme among its hparams.",
                  file=sys.stderr)


def save_model(path: Path, args: dict, hparams: dict, dataset, algorithm) -> None:
    """The predictor in DomainBed's layout, and what its classes are called."""
    content = {
        "args": args,
        "model_input_shape": tuple(dataset.input_shape),
        "model_num_classes": dataset.num_classes,
        "model_num_domains": len(dataset) - len(args["test_envs"]),
        "model_hparams": hparams,
        "model_dict": algorithm.state_dict()}
    if dataset.class_names is not None:
        content["class_names"] = dataset.class_names
    checkpoints.save(path, content)
    if args.get("format") == "safetensors":
        checkpoints.save_safetensors(path.with_suffix(".safetensors"), content)


# What survives a restart.


def _refuse_other_run(folder: Path, found: dict, args: dict) -> None:
    found, asked = identity(found), identity(args)
    if changed := sorted(name for name in found if found[name] != asked[name]):
        changes = ", ".join(f"{name} {found[name]} instead of {asked[name]}" for name in changed)
        raise ValueError(f"{folder} holds another run ({changes}). Choose another --output_dir, "
                         "or pass --resume never to append to it.")


def _already_finished(folder: Path, args: dict) -> bool:
    if not files.is_done(folder) or not (folder / files.RESULTS).exists():
        return False
    found = files.first_args(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds a finished run, but the first line of its {files.RESULTS} is not a "
            "record. Delete the folder to train again, or choose another --output_dir.")
    _refuse_other_run(folder, found, args)
    return True


def save_state(folder: Path, args: dict, algorithm, load: Loaders, pending: dict,
               next_step: int, measures: diagnostics.Diagnostics | None = None) -> None:
    """Everything that the steps from `next_step` on depend on."""
    results = folder / files.RESULTS
    checkpoints.save(folder / files.STATE, {
        "args": args,
        "next_step": next_step,
        "algorithm": checkpoints.algorithm_state(algorithm),
        "loaders": [loader.state_dict() for loader in load.all()],
        "random": checkpoints.random_state(),
        "pending": dict(pending),
        "diagnostics": measures.state_dict() if measures else None,
        "results_bytes": results.stat().st_size if results.exists() else 0})


def restore(folder: Path, args: dict, algorithm, load: Loaders, pending: dict,
            measures: diagnostics.Diagnostics | None = None) -> int:
    """Puts back what `save_state` left, and returns the step to go on with.

    Records written after the state was saved are cut off: they will be written again. Where
    there is no state, records of an unfinished run are set aside as results.jsonl.old, unless
    there is only the first, which is written again too.

    Raises:
        ValueError: if the state is damaged, another run's, or its records are not all there.
    """
    results, state_path = folder / files.RESULTS, folder / files.STATE
    files.remove_half_written(folder)
    if not state_path.exists():
        if results.exists():
            if results.read_bytes().count(b"\n") > 1:
                results.replace(folder / files.OLD_RESULTS)
            else:
                results.unlink()
        return 0
    state = checkpoints.load(state_path)
    size = results.stat().st_size if results.exists() else 0
    afresh = f"Delete {state_path}, and the run starts again from its first step."
    try:
        _refuse_other_run(folder, state["args"], args)
        if size < state["results_bytes"]:
            raise ValueError(f"{results} has {size} bytes, but {state['results_bytes']} when the "
                             f"run's state was saved: records are lost. {afresh}")
        checkpoints.load_algorithm_state(algorithm, state["algorithm"])
        for loader, loader_state in zip(load.all(), state["loaders"]):
            loader.load_state_dict(loader_state)
        checkpoints.set_random_state(state["random"])
        pending.update(state["pending"])
        if measures and state["diagnostics"]:
            measures.load_state_dict(state["diagnostics"])
        elif measures:  # the run began without them
            measures.distance.restart()
            print("--diagnostics: weight distances are counted from step "
                  f"{state['next_step']} on, as the run began without this flag.", file=sys.stderr)
        first_step = state["next_step"]
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{state_path} does not fit this run ({type(error).__name__}: {reason})."
                         f" {afresh}") from error
    if results.exists():
        os.truncate(results, state["results_bytes"])
    print(f"Continuing at step {first_step}.", file=sys.stderr)
    return first_step


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGUSR1, SIGUSR2 make the yielded function return True; none kills."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, lambda *_: received.append(True))
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
