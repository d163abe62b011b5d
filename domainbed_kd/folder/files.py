"""The files of a run: their names, one reader and one writer. No other module names them.

A folder's content is untrusted: only regular files are read (a FIFO would block the reader), and
JSON only within bounds that later steps can handle.
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

#: A line of JSON for each evaluation; the same of an attempt that could not be continued.
RESULTS, OLD_RESULTS = "results.jsonl", "results.jsonl.old"
#: Accuracies that `train --seal` keeps out of RESULTS, by step.
SEALED = "sealed.jsonl"
#: What a run prints. The process that trains in the folder locks OUT.
OUT, ERR = "out.txt", "err.txt"
#: Why a run failed, in one line, until it is restarted; exists once the run has finished.
FAILED, DONE = "failed", "done"
#: The args that a sweep will train in the folder; the run's cost.
ARGS, MEMORY = "args.json", "memory.json"
#: The state that a restart needs; the predictor, also as safetensors; the saved predictions.
STATE, MODEL, SAFETENSORS, LOGITS = "resume.pt", "model.pkl", "model.safetensors", "logits"
#: Segmentation only: a few test images with their masks and the predicted masks.
PICTURES = "pictures.npz"
#: Touched by the process that trains in the folder; see claims.py.
HEARTBEAT = "heartbeat"
#: Files that a run reads or writes, which must be regular files.
REGULAR = (RESULTS, SEALED, OUT, ERR, FAILED, DONE, ARGS, MEMORY, STATE, MODEL, SAFETENSORS,
           HEARTBEAT)

# The largest file that is read whole, and how much is read at a time, in bytes.
MOST_BYTES = 2**26
_BLOCK = 2**16
# Args in out.txt that are numbers; the others are text.
_NOT_TEXT = {name for name, flag in FLAGS.items()
             if flag.on_record != NEVER and flag.type in (int, float)}
_WORDS = {"None": None, "True": True, "False": False}


def open_regular(path: str | Path) -> io.FileIO:
    """A regular file, or a link to one, open for reading.

    Raises:
        OSError: if it cannot be opened, or is anything else, such as a FIFO, which would block.
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
        OSError: as `open_regular`, and if it is larger than MOST_BYTES.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return file.readall()


def read_json(path: str | Path):
    """The content of a JSON file; raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path))


def open_to_write(path: str | Path, mode: str = "w") -> TextIO | BinaryIO:
    """A file open for writing ("w") or appending ("a", "ab"); never waits for a reader.

    Raises:
        OSError: if it cannot be opened, or is a FIFO without a reader.
    """
    return open(path, mode, encoding=None if "b" in mode else "utf-8",
                errors=None if "b" in mode else "replace",
                opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary file in the same folder, then renames that to `path`."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not name its file
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(content, sort_keys=True) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_arrays(path: Path, arrays: dict) -> None:
    """Writes a compressed .npz file atomically, and makes its folder."""
    import numpy as np

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)

    path.parent.mkdir(exist_ok=True)
    write_atomically(path, write)


def remove_half_written(folder: Path) -> None:
    """Deletes the temporary files of a `write_atomically` that was killed."""
    for beside in folder.glob("*.tmp"):
        beside.unlink()


def append_record(folder: Path, record: dict, name: str = RESULTS) -> None:
    """Appends a line to results.jsonl or a similar file; it is on disk when this returns.

    An incomplete last line, such as a crashed machine leaves, is removed first. If the disk is
    full, the part of the new line that was written is removed too.

    Raises:
        OSError: if it cannot be written; earlier lines stay.
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
    """The size in bytes of a file's complete lines."""
    size = file.seek(0, os.SEEK_END)
    while size:
        start = max(size - _BLOCK, 0)
        file.seek(start)
        if end := file.read(size - start).rfind(b"\n") + 1:
            return start + end
        size = start
    return 0


