"""Checkpoints: model.pkl, and the state that a restart needs.

Files are written under another name and then renamed, so a file is whole or absent. They are read
with `weights_only=True`, so no pickled code ever runs.
"""

import io
import json
import pickle
import random
import re
import struct
from pathlib import Path

import numpy as np
import torch

from domainbed_kd.folder import files

# The global that a refused pickle asks for, in torch's message.
REFUSED = re.compile(r"GLOBAL \S+|[Uu]nsupported operand \d+|[Ii]nvalid load key[^.]*")


def save(path: Path, content: dict) -> None:
    """torch.save, atomically; the bytes depend only on the content, not on the file's name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    files.write_atomically(path, lambda beside: beside.write_bytes(buffer.getbuffer()))


def save_safetensors(path: Path, content: dict) -> None:
    """Saves a model's tensors by name, and the rest as JSON in the file's metadata.

    Entries of model_dict that are not tensors are left out: an average's bookkeeping, which
    `predict` does not need.
    """
    from safetensors.torch import save as as_bytes

    tensors = {name: value.contiguous().clone() for name, value in content["model_dict"].items()
               if isinstance(value, torch.Tensor)}
    metadata = {name: json.dumps(value) for name, value in content.items() if name != "model_dict"}
    files.write_atomically(path, lambda beside: beside.write_bytes(as_bytes(tensors, metadata)))


def load(path: Path) -> dict:
    """Reads what `save` wrote, to the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it is not a file but, say, a FIFO.
        ValueError: if it is damaged, or holds more than tensors and plain values.
    """
    try:
        files.open_regular(path).close()
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except pickle.UnpicklingError as error:
        reason = REFUSED.search(str(error))
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values, and nothing else "
            f"is unpickled, as it could run code ({reason[0] if reason else 'no valid pickle'}). "
            "If you trust where it comes from (DomainBed with random hparams saves NumPy scalars), "
            "load it there once and save it with plain Python numbers.") from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            struct.error) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged ({reason}). "
                         "Delete it, or put an intact copy there.") from None


def optimizers(algorithm) -> dict:
    """{attribute path: optimiser or scheduler} of all in an algorithm's attributes."""
    kinds = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)

    def within(name, value):
        if isinstance(value, kinds):
            yield name, value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from within(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                yield from within(f"{name}.{i}", item)

    found = {}
    for name, value in vars(algorithm).items():
        if not name.startswith("_"):
            found.update(within(name, value))
    return found


def algorithm_state(algorithm) -> dict:
    """Weights, buffers and optimisers, as tensors and plain values."""
    return {"module": algorithm.state_dict(),
            "optimizers": {k: o.state_dict() for k, o in optimizers(algorithm).items()}}


def load_algorithm_state(algorithm, state: dict) -> None:
    """Restores `algorithm_state` in an algorithm built with the same arguments."""
    algorithm.load_state_dict(state["module"])
    for name, optimizer in optimizers(algorithm).items():
        optimizer.load_state_dict(state["optimizers"][name])


def random_state() -> dict:
    """The global streams of random, numpy and torch (CPU and CUDA), as plain values."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return to_plain(get_streams()) | {"cuda": cuda}


def set_random_state(state: dict) -> None:
    """Restores `random_state`."""
    set_streams(from_plain(state))
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


# Streams of the CPU: (random's, NumPy's, torch's as an array, which other processes can take).


def get_streams() -> tuple:
    """The streams of this process."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()


def set_streams(streams: tuple) -> None:
    """Restores `get_streams`."""
    python, numpy, torchs = streams
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch.from_numpy(torchs))


def to_plain(streams: tuple) -> dict:
    """Streams in a form that torch.load(weights_only=True) can read."""
    (version, words, gauss), (kind, keys, *rest), torchs = streams
    return {"python": [version, torch.tensor(words), gauss],
            "numpy": [kind, torch.tensor(keys.astype(np.int64)), *rest],
            "torch": torch.from_numpy(torchs)}


def from_plain(plain: dict) -> tuple:
    """The inverse of `to_plain`; earlier versions wrote lists."""
    version, words, gauss = plain["python"]
    kind, keys, *rest = plain["numpy"]
    return ((version, tuple(np.asarray(words).tolist()), gauss),
            (kind, np.asarray(keys).astype(np.uint32), *rest), plain["torch"].numpy())
