"""A run's output: records and their values, models, cost."""

import math
import platform
import resource
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

from domainbed_kd import checkpoints
from domainbed_kd.folder import files


def environment() -> dict:
    """Versions that results may depend on, named as DomainBed prints them."""
    return {"Python": platform.python_version(), "PyTorch": torch.__version__,
            "Torchvision": torchvision.__version__, "CUDA": torch.version.cuda,
            "CUDNN": torch.backends.cudnn.version(), "NumPy": np.__version__,
            "PIL": PIL.__version__}


def print_settings(title: str, settings: dict) -> None:
    """Prints a heading and one indented line per setting."""
    print(f"{title}:")
    for name, value in settings.items():
        print(f"\t{name}: {value}")


def print_record(record: dict, header: list[str] | None) -> list[str]:
    """Prints a row of 12-character cells, and a header if the names changed; returns the names."""
    def row(cells):
        texts = (f"{c:.10f}" if isinstance(c, float) else str(c) for c in cells)
        print("  ".join(text.ljust(12)[:12] for text in texts), "")

    names = sorted(record)
    if names != header:
        row(names)
    row(record[name] for name in names)
    return names


def sealed(record: dict, remarks: dict, test_envs: list[int]) -> dict:
    """Moves results on test domains out of a record and its diagnostics; returns them."""
    prefixes = tuple(f"{stage}env{i}_" for i in test_envs for stage in ("", "fd_"))

    def taken(values):
        return {name: values.pop(name) for name in list(values) if name.startswith(prefixes)}

    found = taken(record)
    if "diagnostics" in remarks:
        found["diagnostics"] = taken(remarks["diagnostics"])
    return found


class Pending:
    """The values that updates returned since the last record.

    Tensors stay on their device until `settle`, so that no step waits for a GPU. A loss that is
    NaN or infinite is then reported, once per run; the run continues, as in DomainBed.
    """

    def __init__(self, algorithm: str):
        self.algorithm = algorithm
        #: {name: its values since the last record}, up to the last `settle`.
        self.values: dict[str, list[float]] = defaultdict(list)
        #: The first loss that is NaN or infinite, with its value and step.
        self.diverged: str | None = None
        self._is_told = False
        self._fresh: list[tuple[int, dict]] = []

    def add(self, values: dict[str, float | Tensor], step: int) -> None:
        """Adds what an update returned."""
        self._fresh.append((step, {name: value.detach() if isinstance(value, Tensor) else value
                                   for name, value in values.items()}))

    def settle(self) -> None:
        """Turns tensors into floats, and notes the first loss that is NaN or infinite."""
        numbers = iter(as_floats(v for _, values in self._fresh for v in values.values()))
        for step, values in self._fresh:
            for name in values:
                value = next(numbers)
                self.values[name].append(value)
                if not self.diverged and "loss" in name and not math.isfinite(value):
                    self.diverged = f"{name} is {value} since step {step}"
        self._fresh.clear()

    def means(self) -> dict[str, float]:
        """The mean of each value since the last record; starts the next record."""
        self.settle()
        means = {name: float(np.mean(values)) for name, values in self.values.items()}
        self.values.clear()
        return means

    def tell(self) -> None:
        """Warns once on stderr if the run has diverged."""
        if self.diverged and not self._is_told:
            self._is_told = True
            print(f"{self.algorithm} has diverged: {self.diverged}. The run continues, as in "
                  "DomainBed. Try a smaller lr, or less extreme hparams.", file=sys.stderr)


def as_floats(values: Iterable[float | Tensor]) -> list[float]:
    """Numbers and one-element tensors as Python numbers, in order; waits for a GPU only once."""
    values = list(values)
    groups = defaultdict(list)
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            groups[value.device, value.dtype].append(i)
    for chosen in groups.values():
        together = torch.stack([values[i].reshape(()) for i in chosen]).tolist()
        for i, number in zip(chosen, together):
            values[i] = number
    return values


def peak_memory_gb(device: torch.device) -> float:
    """The run's peak GPU memory so far, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1024**3 if device.type == "cuda" else 0.0


def save_cost(folder: Path, device: torch.device, seconds: float, steps: int,
              diverged: str | None = None) -> None:
    """Writes the run's cost so far to memory.json, for `sweep status` and `sweep plan`.

    That is peak memory in MiB, and the seconds of `steps` updates with their evaluations over all
    attempts; also what the last bits of results depend on (CPU threads, GPU, TF32, cuDNN's
    algorithms), and how the run `diverged`, if it did.
    """
    cost = {"rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # KiB on Linux
            "gpu_mb": 1024 * peak_memory_gb(device), "seconds": seconds, "steps": steps,
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
            "cudnn_deterministic": torch.backends.cudnn.deterministic}
    cost |= {"diverged": diverged} if diverged else {}
    files.write_json(folder / files.MEMORY, cost)


def seconds_before(folder: Path, first_step: int) -> float:
    """The seconds that a run took up to `first_step`, estimated from its memory.json."""
    cost = files.cost(folder)
    return cost.get("seconds", 0.0) * first_step / cost["steps"] if cost.get("steps") else 0.0


def save_model(path: Path, args: dict, hparams: dict, dataset, algorithm) -> None:
    """Saves the predictor in DomainBed's layout, and the names of its classes."""
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
