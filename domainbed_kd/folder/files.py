"""The files of a run: their names, one reader and one writer. Nothing else names them.

Anybody may have written what is in a folder: only regular files are read (a FIFO would hang the
reader), and JSON only within bounds that later steps can handle.
"""

import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, TextIO

from domainbed_kd.folder.args import FLAGS, NEVER, are_args
from domainbed_kd.folder.foreign import parse_json

#: A line of JSON for each evaluation; those of an attempt that cannot be continued.
RESULTS, OLD_RESULTS = "results.jsonl", "results.jsonl.old"
#: What `train --seal` keeps out of RESULTS, by step.
SEALED = "sealed.jsonl"
#: What a run prints. Who trains in the folder locks OUT.
OUT, ERR = "out.txt", "err.txt"
#: Why a run failed, in a line, until it is started again; there once it has finished.
FAILED, DONE = "failed", "done"
#: What a sweep wants to train in the folder; what the run cost.
ARGS, MEMORY = "args.json", "memory.json"
#: The state that a restart needs; the predictor, also as safetensors; the kept predictions.
STATE, MODEL, SAFETENSORS, LOGITS = "resume.pt", "model.pkl", "model.safetensors", "logits"
#: A few images of the test domains with their masks and the predicted ones; of segmentation only.
PICTURES = "pictures.npz"
#: Touched by the process that trains in the folder; see claims.py.
HEARTBEAT = "heartbeat"
#: Those that a run reads or writes, and that must be regular files.
REGULAR = (RESULTS, SEALED, OUT, ERR, FAILED, DONE, ARGS, MEMORY, STATE, MODEL, SAFETENSORS,
           HEARTBEAT)

# Of a file that is read whole, and of one line, in bytes.
MOST_BYTES = 2**26
_BLOCK = 2**16
# Arguments in out.txt that are not text; the others are shown as they are.
_NOT_TEXT = {name for name, flag in FLAGS.items()
             if flag.on_record != NEVER and flag.type in (int, float)}
_WORDS = {"None": None, "True": True, "False": False}


def open_regular(path: str | Path) -> io.FileIO:
    """A regular file, or a link to one, open for reading.

    Raises:
        OSError: if it cannot be opened or is anything else, such as a FIFO, on which it would
            have to wait.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            what = os.strerror(code) if stat.S_ISDIR(mode) else "Not a regular file"
            raise OSError(code, what, str(path))
        return open(number, "rb", buffering=0)
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as `open_regular`, and if it is larger than any file of a run.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return file.readall()


def read_json(path: str | Path):
    """The content of a JSON file; raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path))


# Writing, which never waits for a reader.


