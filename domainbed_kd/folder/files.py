"""What a run's folder tells besides its records: what it is to train, and why it failed.

A sweep leaves a job's arguments in `args.json` when it makes the folder. Runs of DomainBed, of
`train` by itself and of sweeps before there was that file have them in out.txt once they begin.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from domainbed_kd.folder import curves

ARGS = "args.json"
# Arguments in out.txt that are no text; the others are shown as they are.
_NO_TEXT = {"test_envs", "trial_seed", "hparams_seed", "seed", "steps", "checkpoint_freq",
            "holdout_fraction", "uda_holdout_fraction"}
_WORDS = {"None": None, "True": True, "False": False}


def leave_args(folder: str | Path, args: dict) -> None:
    """Says in a job's folder what it trains, for as long as it has no results."""
    with contextlib.suppress(OSError):  # it goes without, as it did in older sweeps
        Path(folder, ARGS).write_text(json.dumps(args, sort_keys=True) + "\n", encoding="utf-8")


def without_results(sweep: str | Path, names: Iterable[str]) -> list[dict]:
    """The arguments of those of a sweep's folders that tell them; `output_dir` is the folder."""
    found = ((f"{sweep}/{name}", _args(f"{sweep}/{name}")) for name in names)
    return [args | {"output_dir": folder} for folder, args in found if args]


def _args(folder: str) -> dict | None:
    for name, parse in ((ARGS, json.loads), ("out.txt", _last_args)):
        try:
            with open(f"{folder}/{name}", "rb", buffering=0) as file:  # read whole: no buffer
                args = parse(file.readall())
        except (OSError, ValueError):  # none there, or damaged: the other may tell
            continue
        if curves.are_args(args):
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
                      else json.loads(value) if name in _NO_TEXT else value)
    return args


def has_begun(folder: str | Path) -> bool:
    """Whether a run has ever begun in a folder."""
    return any(os.path.exists(f"{folder}/{name}") for name in ("out.txt", "results.jsonl"))


def is_waiting(folder: str | Path) -> bool:
    """Whether a job's folder is made and nothing has happened in it, as far as one may look."""
    return (os.path.isdir(folder) and os.access(folder, os.R_OK)
            and set(os.listdir(folder)) <= {ARGS})


def failure(folder: str | Path) -> str | None:
    """Why a run failed, in a line; None if it has not."""
    if not os.path.exists(f"{folder}/failed"):
        return None
    try:
        with open(f"{folder}/failed", encoding="utf-8", errors="replace") as file:
            return file.read().strip() or "no space was left on the disk to say why"
    except FileNotFoundError:  # it has just been started again
        return None
    except OSError as error:
        return f"why cannot be read ({error.strerror})"
