"""Seeds of draws, splits and jobs, hashed from values; and a guard for the random streams."""

import contextlib
import hashlib
from collections.abc import Iterator


def seed_hash(*args) -> int:
    """A seed in [0, 2**31) from plain Python scalars, strings and lists, as DomainBed derives it.

    The md5 of the text of the argument tuple, so `seed_hash(0)` hashes "(0,)". NumPy scalars
    print differently from version to version; convert them first.
    """
    text = str(args).encode("utf-8")
    return int(hashlib.md5(text).hexdigest(), 16) % 2**31


@contextlib.contextmanager
def forked_rng() -> Iterator[None]:
    """Leaves torch's global random streams as they were, whatever is drawn inside.

    Everything that a method builds beyond ERM's student is built inside, so that with its extra
    weights at 0 it trains as ERM does, bit for bit.
    """
    import torch

    # If CUDA is not in use yet, asking for its streams would start it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
