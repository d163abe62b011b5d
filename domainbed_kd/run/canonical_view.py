"""A frozen teacher's outputs for each training image without augmentation, computed once.

With the hparam `canonical_view` a teacher sees images without its student's augmentation, so that
its outputs can be kept: for the run or, in a folder, for every run, trial and student with the same
data and teacher. Beyer et al., "Knowledge distillation: A good teacher is patient and consistent",
CVPR 2022, https://arxiv.org/abs/2106.05237, call this a fixed teacher. It saves time, but they find
it worse than a teacher that sees what the student sees.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from domainbed_kd import console, datasets, networks
from domainbed_kd.folder import files

CPU = torch.device("cpu")


def check(algorithm: nn.Module) -> None:
    """Refuses methods whose teacher must see the student's view."""
    if algorithm.needs_same_view:
        raise ValueError(f"{type(algorithm).__name__}: canonical_view must be left out, as "
                         f"{algorithm.needs_same_view}.")


class CanonicalViews:
    """The outputs of an algorithm's teachers for all images of the training domains.

    Args:
        algorithm: has a `teacher`, or several `teachers`; without any, nothing is computed.
        splits: the in-splits of the training domains.
        batches: yields a dataset's (x, y) in order, not augmented, on the algorithm's device.
        folder: where outputs are kept, memory-mapped; None computes them for this run only.
        key: anything else that they depend on, such as the precision.
        which: whether each teacher, in order, has this view; True for all.
        device: the algorithm's.

    Raises:
        ValueError: if a teacher is not trained yet or not frozen, if changes to the images cannot
            be detected, or if `which` does not have an entry for each teacher.
    """

    def __init__(self, algorithm: nn.Module, splits: list, batches: Callable,
                 folder: Path | None = None, key: str = "", which: bool | list[bool] = True,
                 device: torch.device = CPU):
        self.splits = splits
        self.device = device
        self.outputs = {}  # {teacher: [array (N, D) for each split]}
        if algorithm.teacher_logits is not None and not algorithm.teacher_is_ready():
            raise ValueError(f"{type(algorithm).__name__}: canonical_view needs a teacher that is "
                             "trained already. Name one: --teacher FOLDER.")
        found = _teachers(algorithm)
        if which is not True and (not isinstance(which, list) or len(which) != len(found)
                                  or not all(isinstance(each, bool) for each in which)):
            raise ValueError(f"canonical_view is {which!r}; it takes true, or a list of true and "
                             f"false for {len(found)} teachers.")
        for teacher, has_it in zip(found, len(found) * [True] if which is True else which):
            if not has_it:
                continue
            if not isinstance(teacher, networks.Frozen):
                raise ValueError(f"{type(algorithm).__name__}: canonical_view needs a teacher that "
                                 f"is a networks.Frozen; found a {type(teacher).__name__}.")
            about = [key, repr(teacher.module), teacher.preprocessing,
                     *_digests(teacher.module.state_dict())]
            self.outputs[teacher] = [
                _kept(folder, teacher, split.underlying_dataset, batches, about)
                for split in splits]

    @contextlib.contextmanager
    def recalled(self, loaders: Iterable) -> Iterator[None]:
        """Inside, teachers return the kept outputs for the loaders' last batches."""
        rows = [[split.keys[i] for i in loader.indices]
                for split, loader in zip(self.splits, loaders)]
        for teacher, outputs in self.outputs.items():
            recalled = torch.cat(
                [torch.from_numpy(array[keys]) for array, keys in zip(outputs, rows)])
            teacher.recalled = networks.sent(recalled, self.device)
        try:
            yield
        finally:
            for teacher in self.outputs:
                teacher.recalled = None


def of_run(run, in_order: Callable, folder: str | None) -> CanonicalViews | None:
    """A run's views, if its hparams ask for them; see `CanonicalViews` for the arguments."""
    if not run.hparams.get("canonical_view"):
        return None
    with run.autocast():
        return CanonicalViews(
            run.algorithm, [run.splits.in_[i] for i in run.training], in_order, folder,
            key=f"{run.device.type} {'fast' if run.is_fast else 'exact'}",
            which=run.hparams["canonical_view"], device=run.device)


def _teachers(algorithm) -> list:
    several, one = algorithm.part("teachers"), algorithm.part("teacher")
    return list(several) if several else [one] if one else []


def _digests(tensors: dict[str, Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        yield f"{name} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _source(dataset) -> Iterator[str]:
    """Identifies a domain's images: files by size and modification time, tensors by content."""
    plain = datasets.plain(dataset)
    if hasattr(plain, "samples"):
        yield repr(plain.transform)
        for path, _ in plain.samples:
            found = os.stat(path)
            yield f"{path} {found.st_size} {found.st_mtime_ns}"
    elif hasattr(plain, "tensors"):
        yield from _digests({"images": plain.tensors[0]})
    else:
        raise ValueError(f"--teacher_cache: changes to the images of a {type(plain).__name__} "
                         "cannot be detected. Leave the flag out.")


def _kept(folder: Path | None, teacher, dataset, batches: Callable, about: list[str]) -> np.ndarray:
    """The teacher's outputs (N, D), float32, for the items of a domain in order."""
    if folder is None:
        return _outputs(teacher, dataset, batches)
    digest = hashlib.sha256("\n".join([*about, *_source(dataset)]).encode()).hexdigest()
    path = Path(folder) / f"{digest[:32]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs = _outputs(teacher, dataset, batches)
        files.write_atomically(path, lambda part: _save(part, outputs))
    try:
        files.open_regular(path).close()
        outputs = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"--teacher_cache: {path} is damaged ({error}). Delete it; it will be "
                         "computed again.") from None
    return outputs


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _outputs(teacher, dataset, batches: Callable) -> np.ndarray:
    whole = console.bar(batches(dataset), desc="teacher", unit="batch", leave=False)
    return torch.cat([teacher(x).float().cpu() for x, _ in whole]).numpy()
