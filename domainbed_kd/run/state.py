"""Saves and restores a run's state."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from domainbed_kd import checkpoints
from domainbed_kd.folder import files
from domainbed_kd.folder.args import identity
from domainbed_kd.run.build import Run
from domainbed_kd.run.diagnostics import Diagnostics
from domainbed_kd.run.records import Pending


def _refuse_other_run(folder: Path, found: dict, args: dict) -> None:
    found, asked = identity(found), identity(args)
    if changed := sorted(name for name in found if found[name] != asked[name]):
        changes = ", ".join(f"{name} {found[name]} instead of {asked[name]}" for name in changed)
        raise ValueError(f"{folder} holds another run ({changes}). Choose another --output_dir, "
                         "or pass --resume never to append to it.")


def already_finished(folder: Path, args: dict) -> bool:
    """Whether a folder holds this run, finished."""
    if not files.is_done(folder) or not (folder / files.RESULTS).exists():
        return False
    found = files.first_args(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds a finished run, but the first line of its {files.RESULTS} is not a "
            "record. Delete the folder to train again, or choose another --output_dir.")
    _refuse_other_run(folder, found, args)
    return True


def save(run: Run, pending: Pending, diagnostics: Diagnostics | None, next_step: int) -> None:
    """Saves everything that the steps from `next_step` on depend on."""
    results = run.folder / files.RESULTS
    pending.settle()
    checkpoints.save(run.folder / files.STATE, {
        "args": run.args,
        "next_step": next_step,
        "stage": run.stage.state_dict() if run.stage else None,
        "algorithm": checkpoints.algorithm_state(run.algorithm),
        "loaders": [loader.state_dict() for loader in run.loaders.all()],
        "random": checkpoints.random_state(),
        "pending": dict(pending.values),
        "diagnostics": diagnostics.state_dict() if diagnostics else None,
        "results_bytes": results.stat().st_size if results.exists() else 0})


def of_stage(folder: Path) -> dict | None:
    """The saved state of a run's stage; None if nothing was saved."""
    path = folder / files.STATE
    return checkpoints.load(path).get("stage") if path.exists() else None


def restore(run: Run, pending: Pending, diagnostics: Diagnostics | None) -> int:
    """Restores what `save` saved, and returns the next step.

    Records written after the state was saved are removed, as they will be written again. Without a
    state, an unfinished run's records are renamed to results.jsonl.old; a single one is deleted.
    """
    folder, results, state_path = run.folder, run.folder / files.RESULTS, run.folder / files.STATE
    files.remove_half_written(folder)
    if not state_path.exists():
        if results.exists():
            if results.read_bytes().count(b"\n") > 1:
                results.replace(folder / files.OLD_RESULTS)
            else:
                results.unlink()
        return 0
    state = checkpoints.load(state_path)
    size = results.stat().st_size if results.exists() else 0
    afresh = f"Delete {state_path}, and the run starts again from its first step."
    try:
        _refuse_other_run(folder, state["args"], run.args)
        if size < state["results_bytes"]:
            raise ValueError(f"{results} has {size} bytes, but {state['results_bytes']} when the "
                             f"run's state was saved: records are lost. {afresh}")
        _put_back(state, run, pending, diagnostics)
        first_step = state["next_step"]
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{state_path} does not fit this run ({type(error).__name__}: {reason})."
                         f" {afresh}") from error
    if results.exists():
        os.truncate(results, state["results_bytes"])
    print(f"Continuing at step {first_step}.", file=sys.stderr)
    return first_step


def _put_back(state: dict, run: Run, pending: Pending, diagnostics: Diagnostics | None) -> None:
    if run.stage:
        run.stage.load_state_dict(state["stage"])
    checkpoints.load_algorithm_state(run.algorithm, state["algorithm"])
    for loader, loader_state in zip(run.loaders.all(), state["loaders"]):
        loader.load_state_dict(loader_state)
    checkpoints.set_random_state(state["random"])
    pending.values.update(state["pending"])
    if diagnostics and state["diagnostics"]:
        diagnostics.load_state_dict(state["diagnostics"])
    elif diagnostics:  # the run began without them
        diagnostics.distance.restart()
        print("--diagnostics: weight distances are counted from step "
              f"{state['next_step']} on, as the run began without this flag.", file=sys.stderr)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM, SIGUSR1 and SIGUSR2 only make the yielded function return True."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, lambda *_: received.append(True))
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