def open_to_write(path: str | Path, mode: str = "w") -> TextIO | BinaryIO:
    """A file open for writing ("w") or appending ("a", "ab").

    Raises:
        OSError: if it cannot be opened, or is a FIFO that nobody reads.
    """
    return open(path, mode, encoding=None if "b" in mode else "utf-8",
                errors=None if "b" in mode else "replace",
                opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary file beside `path`, then renames that."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not say where
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Writes a file of JSON, whole or not at all."""
    text = json.dumps(content, sort_keys=True) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_arrays(path: Path, arrays: dict) -> None:
    """Writes an .npz file, compressed, whole or not at all; its folder is made."""
    import numpy as np

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)

    path.parent.mkdir(exist_ok=True)
    write_atomically(path, write)


def remove_half_written(folder: Path) -> None:
    """Deletes what `write_atomically` left in a folder when it was killed."""
    for beside in folder.glob("*.tmp"):
        beside.unlink()


def append_record(folder: Path, record: dict, name: str = RESULTS) -> None:
    """Adds a whole line to results.jsonl or its like, on disk before this returns.

    A torn last line, which a machine that broke down may have left, is cut off first; so is
    what could be written of a line if the disk is full.

    Raises:
        OSError: if it cannot be written; the lines before it stay.
    """
    path = folder / name
    line = (json.dumps(record, sort_keys=True) + "\n").encode()
    with path.open("a+b", buffering=0) as file:
        size = _whole_lines(file)
        file.truncate(size)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            error.filename = str(path)
            raise


def _whole_lines(file) -> int:
    """The size in bytes of a file without its last line, if that lacks its end."""
    size = file.seek(0, os.SEEK_END)
    while size:
        start = max(size - _BLOCK, 0)
        file.seek(start)
        if end := file.read(size - start).rfind(b"\n") + 1:
            return start + end
        size = start
    return 0


def first_args(folder: str | Path) -> dict | None:
    """The args on a run's first record; None if it has no record that tells them.

    Raises:
        OSError: if results.jsonl is there and cannot be read.
    """
    try:
        args = parse_json(read_bytes(f"{folder}/{RESULTS}").partition(b"\n")[0])["args"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    return args if are_args(args) else None


def last_record(folder: str | Path) -> dict | None:
    """A run's last whole record, found from the end of its file; None if there is none."""
    try:
        with open_regular(f"{folder}/{RESULTS}") as file:
            size, n_read = file.seek(0, os.SEEK_END), _BLOCK
            while True:
                start = max(size - n_read, 0)
                file.seek(start)
                lines = file.read(size - start).split(b"\n")[:-1]  # the last one is torn, or empty
                for line in reversed(lines[1:] if start else lines):
                    with contextlib.suppress(ValueError):
                        record = parse_json(line)
                        if isinstance(record, dict) and type(record.get("step")) is int:
                            return record
                if not start or n_read >= MOST_BYTES:
                    return None
                n_read *= 4
    except OSError:
        return None


def steps_done(folder: str | Path) -> int:
    """The updates before a run's last record; 0 if it has none yet."""
    record = last_record(folder)
    return record["step"] + 1 if record else 0


# What a run is to train, how far it is, and why it failed.


def leave_args(folder: str | Path, args: dict) -> None:
    """Leaves in a job's folder what it is to train."""
    with contextlib.suppress(OSError):
        with open_to_write(f"{folder}/{ARGS}") as file:
            file.write(json.dumps(args, sort_keys=True) + "\n")


def without_results(sweep: str | Path, names: Iterable[str]) -> list[dict]:
    """The args of a sweep's folders, where they are known; `output_dir` is the folder."""
    found = ((f"{sweep}/{name}", planned_args(f"{sweep}/{name}")) for name in names)
    return [args | {"output_dir": folder} for folder, args in found if args]


def planned_args(folder: str | Path) -> dict | None:
    """The args of a run that may lack records; None if they are unknown.

    A sweep leaves them in args.json; other runs, and DomainBed's, print them to out.txt.
    """
    for name, parse in ((ARGS, parse_json), (OUT, _last_args)):
        try:
            args = parse(read_bytes(f"{folder}/{name}"))
        except (OSError, ValueError):  # absent or damaged
            continue
        if are_args(args):
            return args
    return None


def _last_args(printed: bytes) -> dict:
    """The arguments that a run printed last."""
    lines = printed.decode(errors="replace").rpartition("\nArgs:\n")[2].splitlines()
    args = {}
    for line in lines:
        name, colon, value = line.partition(": ")
        if not colon or not name.startswith("\t"):
            break
        name = name.strip()
        args[name] = (_WORDS[value] if value in _WORDS
                      else parse_json(value) if name in _NOT_TEXT else value)
    return args


def is_done(folder: str | Path) -> bool:
    """Whether a run has finished."""
    return os.path.exists(f"{folder}/{DONE}")


def has_begun(folder: str | Path) -> bool:
    """Whether a run has ever begun in a folder."""
    return any(os.path.exists(f"{folder}/{name}") for name in (OUT, RESULTS))


def is_waiting(folder: str | Path) -> bool:
    """Whether a job's folder is made and nothing has happened in it."""
    return (os.path.isdir(folder) and os.access(folder, os.R_OK)
            and set(os.listdir(folder)) <= {ARGS})


def remove_waiting(folder: str | Path) -> None:
    """Removes a job's folder in which nothing has happened."""
    Path(folder, ARGS).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another launcher has just begun here
        os.rmdir(folder)


def failure(folder: str | Path) -> str | None:
    """Why a run failed, in a line; None if it has not."""
    try:
        text = read_bytes(f"{folder}/{FAILED}").decode(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"why cannot be read ({error.strerror})"
    return " ".join(text.split()) or "no space was left on the disk to say why"


def note_failure(folder: str | Path, reason: str) -> None:
    """Leaves the reason in the file `failed`, which stays empty if the disk is full."""
    with contextlib.suppress(OSError):  # the first error is the one to report
        with open_to_write(f"{folder}/{FAILED}") as file:
            file.write(f"{reason}\n")


def last_error(folder: str | Path) -> str:
    """The last line in err.txt with something in it; empty if there is none."""
    try:
        with open_regular(f"{folder}/{ERR}") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _BLOCK, 0))
            lines = file.read(_BLOCK).decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def cost(folder: str | Path) -> dict[str, float]:
    """A run's cost so far, by its memory.json; empty before its first record.

    "rss_mb" and "gpu_mb" are the peaks of process and GPU in MiB; older runs lack "seconds" and
    "steps". A damaged file is ignored.
    """
    try:
        found = read_json(f"{folder}/{MEMORY}")
        found = {name: float(found[name]) for name in ("rss_mb", "gpu_mb", "seconds", "steps")
                 if name in found}
    except (OSError, ValueError, TypeError, LookupError):
        return {}
    is_sound = (("seconds" in found) == ("steps" in found)
                and all(0 <= value < float("inf") for value in found.values()))
    return found if is_sound else {}


def divergence(folder: str | Path) -> str | None:
    """How a run's losses diverged, by its last record; None if they did not."""
    try:
        found = read_json(f"{folder}/{MEMORY}").get("diverged")
    except (OSError, ValueError, AttributeError):
        return None
    return str(found) if found else None


def lacks(folder: str | Path, args: dict) -> list[str]:
    """The flags whose results a finished run lacks, as it was trained without them."""
    found = []
    if args.get("save_logits") and not os.path.isdir(f"{folder}/{LOGITS}"):
        found.append("save_logits")
    if (args.get("format") and not args.get("skip_model_save")
            and not os.path.exists(f"{folder}/{SAFETENSORS}")):
        found.append("format")
    if args.get("diagnostics") and "diagnostics" not in (last_record(folder) or {}):
        found.append("diagnostics")
    return found
