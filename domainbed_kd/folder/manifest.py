"""What a sweep is: sweep.json in its folder, with an entry for each launch.

An entry has the flags of the sweep, as the words of a command line with every default spelt out
and plug-ins by their whole paths; the folder in which it was launched; the time; and versions.
So `sweep status`, `launch`, `plan` and `delete_incomplete` need the folder alone.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path

from domainbed_kd import __version__
from domainbed_kd.folder import files

NAME = "sweep.json"
_LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")


def launches(sweep: str | Path) -> list[dict]:
    """The entries of a sweep's launches, oldest first; none if nothing says what the sweep is.

    Each has its "flags", words of a command line, and "cwd", the folder in which it was launched.

    Raises:
        ValueError: if sweep.json is damaged.
        OSError: if it cannot be read.
    """
    path = Path(sweep, NAME)
    try:
        found = files.read_json(path)["launches"]
        is_sound = all(isinstance(entry["cwd"], str) and isinstance(entry["flags"], list)
                       and all(isinstance(word, str) and not word.startswith("@")
                               for word in entry["flags"])
                       for entry in found)
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). {_WITHOUT}") from None
    if not is_sound or not isinstance(found, list):
        raise ValueError(f"{path} does not list launches with their flags. {_WITHOUT}")
    return found


_WITHOUT = "Delete it and give the flags of the sweep's launch."


def add_launches(sweep: str | Path, flags: list[list[str]]) -> None:
    """Adds an entry for each list of flags; a folder that cannot be written to goes without.

    Args:
        sweep: folder of the sweep, which exists.
        flags: words of a command line.

    Raises:
        ValueError: if sweep.json is damaged.
    """
    entry = {"cwd": os.getcwd(), "versions": versions(),
             "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    with contextlib.suppress(OSError), _locked(sweep):
        before = launches(sweep)
        files.write_json(Path(sweep, NAME), {
            "launches": before + [{**entry, "flags": words} for words in flags]})


@contextlib.contextmanager
def _locked(sweep: str | Path) -> Iterator[None]:
    """Inside, no other launcher writes, as far as the file system has locks."""
    number = os.open(sweep, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def versions() -> dict[str, str]:
    """Those of Python, this package and what its results depend on most; nothing is imported."""
    found = {"domainbed_kd": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def completing_command(sweep: str | Path) -> str | None:
    """The command that runs what a sweep lacks; None if nothing in the folder says what it is."""
    try:
        if not launches(sweep):
            return None
    except (OSError, ValueError):
        return None
    return shlex.join(["python", "-m", "domainbed_kd.scripts.sweep", "launch", str(sweep)])
