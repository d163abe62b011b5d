"""Launches a sweep's jobs, or deletes what is incomplete."""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from domainbed_kd import algorithms, console, datasets
from domainbed_kd.folder import claims, composition, files, manifest
from domainbed_kd.sweep import listing, workers
from domainbed_kd.sweep.flags import for_manifest, of_plugins
from domainbed_kd.sweep.jobs import Job

# A job of DomainBed's own code holds no claim. One that wrote within this time may be running.
RECENT_S = 600
# The arguments on which the check of hparams depends.
_DECISIVE = ("algorithm", "hparams", "dataset", "test_envs")


def with_options(launcher: Callable, args: argparse.Namespace) -> Callable:
    """The launcher with the options it takes."""
    names = [name for name in vars(args) if name.startswith(("slurm_", "ray_"))]
    options = {name: getattr(args, name) for name in ("jobs_per_device", "threads_per_job", *names)
               if getattr(args, name) is not None}
    if unknown := sorted(options.keys() - inspect.signature(launcher).parameters.keys()):
        other = unknown[0].partition("_")[0]
        hint = f" It is for --command_launcher {other}." if other in ("slurm", "ray") else ""
        raise ValueError(
            f"The launcher {args.command_launcher} does not take --{unknown[0]}.{hint}")
    return functools.partial(launcher, **options)


def check_data(args: argparse.Namespace) -> None:
    """Refuses a sweep whose data are not on this machine."""
    for name in args.datasets:
        cls = datasets.get_dataset_class(name)
        if cls.NEEDS_FILES and not os.path.isdir(folder := cls.folder(args.data_dir)):
            raise FileNotFoundError(f"{name}: there is no folder {folder}. Pass --data_dir, or "
                                    "fetch the data with `domainbed-kd download`.")


