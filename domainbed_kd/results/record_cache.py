"""What reading a large sweep leaves beside its runs, so that it is quick the next time.

Two kinds of hidden files, which may be deleted at any time: `.records.npz` holds the parsed
records of runs whose results.jsonl had this size and modification time; `.answer-*.json` holds
what a script printed about exactly these runs, under exactly this version of our files. Each is
written aside, then renamed, so readers need no lock; where the folder cannot be written to, there
is none. Sweeps of fewer than `LEAST_RUNS` runs are read in no time and get none either.
"""

import hashlib
import itertools
import json
import operator
import os
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from domainbed_kd.folder.curves import Curve

LEAST_RUNS = 500
_FORMAT = 3
_PACKAGE = Path(__file__).parents[1]


def _replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file whole or not at all; a folder that cannot be written to is named on stderr."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with beside.open("wb") as file:
            write(file)
        os.replace(beside, path)
    except OSError as error:
        print(f"Not written to {path}: {error.strerror}. It would make the next time quicker.",
              file=sys.stderr)
        if beside.exists():
            beside.unlink()


def load(path: Path) -> dict[str, tuple[tuple[int, int], list[Curve]]]:
    """{run: ((size in bytes, mtime in ns) of its results.jsonl, its curves)}; empty if none."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = msgspec.json.decode(arrays["index"])
            if index["format"] != _FORMAT:
                return {}
            steps, values = iter(arrays["steps"].tolist()), iter(arrays["values"].tolist())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"{path} cannot be read ({error}) and is made anew.", file=sys.stderr)
        return {}
    runs = {}
    for name, stamp, found in index["runs"]:
        curves = []
        for n, shape, args, hparams in found:
            names, selection, problem = index["shapes"][shape]
            columns = itertools.islice(zip(*[values] * n), len(names) - 1)
            columns = dict(zip(names, (tuple(itertools.islice(steps, n)), *columns)))
            curves.append(Curve(args, hparams, selection, columns, problem))
        runs[name] = tuple(stamp), curves
    return runs


def save(path: Path, runs: dict[str, tuple[tuple[int, int], list[Curve]]]) -> None:
    """Writes what `load` reads; runs whose settings JSON cannot hold are left out."""
    import numpy as np

    shapes, index, steps, values = {}, [], [], []
    for name, (stamp, curves) in runs.items():
        settings = [value for curve in curves
                    for value in (*curve.args.values(), *curve.hparams.values())]
        if any(map(operator.ne, settings, settings)):  # NaN
            continue
        entries = []
        for curve in curves:
            step, *columns = curve.columns.values()
            shape = shapes.setdefault(
                (tuple(curve.columns), curve.selection, curve.teacher_problem), len(shapes))
            entries.append((len(step), shape, curve.args, curve.hparams))
            steps += step
            values += itertools.chain.from_iterable(columns)
        index.append((name, stamp, entries))
    text = msgspec.json.encode({"format": _FORMAT, "shapes": list(shapes), "runs": index})
    _replace(path, lambda file: np.savez(
        file, index=np.frombuffer(text, np.uint8), steps=np.array(steps, np.int64),
        values=np.array(values, np.float64)))


def fingerprint(stamps: dict[str, tuple[int, int] | None]) -> str:
    """A digest of which runs there are, with size and mtime, and of every file of our package."""
    ours = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns)
                  for path in _PACKAGE.rglob("*.*") if path.suffix != ".pyc")
    return hashlib.md5(repr((list(stamps.items()), ours)).encode()).hexdigest()


def answer_path(folder: Path, *question: str) -> Path:
    """Where the answer to a question, such as a script's flags, is kept."""
    return folder / f".answer-{hashlib.md5(repr(question).encode()).hexdigest()[:12]}.json"


def load_answer(path: Path, of: str) -> list[str] | None:
    """The answer when the sweep had this fingerprint; None if that is not kept."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["answer"] if kept["of"] == of else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path} cannot be read ({error}) and is made anew.", file=sys.stderr)
        return None


def save_answer(path: Path, of: str, answer: list[str]) -> None:
    """Keeps an answer."""
    _replace(path, lambda file: file.write(json.dumps({"of": of, "answer": answer}).encode()))
