"""Whatever stands in the place of a file that we read: a value or one line, soon, in little memory.

Each reader gets arbitrary bytes, a sound file that was damaged, what is not a regular file, and a
file of 64 GiB.
"""

import contextlib
import io
import json
import os
import resource
import signal
import socket
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from domainbed_kd import backbones, checkpoints, datasets
from domainbed_kd.console import USER_ERRORS, one_line
from domainbed_kd.datasets import archives, masks
from domainbed_kd.folder import claims, curves, files, manifest
from domainbed_kd.results import logits, pictures, records
from domainbed_kd.run import image_cache
from domainbed_kd.sweep import flags

PATIENCE_S = 30  # of the clock, on a machine that may be busy
MEMORY = 2**32  # bytes on top of what the process has
RECORDS = next(GOLDENS.glob("sweep_data/*/results.jsonl")).read_bytes()
ARGS = json.dumps(json.loads(RECORDS.splitlines()[0])["args"]).encode()
MODEL = {"args": {"dataset": "Debug28", "test_envs": [0]}, "model_dict": {"w": torch.ones(2, 3)}}


def saved(save, *args, **kwargs):
    """The bytes that a function writes to a file object."""
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


def picture(kind, mode="RGB"):
    noise = np.random.RandomState(0).randint(256, size=(9, 7, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise).convert(mode).save, format=kind)