def check_writable(folder: str) -> None:
    """Refuses a folder in which no file can be made."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except FileNotFoundError:
        return
    except OSError as error:
        error.filename = folder
        raise


def confirmed(args: argparse.Namespace) -> bool:
    """Whether the user agrees."""
    if args.skip_confirmation:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise ValueError("Cannot ask for confirmation, as the input is not a terminal. Pass "
                         "--skip_confirmation to go ahead.")
    try:
        answer = input("Are you sure? (y/n) ")
    except EOFError:  # Ctrl-D
        answer = ""
    if answer.strip().lower().startswith("y"):
        return True
    print("Nevermind!")
    return False


def check_hparams(launches: list[argparse.Namespace], new: list[Job]) -> None:
    """Refuses hparams that jobs cannot have, before any is trained; names those nobody reads."""
    for args in launches:
        refuse_idle_mending(args)
        for warning in itertools.chain(*map(composition.named_twice, given_hparams(args))):
            print(warning, file=sys.stderr)
        warn_of_unread(args)
    refuse_teachers(new)


def given_hparams(args: argparse.Namespace) -> list[dict]:
    """The hparams of --hparams, then those of each point of --grid."""
    return [console.parse_hparams(args.hparams or "{}"), *json.loads(args.grid or "[]")]


def refuse_idle_mending(args: argparse.Namespace) -> None:
    """Refuses the hparam `mended` for methods in which there is nothing to fix."""
    if any(hparams.get("mended") for hparams in given_hparams(args)):
        idle = [name for name in args.algorithms if name in algorithms.SHIPPED
                and not algorithms.get_algorithm_class(name).mends]
        if idle:
            raise ValueError(f"--hparams: mended has nothing to fix in {', '.join(idle)}. Launch "
                             "them without it.")


def refuse_teachers(some: list[Job]) -> None:
    """Refuses teachers and averages that jobs cannot have; imports torch where any are given.

    Jobs without them, and plug-ins that are not loaded, are left to their own start.
    """
    checked = {*composition.OWN, "label_smoothing"}
    # A large sweep has few texts of hparams, so that each is parsed once.
    texts = {text for text in {job.train_args.get("hparams") for job in some}
             if text and checked & console.parse_hparams(text).keys()}
    asked = {str([each.train_args.get(name) for name in _DECISIVE]): each.train_args
             for job in some if job.train_args.get("hparams") in texts
             for each in (*job.teachers, job)}
    for _, train_args in sorted(asked.items()):
        _refuse_teachers(train_args)


def _refuse_teachers(train_args: dict) -> None:
    from domainbed_kd import backbones, clip_teacher, hparams_registry, teachers
    from domainbed_kd.algorithms import base, composed

    cls = algorithms.get_algorithm_class(train_args["algorithm"])
    if not issubclass(cls, base.Algorithm):
        return
    dataset, hparams = train_args["dataset"], listing.hparams_of(train_args)
    hparams_registry.refuse_label_smoothing(train_args["algorithm"], train_args.get("hparams"))
    composed.check(cls, hparams | {"task": datasets.facts(dataset).TASK.name})
    asked = (*composition.teachers(hparams), composition.teacher_of_method(hparams))
    for teacher in filter(None, asked):
        if teacher.kind == "folder":
            teachers.saved_by_run(Path(teacher.name), dataset, train_args["test_envs"])
        elif teacher.kind == "clip" and teacher.name not in (None, "tiny"):
            clip_teacher.check_name(teacher.name)
        elif isinstance(backbone := teacher.hparams.get("backbone"), str):
            backbones.check_name(backbone)


def warn_of_unread(args: argparse.Namespace) -> None:
    """Names --hparams that nothing reads. Plug-ins may read any."""
    names = dict.fromkeys(name for hparams in given_hparams(args) for name in hparams)
    if not names or args.plugin or not set(args.algorithms) <= set(algorithms.SHIPPED):
        return
    known = algorithms.hparam_names()
    for name in names:
        if name not in known:
            print(f"--hparams: nothing here reads {name!r}.{console.did_you_mean(name, known)}",
                  file=sys.stderr)


def launch(launches: list[argparse.Namespace], all_jobs: list[Job], launcher: Callable,
           is_blocking: bool) -> int:
    """Runs the jobs that have not begun, and continues those that were interrupted or failed.

    The last launch says how they are run. A launcher that does not block until its jobs end leaves
    them in a queue: folders in which nothing has begun are such jobs.

    Returns:
        1 if jobs failed, were stopped, or belong to others and are not done; else 0.
    """
    args = launches[-1]
    launcher = with_options(launcher, args)
    by_state = defaultdict(list)
    for job in all_jobs:
        is_queued = job.state == Job.NOT_LAUNCHED and job.has_folder and not is_blocking
        by_state["queued" if is_queued else job.state].append(job)
    for job in by_state[Job.DONE]:
        claims.clear(job.output_dir)  # nobody else looks there again
    ended = by_state[Job.INTERRUPTED] + by_state[Job.FAILED]
    running, queued = by_state[Job.RUNNING], by_state["queued"]
    left = {id(job) for job in by_state[Job.DONE] + running + queued}
    new = [job for job in all_jobs if id(job) not in left]
    print(f"About to launch {len(new)} jobs.")
    if ended:
        print(f"{len(ended)} of them ended early and continue where they were.", file=sys.stderr)
    name_left_alone(running, queued)
    if not new:
        return 1 if running or queued else 0
    check_hparams(launches, new)
    if launcher.func is workers.dummy:
        launcher([job.command_str for job in new])
        return 0
    if launcher.func in (workers.local, workers.multi_gpu):
        for each in launches:
            check_data(each)
    check_writable(args.output_dir)
    if is_blocking:
        launcher([])  # it refuses options that it cannot use, before a folder is made
    if not confirmed(args):
        return 0
    with noted(launches):
        return 1 if run_all(new, launcher, is_blocking, args.retry) or not_done(running) else 0


def name_left_alone(running: list[Job], queued: list[Job]) -> None:
    """Prints which jobs are left to other processes."""
    if running:
        example = running[0].output_dir
        print(f"{len(running)} jobs are running and are left alone, for example {example} on "
              f"{claims.holder(example) or 'this machine'}. If its process is certainly gone, "
              f"delete the file {files.HEARTBEAT} in the folder.", file=sys.stderr)
    if queued:
        print(f"{len(queued)} jobs wait for their launcher and are left alone. "
              "`delete_incomplete` with the same flags removes them, so that they can be launched "
              "again.", file=sys.stderr)


def not_done(some: list[Job]) -> list[Job]:
    """Those of the jobs, which others run, that are not done; prints how many."""
    some = [job for job in some if not job.is_done()]
    if some:
        print(f"{len(some)} jobs that others run are not done yet.", file=sys.stderr)
    return some


@contextlib.contextmanager
def noted(launches: list[argparse.Namespace]) -> Iterator[None]:
    """Writes the launches to sweep.json; removes a new folder if nothing begins in it."""
    folder = launches[-1].output_dir
    is_new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    manifest.add_launches(folder, [
        {"flags": for_manifest(args), "of_plugins": of_plugins(args)} for args in launches])
    try:
        yield
    except BaseException:
        if is_new and set(os.listdir(folder)) <= {manifest.NAME}:
            with contextlib.suppress(OSError):  # another launcher has just begun here
                os.unlink(os.path.join(folder, manifest.NAME))
                os.rmdir(folder)
        raise


def run_all(new: list[Job], launcher: Callable, is_blocking: bool, retry: int) -> bool:
    """Runs jobs, teachers first, and reports them; returns whether any is not done."""
    ready, waiting = by_teachers(new)
    if waiting:
        print(f"{len(waiting)} of them wait for their teachers and are counted after these.",
              file=sys.stderr)
    failed = []
    while ready and not any(job.was_stopped for job in failed):
        # With a launcher that does not block, folders made now would look like jobs in its queue.
        failed += run(ready, launcher, retry, waiting if is_blocking else [])
        ready, waiting = by_teachers(waiting)
    waiting = ready + waiting
    if waiting:
        print(f"{len(waiting)} jobs are not launched, as their teachers have not finished. When "
              "they have, the same command launches these jobs.", file=sys.stderr)
    stopped = [job for job in failed if job.was_stopped]
    if stopped:
        print(f"{len(stopped)} jobs were stopped. The same command continues them.",
              file=sys.stderr)
    if errors := [job for job in failed if not job.was_stopped]:
        print(f"{len(errors)} of {len(new)} jobs failed:", file=sys.stderr)
        for job in errors:
            print(f"  {job.output_dir}: {job.why_failed()}", file=sys.stderr)
    others = not_done([job for job in new
                       if job.exit_status == claims.BUSY and job not in failed])
    return bool(failed or others or waiting)


def by_teachers(some: list[Job]) -> tuple[list[Job], list[Job]]:
    """The jobs whose teachers are all done, and the others."""
    found = [], []
    for job in some:
        found[not all(teacher.is_done() for teacher in job.teachers)].append(job)
    return found


def run(some: list[Job], launcher: Callable, retry: int, later: list[Job] | tuple = ()
        ) -> list[Job]:
    """Launches the jobs, and those that fail up to `retry` times again; returns the unfinished.

    Once somebody has stopped jobs, nothing is launched again.
    """
    ended = Job.launch(some, launcher, later)
    for _ in range(retry):
        if not ended or any(job.was_stopped for job in ended):
            break
        print(f"{len(ended)} jobs failed and are launched again.", file=sys.stderr)
        ended = Job.launch(ended, launcher)
    return ended


def delete_incomplete(args: argparse.Namespace, all_jobs: list[Job]) -> int:
    """Removes the folders of jobs that are neither done nor running."""
    doomed = [job for job in all_jobs
              if job.has_folder and job.state not in (Job.DONE, Job.RUNNING)]
    if n_running := sum(job.state == Job.RUNNING for job in all_jobs):
        print(f"{n_running} jobs are running and are kept.", file=sys.stderr)
    print(f"About to delete {len(doomed)} jobs.")
    if not doomed:
        return 0
    if n_fresh := sum(job.wrote_within(RECENT_S) for job in doomed):
        print(f"{n_fresh} of them wrote in the last {RECENT_S // 60} minutes. If DomainBed itself "
              "trains them, they may be running.", file=sys.stderr)
    if confirmed(args):
        Job.delete(doomed)
    return 0
