"""What reading a large sweep leaves beside its runs, so that it is quick the next time.

Two kinds of hidden files, which may be deleted at any time: `.records.npz` holds the parsed
records of runs whose results.jsonl had this size and modification time; `.answer-*.json` holds
what a script printed about exactly these runs, under exactly this version of our files. Each is
written aside, then renamed, so readers need no lock; where the folder cannot be written to, there
is none. Sweeps of fewer than `LEAST_RUNS` runs are read in no time and get none either.
"""

import functools
import hashlib
import io
import itertools
import json
import operator
import os
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import orjson

LEAST_RUNS = 500
_FORMAT = 1
_PACKAGE = Path(__file__).parent


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Writes a file whole or not at all; a folder that cannot be written to is named on stderr."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        print(f"Not written to {path}: {error.strerror}. It would make the next time quicker.",
              file=sys.stderr)
        if beside.exists():
            beside.unlink()


def load(path: Path) -> dict[str, tuple[tuple[int, int], list[dict]]]:
    """{run: ((size in bytes, mtime in ns) of its results.jsonl, its records)}; empty if none."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = orjson.loads(arrays["index"].tobytes())
            if index["format"] != _FORMAT:
                return {}
            steps, values = arrays["steps"].tolist(), arrays["values"].tolist()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"{path} cannot be read ({error}) and is made anew.", file=sys.stderr)
        return {}
    runs, steps, values = {}, iter(steps), iter(values)
    for name, size, mtime, n, shape, args, hparams in index["runs"]:
        names, selection = index["shapes"][shape]
        like = {**dict.fromkeys(names), "step": None, "args": args, "hparams": hparams}
        if selection is not None:
            like["selection"] = selection
        records = []
        for step in itertools.islice(steps, n):
            record = like.copy()  # in half the time of a new one
            record.update(zip(names, values))
            record["step"] = step
            records.append(record)
        runs[name] = (size, mtime), records
    return runs


def save(path: Path, runs: dict[str, tuple[tuple[int, int], list[dict]]]) -> None:
    """Writes what `load` reads; runs whose records are not all alike are left out."""
    import numpy as np

    shapes, index, steps, values = {}, [], [], []
    for name, (stamp, records) in runs.items():
        if not records:
            continue
        first, args, hparams = records[0], records[0]["args"], records[0]["hparams"]
        keys, selection = tuple(first), first.get("selection")
        if not all(tuple(r) == keys and r["args"] is args and r["hparams"] is hparams
                   and r.get("selection") == selection for r in records):
            continue
        names, accuracies = _accuracies(keys)
        of_run = list(itertools.chain.from_iterable(map(accuracies, records)))
        settings = *args.values(), *hparams.values()
        if set(map(type, of_run)) != {float} or any(map(operator.ne, settings, settings)):  # NaN
            continue
        shape = shapes.setdefault((names, selection), len(shapes))
        index.append((name, *stamp, len(records), shape, args, hparams))
        steps += [record["step"] for record in records]
        values += of_run
    text = orjson.dumps({"format": _FORMAT, "shapes": list(shapes), "runs": index})
    content = io.BytesIO()
    np.savez(content, index=np.frombuffer(text, np.uint8),
             steps=np.array(steps, np.int64), values=np.array(values, np.float64))
    _replace(path, content.getbuffer())


@functools.cache
def _accuracies(names: tuple[str, ...]) -> tuple[tuple[str, ...], Callable]:
    """The accuracies among a record's names, and what takes them out of it."""
    wanted = tuple(n for n in names if n.endswith("_acc"))
    pick = operator.itemgetter(*wanted)
    return wanted, pick if len(wanted) > 1 else lambda record: [pick(record)]


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
    _replace(path, json.dumps({"of": of, "answer": answer}).encode())