def first_args(folder: str | Path) -> dict | None:
    """The args in a run's first record; None if there is no such record, or it is damaged.

    Raises:
        OSError: if results.jsonl exists and cannot be read.
    """
    try:
        args = parse_json(read_bytes(f"{folder}/{RESULTS}").partition(b"\n")[0])["args"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    return args if are_args(args) else None


def last_record(folder: str | Path) -> dict | None:
    """A run's last complete record, found from the end of its file; None if there is none."""
    try:
        with open_regular(f"{folder}/{RESULTS}") as file:
            size, n_read = file.seek(0, os.SEEK_END), _BLOCK
            while True:
                start = max(size - n_read, 0)
                file.seek(start)
                lines = file.read(size - start).split(b"\n")[:-1]  # the last is incomplete or empty
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


def leave_args(folder: str | Path, args: dict) -> None:
    """Writes a job's args to args.json in its folder."""
    with contextlib.suppress(OSError):
        with open_to_write(f"{folder}/{ARGS}") as file:
            file.write(json.dumps(args, sort_keys=True) + "\n")


def without_results(sweep: str | Path, names: Iterable[str]) -> list[dict]:
    """The args of those of a sweep's folders where they are known; `output_dir` is the folder."""
    found = ((f"{sweep}/{name}", planned_args(f"{sweep}/{name}")) for name in names)
    return [args | {"output_dir": folder} for folder, args in found if args]


def planned_args(folder: str | Path) -> dict | None:
    """The args of a run that may lack records; None if they are unknown.

    A sweep writes them to args.json; other runs, and DomainBed's, print them to out.txt.
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
    """The args that a run printed last."""
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
    """Whether a run has ever started in a folder."""
    return any(os.path.exists(f"{folder}/{name}") for name in (OUT, RESULTS))


def is_waiting(folder: str | Path) -> bool:
    """Whether a job's folder exists and no run has started in it."""
    return (os.path.isdir(folder) and os.access(folder, os.R_OK)
            and set(os.listdir(folder)) <= {ARGS})


def remove_waiting(folder: str | Path) -> None:
    """Removes a job's folder in which no run has started."""
    Path(folder, ARGS).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another launcher has just started a run here
        os.rmdir(folder)


def failure(folder: str | Path) -> str | None:
    """Why a run failed, in one line; None if it did not."""
    try:
        text = read_bytes(f"{folder}/{FAILED}").decode(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"the reason cannot be read ({error.strerror})"
    return " ".join(text.split()) or "the disk was too full to write the reason"


def note_failure(folder: str | Path, reason: str) -> None:
    """Writes the reason to the file `failed`, which stays empty if the disk is full."""
    with contextlib.suppress(OSError):  # the first error is the one to report
        with open_to_write(f"{folder}/{FAILED}") as file:
            file.write(f"{reason}\n")


def last_error(folder: str | Path) -> str:
    """The last line of err.txt that is not blank; empty if there is none."""
    try:
        with open_regular(f"{folder}/{ERR}") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _BLOCK, 0))
            lines = file.read(_BLOCK).decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def cost(folder: str | Path) -> dict[str, float]:
    """A run's cost so far, from its memory.json; empty before its first record.

    "rss_mb" and "gpu_mb" are the peak memory of process and GPU in MiB; older runs lack "seconds"
    and "steps". A damaged file is ignored.
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
    """How a run's losses have diverged, at its last record; None if they have not."""
    try:
        found = read_json(f"{folder}/{MEMORY}").get("diverged")
    except (OSError, ValueError, AttributeError):
        return None
    return str(found) if found else None


def lacks(folder: str | Path, args: dict) -> list[str]:
    """The flags whose results a finished run lacks because it was trained without them."""
    found = []
    if args.get("save_logits") and not os.path.isdir(f"{folder}/{LOGITS}"):
        found.append("save_logits")
    if (args.get("format") and not args.get("skip_model_save")
            and not os.path.exists(f"{folder}/{SAFETENSORS}")):
        found.append("format")
    if args.get("diagnostics") and "diagnostics" not in (last_record(folder) or {}):
        found.append("diagnostics")
    return found
