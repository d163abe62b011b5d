"""A run's evaluations: accuracies, logits, diagnostics, and the audit of its teacher."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from domainbed_kd import datasets, networks, tasks, teachers
from domainbed_kd.folder import files
from domainbed_kd.run import diagnostics, records
from domainbed_kd.run.build import Run
from domainbed_kd.run.readers import Turn
from domainbed_kd.seeds import forked_rng, seed_hash

# float16, after subtracting each image's largest logit: precision is highest near the largest, and
# softmax changes by less than 3e-8.
LOGITS_DTYPE = np.float16


class Evaluator:
    """Evaluates a run's algorithm; of random streams, only the evaluation loaders' advance."""

    def __init__(self, run: Run):
        self.run = run
        in_, out = run.splits.in_, run.splits.out
        # {split that model selection reads: its items' numbers in their domain}
        selected = {f"env{i}_out": split.keys for i, split in enumerate(out) if run.holds_out}
        selected |= {f"{'' if run.holds_out else 'fd_'}env{i}_in": in_[i].keys
                     for i in run.args["test_envs"]}
        self.evaluated = selected if run.is_fast else run.loaders.evaluation
        self.kept = selected if run.args.get("save_logits") and run.holds_out else {}
        self.diagnostics = None
        if run.args.get("diagnostics") and run.holds_out:
            self.diagnostics = diagnostics.Diagnostics(
                run.algorithm, out, run.training, self.held_out)
        self._held_out: dict = {}  # {out-split: its batches, on the device}
        self._teacher: dict | None = None
        self._by_class: dict = {}

    def in_order(self, split) -> Iterator[tuple[Tensor, Tensor]]:
        """A split's (x, y), 64 images at a time, not augmented; uses no random stream."""
        return map(self.run.to_device, _whole(split))

    def held_out(self, split) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for an out-split, whose images in exact mode stay on a GPU if they fit."""
        run = self.run
        if split not in self._held_out and not run.is_fast and run.finish.reserve(
                len(split) * math.prod(run.dataset.input_shape)):
            self._held_out[split] = [[networks.sent(part, run.device) for part in batch]
                                     for batch in _whole(split)]
        return map(run.to_device, self._held_out.get(split) or _whole(split))

    def audit_teacher(self) -> None:
        """Prints the teacher's audit on the training domains; the first record includes it."""
        run = self.run
        run.algorithm.eval()
        batches = (batch for i in run.training for batch in self.held_out(run.splits.out[i]))
        self._teacher = teachers.audit(
            run.algorithm, batches, run.args.get("allow_bad_teacher", False))
        run.algorithm.train()
        if self._teacher:
            records.print_settings("Teacher", self._teacher)

    def after_step(self) -> None:
        """Call this once after each update."""
        if self.diagnostics:
            self.diagnostics.distance.add_step()

    def accuracies(self, step: int) -> dict[str, float]:
        """{env0_in_acc, ...: the task's metric, in [0, 1]}; saves logits with --save_logits."""
        run, logits = self.run, {name: [] for name in self.kept}
        with run.autocast():
            counters = {name: measure(run, loader, logits.get(name))
                        for name, loader in run.loaders.evaluation.items()
                        if name in self.evaluated}
        if self.kept:
            save_logits(run.folder / files.LOGITS / f"step{step}.npz", logits, self.kept)
        self._by_class = {} if step < run.n_steps - 1 else {
            f"{name}_iou": ious for name, counter in counters.items()
            if (ious := counter.by_class())}
        return {f"{name}_acc": counter.score() for name, counter in counters.items()}

    def remarks(self) -> dict:
        """A record's other entries: selection rule, metric, teacher, diagnostics."""
        found = {"selection": "last"} if self.run.algorithm.selects_last else {}
        if metric := self.run.dataset.TASK.on_record:
            found |= {"metric": metric, **self._by_class}
        if self._teacher:
            found["teacher"], self._teacher = self._teacher, None  # in the first record only
        if self.diagnostics:
            found["diagnostics"] = self.diagnostics.measure()
        return found

    def validation_loss(self, predict: Callable[[Tensor], Tensor]) -> float:
        """Mean over the training domains of the cross-entropy on the out-split, not augmented."""
        run, losses = self.run, []
        run.algorithm.eval()
        with torch.no_grad():
            for i in run.training:
                split = run.splits.out[i]
                total, n = 0, 0
                for x, y in self.held_out(split):
                    logits = tasks.at_size_of(predict(x), y)
                    total += F.cross_entropy(logits, y, reduction="sum").item()
                    n = n + tasks.n_labels(y)
                losses.append(total / float(n))
        run.algorithm.train()
        return sum(losses) / len(losses)

    def extra_minibatches(self, n: int) -> Iterator[list]:
        """`n` lists of minibatches like those of training, from separate random streams."""
        run, batch_size, seed = self.run, self.run.hparams["batch_size"], self.run.args["seed"]
        seeds = [seed_hash(seed, "extra augmentation", k) for k in range(n)]

        def requests(i):
            generator = torch.Generator().manual_seed(seed_hash(seed, "extra minibatches", i))
            items = iter(RandomSampler(
                run.splits.in_[i], True, n * batch_size, generator=generator))
            for each in seeds:
                yield Turn(each, i, None), list(itertools.islice(items, batch_size))

        domains = [loader.read_apart(requests(i))
                   for i, loader in zip(run.training, run.loaders.train)]
        for each, batches in zip(seeds, zip(*domains)):
            with forked_rng():
                torch.manual_seed(each)
                minibatches = run.minibatches(batches)
            yield minibatches


def _whole(split) -> DataLoader:
    return DataLoader(datasets.plain(split), batch_size=64, generator=torch.Generator())


def measure(run: Run, loader, kept: list | None = None):
    """The metric's counter after `predict` has seen the loader's images.

    Each batch's (indices, labels, logits), on the CPU, are appended to `kept`.
    """
    counter = run.dataset.TASK.counter()
    run.algorithm.eval()
    with torch.no_grad():
        for batch in loader:
            x, y = run.to_device(batch)
            logits = run.algorithm.predict(x)
            counter.add(logits, y)
            if kept is not None:
                kept.append((loader.indices, batch[1], logits.float().cpu()))
    run.algorithm.train()
    return counter


def save_logits(path: Path, kept: dict[str, list[tuple]], keys: dict[str, list[int]]) -> None:
    """Writes a checkpoint's predictions to an .npz file.

    Args:
        path: of the file.
        kept: {split: [(indices within the split, labels (B,), logits (B, C)), ...]}.
        keys: {split: its items' numbers in their domain}.
    """
    arrays = {}
    for name, batches in kept.items():
        index, labels, logits = (
            np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*batches))
        if logits.shape[1] == 1:
            logits = np.pad(logits, ((0, 0), (1, 0)))
        index = np.asarray(keys[name], dtype=np.int32)[index]
        order = index.argsort()
        shifted = np.maximum(logits - logits.max(axis=1, keepdims=True),
                             np.finfo(LOGITS_DTYPE).min)
        arrays |= {f"{name}.logits": shifted[order].astype(LOGITS_DTYPE),
                   f"{name}.labels": labels[order].astype(np.int32), f"{name}.index": index[order]}
    files.write_arrays(path, arrays)
