"""A sweep's manifest: sweep.json in its folder, with an entry for each launch.

An entry has the sweep's flags, as words of a command line with every default and with plug-ins by
absolute path; the properties of plug-ins' algorithms and datasets that listing the runs needs; the
working directory; the time; and versions. So `sweep status`, `launch`, `plan` and
`delete_incomplete` need only the folder, and commands that train nothing import no plug-ins.
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
from domainbed_kd.folder.args import MOST_ENVS

NAME = "sweep.json"
_LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")


def launches(sweep: str | Path) -> list[dict]:
    """The entries of a sweep's launches, oldest first; empty without a manifest.

    Each has its "flags", words of a command line, and "cwd", its working directory. It may have
    "of_plugins": {"algorithms": {name: {"learns_from_run": bool}}, "datasets": {name: {"n_envs",
    "N_STEPS", "CHECKPOINT_FREQ": int}}}.

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
                       and _are_facts(entry.get("of_plugins", {}))
                       for entry in found)
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}). {_WITHOUT}") from None
    if not is_sound or not isinstance(found, list):
        raise ValueError(f"{path} does not list launches with their flags. {_WITHOUT}")
    return found


_WITHOUT = "Delete it and give the flags of the sweep's launch."


def _are_facts(of_plugins: dict) -> bool:
    """Whether an entry's "of_plugins" is as `launches` says, with valid numbers."""
    return (all(set(facts) == {"learns_from_run"} and type(facts["learns_from_run"]) is bool
                for facts in of_plugins.get("algorithms", {}).values())
            and all(set(facts) == {"n_envs", "N_STEPS", "CHECKPOINT_FREQ"}
                    and all(type(n) is int and n > 0 for n in facts.values())
                    and facts["n_envs"] <= MOST_ENVS
                    for facts in of_plugins.get("datasets", {}).values()))


def add_launches(sweep: str | Path, entries: list[dict]) -> None:
    """Adds entries, with "flags" and "of_plugins", for launches made now from here; see `launches`.

    A folder that cannot be written to gets none.
    """
    now = {"cwd": os.getcwd(), "versions": versions(),
           "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    with contextlib.suppress(OSError), _locked(sweep):
        before = launches(sweep)
        files.write_json(Path(sweep, NAME), {
            "launches": before + [now | entry for entry in entries]})


@contextlib.contextmanager
def _locked(sweep: str | Path) -> Iterator[None]:
    """Inside, no other launcher writes, if the file system supports locks."""
    number = os.open(sweep, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that affect results; imports nothing."""
    found = {"domainbed_kd": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def completing_command(sweep: str | Path) -> str | None:
    """The command that completes a sweep; None without a valid manifest."""
    try:
        if not launches(sweep):
            return None
    except (OSError, ValueError):
        return None
    return shlex.join(["python", "-m", "domainbed_kd.scripts.sweep", "launch", str(sweep)])
