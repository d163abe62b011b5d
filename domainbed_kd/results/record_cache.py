"""The parsed records of a large sweep, kept beside its runs so that the next read is quick.

The hidden file `.records.npz` holds the records of each run whose results.jsonl had this size and
modification time. It may be deleted at any time. It is written aside, then renamed, so readers
need no lock; where the folder cannot be written to, there is none. Sweeps of fewer than
`LEAST_RUNS` runs are read in no time and get none.
"""

import itertools
import os
import sys
import threading
import zipfile
from pathlib import Path

import msgspec

from domainbed_kd.folder.curves import Curve

LEAST_RUNS = 500
_FORMAT = 3


def load(path: Path) -> dict[str, tuple[tuple[int, int], list[Curve]]]:
    """{run: ((size in bytes, mtime in ns) of its results.jsonl, its curves)}; empty if none."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = msgspec.json.decode(arrays["index"])
            if index["format"] != _FORMAT:
                return {}
            return _curves(index, arrays["steps"].tolist(), arrays["values"].tolist())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError,
            zipfile.BadZipFile) as error:
        print(f"{path} cannot be read ({error}) and is rebuilt.", file=sys.stderr)
        return {}


def _curves(index: dict, steps: list, values: list) -> dict:
    steps, values, runs = iter(steps), iter(values), {}
    for name, stamp, found in index["runs"]:
        curves = []
        for n, shape, args, hparams in found:
            names, selection, problem = index["shapes"][shape]
            columns = [tuple(itertools.islice(steps, n)),
                       *itertools.islice(zip(*[values] * n), len(names) - 1)]
            if len(columns[0]) < n or len(columns) < len(names):
                raise ValueError("it is torn")
            curves.append(Curve(args, hparams, selection, dict(zip(names, columns)), problem))
        runs[name] = tuple(stamp), curves
    return runs


def save(path: Path, runs: dict[str, tuple[tuple[int, int], list[Curve]]]) -> None:
    """Writes what `load` reads, whole or not at all, without runs that would not come back equal.

    A folder that cannot be written to is named on stderr.
    """
    import numpy as np

    shapes, index, steps, values = {}, [], [], []
    for name, (stamp, curves) in runs.items():
        if not _survives(name, curves):
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
    beside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with beside.open("wb") as file:
            np.savez(file, index=np.frombuffer(text, np.uint8), steps=np.array(steps, np.int64),
                     values=np.array(values, np.float64))
        os.replace(beside, path)
    except OSError as error:
        print(f"Not written to {path}: {error.strerror}. It would make the next time quicker.",
              file=sys.stderr)
        beside.unlink(missing_ok=True)


def _survives(name: str, curves: list[Curve]) -> bool:
    """Whether a run comes back as it is: NaN, lone surrogates and whole accuracies do not."""
    kept = [[name, list(curve.columns), *curve[:3], curve.teacher_problem] for curve in curves]
    try:
        if msgspec.json.decode(msgspec.json.encode(kept)) != kept:
            return False
    except (ValueError, OverflowError, RecursionError):
        return False
    return all(set(map(type, column)) == {float} for curve in curves
               for key, column in curve.columns.items() if key != "step")