def pixels():
    """The bytes of an image cache of one image."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache")
        image_cache._write(path, {"x.png": (1, 2)}, [np.zeros((4, 4, 3), np.uint8)])
        return path.read_bytes()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/b.txt", "text" * 100)
    return buffer.getvalue()


def in_folder(read):
    """A reader that takes the folder of a file."""
    return lambda path: read(path.parent)


def unpacked(path):
    archives.unpack(path, path.parent)


def cached(path):
    cache, _ = image_cache._look_up(path, path.parent, {"x.png": (1, 2)})
    return cache and cache.holds("x.png", (1, 2)) and cache(str(path.parent / "x.png"))


def arrays(path):
    with contextlib.suppress(*logits.UNREADABLE), logits.read_arrays(path) as found:
        return {name: found[name] for name in found.files}


# {(file's name, what reads it): (a sound file, reader)}
READERS = {
    ("results.jsonl", "last_record"): (RECORDS, in_folder(files.last_record)),
    ("results.jsonl", "first_args"): (RECORDS, in_folder(files.first_args)),
    ("results.jsonl", "read_records"): (RECORDS, in_folder(curves.read_records)),
    ("results.jsonl", "Folder"): (RECORDS, lambda p: records.Folder(p.parents[1]).curves()),
    ("sealed.jsonl", "_sealed"): (RECORDS, in_folder(records._sealed)),
    ("args.json", "planned_args"): (ARGS, in_folder(files.planned_args)),
    ("out.txt", "planned_args"): (b"\nArgs:\n\tseed: 1\n", in_folder(files.planned_args)),
    ("out.txt", "holder"): (b"", in_folder(claims.holder)),
    ("err.txt", "last_error"): (b"error: why\n", in_folder(files.last_error)),
    ("failed", "failure"): (b"why\n", in_folder(files.failure)),
    ("memory.json", "cost"): (b'{"rss_mb": 1, "seconds": 2.5}', in_folder(files.cost)),
    ("memory.json", "divergence"): (b'{"diverged": "loss"}', in_folder(files.divergence)),
    ("heartbeat", "_beat"): (b'{"host": "a", "boot": "b", "pid": 1}', in_folder(claims._beat)),
    ("sweep.json", "launches"): (b'{"launches": [{"cwd": "/", "flags": []}]}',
                                 in_folder(manifest.launches)),
    ("grid.json", "grid_text"): (b'{"lr": [1, 2]}', lambda path: flags.grid_text(str(path))),
    ("model.pkl", "load"): (saved(lambda file: torch.save(MODEL, file)), checkpoints.load),
    ("weights.pt", "_read_tensors"): (saved(lambda file: torch.save(MODEL["model_dict"], file)),
                                      lambda path: backbones._read_tensors(str(path))),
    ("x.png", "load_image"): (picture("png"), lambda path: datasets.load_image(str(path))),
    ("x.jpg", "load_image"): (picture("jpeg"), lambda path: datasets.load_image(str(path))),
    ("x.tif", "load_image"): (picture("tiff"), lambda path: datasets.load_image(str(path))),
    ("x.gif", "load_image"): (picture("gif"), lambda path: datasets.load_image(str(path))),
    ("x.webp", "load_image"): (picture("webp"), lambda path: datasets.load_image(str(path))),
    ("x.png", "load_mask"): (picture("png", "L"), lambda path: masks.load_mask(str(path))),
    ("step0.npz", "read_arrays"): (saved(np.savez_compressed, index=np.arange(5)), arrays),
    ("pictures.npz", "read"): (
        saved(np.savez_compressed, env0_image=np.zeros((1, 2, 2, 3), np.uint8),
              env0_label=np.zeros((1, 2, 2), np.uint8), env0_guess=np.zeros((1, 2, 2), np.uint8)),
        lambda path: pictures.read(path.parent, 0)),
    ("x.images", "_look_up"): (pixels(), cached),
    ("x.zip", "unpack"): (zipped(), unpacked),
    ("x.zip", "sha256"): (zipped(), archives.sha256),
}


@contextlib.contextmanager
def bounded():
    """Inside, PATIENCE_S seconds and MEMORY bytes are all there is."""
    def expired(*_):
        raise AssertionError("it hangs")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    previous = signal.signal(signal.SIGALRM, expired)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def try_to(read, path):
    """Reads; returns the line that a user sees if the file is refused."""
    with bounded(), contextlib.redirect_stderr(io.StringIO()):
        try:
            read(path)
        except USER_ERRORS as error:
            assert "\n" not in (line := one_line(error))
            return line
    return None


@pytest.fixture
def place(request, tmp_path):
    """(path in the folder of a run, content of a sound file, reader)"""
    name, _ = request.param
    (tmp_path / "run").mkdir()
    for needed in {"args.json", "out.txt"} - {name}:
        (tmp_path / "run" / needed).write_bytes(b"")
    return tmp_path / "run" / name, *READERS[request.param]


every = pytest.mark.parametrize("place", READERS, ids="-".join, indirect=True)


@st.composite
def damaged(draw):
    """What makes of a sound file one that is cut, or of which some bytes are others."""
    cut = draw(st.one_of(st.none(), st.floats(0, 1)))
    flips = draw(st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=5))

    def change(sound):
        found = bytearray(sound[:round(cut * len(sound))] if cut is not None else sound)
        for where, byte in flips if found else ():
            found[int(where * len(found))] = byte
        return bytes(found)

    return change


contents = st.one_of(
    damaged(), st.binary(max_size=60).map(lambda found: lambda _: found),
    st.sampled_from([b"[" * 10**5, b'{"a": ' * 400 + b"1" + b"}" * 400, b'"\\ud800"', b"NaN",
                     b"1" + b"0" * 5000, b"\x00" * 10**5]).map(lambda found: lambda _: found))


@every
@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(change=contents)
def test_any_bytes_are_read_or_refused_in_a_line(place, change):
    path, sound, read = place
    path.write_bytes(change(sound))
    try_to(read, path)


@every
def test_a_sound_file_is_read(place):
    path, sound, read = place
    path.write_bytes(sound)
    assert try_to(read, path) is None


@every
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "link to a FIFO"])
def test_what_is_not_a_regular_file_is_not_waited_for(place, kind, monkeypatch):
    path, _, read = place
    path.unlink(missing_ok=True)
    if kind == "socket":
        monkeypatch.chdir(path.parent)  # as the name of a socket is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path if kind == "fifo" else path.parent / "elsewhere")
        if kind != "fifo":
            path.symlink_to("elsewhere")
    try_to(read, path)


@pytest.mark.parametrize("place", [key for key in READERS if key != ("x.zip", "sha256")],
                         ids="-".join, indirect=True)
def test_a_file_of_64_gib_is_not_read_whole(place):
    path, _, read = place
    with path.open("wb") as file:
        file.truncate(2**36)
    try_to(read, path)
