import fcntl
import gzip
import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "data" / "goldens"
SHARED_DATA = ROOT.parent / "shared" / "data"

# Small networks gain nothing from more; and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Skips what is marked `cuda` where there is no GPU."""
    asked = [item for item in items if item.get_closest_marker("cuda")]
    if asked:
        import torch

        if not torch.cuda.is_available():
            for item in asked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def golden(name: str):
    """The content of a golden file, made by running DomainBed (see data/goldens/README.md)."""
    path = GOLDENS / name
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        text = gzip.decompress((GOLDENS / f"{name}.gz").read_bytes()).decode("utf-8")
    return json.loads(text) if name.endswith(".json") else text


def records_of_sweep(folder) -> list[dict]:
    """What is kept of the records of a sweep's runs."""
    from domainbed_kd.results.records import Folder

    return [record for curve in Folder(folder).curves() for record in curve.records()]


def seed_everything(seed: int) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def losses_in_double(algorithm, batches, device: str) -> list[dict]:
    """What updates return on a device in float64, where two devices differ by rounding alone.

    In float32 a GPU's convolutions are in TF32, and Adam, whose first steps are the gradients'
    signs, makes much of little.
    """
    algorithm = algorithm.double().to(device)
    return [{name: float(value) for name, value in algorithm.update(
        [(x.double().to(device), y.to(device)) for x, y in batch]).items()} for batch in batches]


@pytest.fixture
def launched(monkeypatch):
    """The commands given to a launcher called `pretend`, which finishes each job at once."""
    from launches import command_of

    from domainbed_kd import command_launchers

    commands = []

    def pretend(received):
        commands.extend(received)
        for command in received:
            (Path(command_of(command)["output_dir"][0]) / "done").write_text("done")

    monkeypatch.setitem(command_launchers.REGISTRY, "pretend", pretend)
    return commands


@pytest.fixture
def pacs() -> Path:
    """The folder that holds real PACS images; the test skips where there is none."""
    if not (SHARED_DATA / "PACS").is_dir():
        pytest.skip("no PACS images beside this checkout")
    return SHARED_DATA


@pytest.fixture
def ray():
    """Ray, for one test of this machine at a time: `auto` finds the clusters of all others."""
    library = pytest.importorskip("ray")
    with open(Path(tempfile.gettempdir()) / "domainbed_kd_tests_of_ray.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield library
