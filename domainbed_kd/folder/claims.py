"""Claims on a run's folder: a lock, and a heartbeat for machines that do not see the lock.

The lock on out.txt is exact: the system frees it however the process ends. All processes on a
machine see it, and so do other machines on file systems that share locks (NFS 4, Lustre with
`flock`). For other file systems, the process touches the file `heartbeat` every BEAT_S seconds.
Another machine's heartbeat counts until STALE_S seconds after its last beat; the machines' clocks
should agree to within STALE_S.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from domainbed_kd.folder import files
from domainbed_kd.folder.args import FLAGS

BEAT_S = 20
STALE_S = 120
# How long a process waits for a claim, as `holder` in another may hold the lock for a moment.
WAIT_S = FLAGS["wait"].default
# Two processes that take over the same stale heartbeat notice within this time.
SETTLE_S = 2
# The exit status of a train command that a signal stopped, with its state saved: 128 + SIGTERM, as
# in a shell.
STOPPED = 143
# That of one that found another process training in its folder: EX_TEMPFAIL of sysexits.h.
BUSY = 75


# Errors of file systems without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Busy(ValueError):
    """Another process trains in the folder."""


def holder(folder: str | Path) -> str | None:
    """The machine whose process is training in a folder; None if there is none."""
    beat = _beat(Path(folder))
    out = f"{folder}/{files.OUT}"
    if not os.path.isfile(out):
        return None
    with files.open_regular(out) as file:
        locked = _lock(file, fcntl.LOCK_SH)
    if locked is False:
        return beat["host"] if beat else socket.gethostname()
    return beat["host"] if _counts(beat, locked) else None


def clear(folder: str | Path) -> None:
    """Removes a killed process's heartbeat, if no process is training in the folder."""
    path = Path(folder, files.HEARTBEAT)
    if path.exists() and holder(folder) is None:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Inside, no other process trains in the folder, which must exist.

    Waits up to `wait_s` seconds for another process to end, or for its heartbeat to become stale.

    Raises:
        Busy: if another process holds the folder for longer.
        ValueError: if one of a run's files is something else, such as a folder.
    """
    deadline = time.monotonic() + wait_s
    try:
        _refuse_irregular(folder)
    except ValueError as error:
        files.note_failure(folder, f"error: {error}")
        raise
    with files.open_to_write(folder / files.OUT, "ab") as file:
        while not _taken(file, folder):
            if time.monotonic() >= deadline:
                raise Busy(
                    f"Another process trains in {folder}, on {holder(folder)}. Wait for it, or "
                    "choose another --output_dir. If you are sure that it is gone, delete "
                    f"{folder / files.HEARTBEAT}.")
            time.sleep(0.1)
        with _beating(folder / files.HEARTBEAT):
            yield


def _refuse_irregular(folder: Path) -> None:
    for name in files.REGULAR:
        if (folder / name).exists() and not (folder / name).is_file():
            raise ValueError(f"{folder / name} is not a regular file. Delete it, or choose "
                             "another --output_dir.")


def _lock(file, kind: int) -> bool | None:
    """Whether the file could be locked; None if its file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _boot() -> str:
    """An id of this machine that changes with each restart."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def _beat(folder: Path) -> dict | None:
    """The folder's heartbeat with its age in seconds; None if there is none."""
    path = folder / files.HEARTBEAT
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        found = files.read_json(path)
        return {"host": str(found["host"]), "boot": found["boot"], "pid": found["pid"], "age": age}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):  # being written, or damaged
        return {"host": "another machine", "boot": None, "pid": None, "age": age}


def _counts(beat: dict | None, locked: bool | None) -> bool:
    """Whether a heartbeat shows a live process, if the lock is free or unsupported."""
    if beat is None or abs(beat["age"]) > STALE_S:  # negative if a clock was wrong
        return False
    return locked is None or beat["boot"] != _boot()


def _taken(file, folder: Path) -> bool:
    """Tries to take lock and heartbeat."""
    locked = _lock(file, fcntl.LOCK_EX)
    if locked is False:
        return False
    path, found = folder / files.HEARTBEAT, _beat(folder)
    if not _counts(found, locked):
        if found:
            path.unlink(missing_ok=True)
        if _written(path):
            if found and found["boot"] != _boot():
                time.sleep(SETTLE_S)
            now = _beat(folder)
            if now and (now["boot"], now["pid"]) == (_boot(), os.getpid()):
                return True
    if locked:
        fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _written(path: Path) -> bool:
    """Writes a heartbeat of this process, unless there is one."""
    beat = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(beat))
    except FileExistsError:
        return False
    except OSError as error:
        error.filename = str(path)  # a failed write does not name its file
        raise
    return True


@contextlib.contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Inside, a thread touches the heartbeat; afterwards it is removed."""
    stop = threading.Event()

    def beat():
        while not stop.wait(BEAT_S):
            with contextlib.suppress(FileNotFoundError):  # the run reports a missing folder
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)
