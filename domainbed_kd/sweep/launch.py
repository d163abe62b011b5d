"""Launches a sweep's jobs, or deletes what is incomplete."""

import argparse
import contextlib
import functools
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

from domainbed_kd import algorithms, console, datasets
from domainbed_kd.folder import claims, files, manifest
from domainbed_kd.sweep import workers
from domainbed_kd.sweep.flags import for_manifest, of_plugins
from domainbed_kd.sweep.jobs import Job

# DomainBed's own jobs hold no claim; one that wrote this recently may be running.
RECENT_S = 600


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
        raise ValueError("Nobody can be asked, as the input is not a terminal. Pass "
                         "--skip_confirmation to go ahead.")
    try:
        answer = input("Are you sure? (y/n) ")
    except EOFError:  # Ctrl-D
        answer = ""
    if answer.strip().lower().startswith("y"):
        return True
    print("Nevermind!")
    return False


def asked_for(args: argparse.Namespace) -> list[dict]:
    """The hparams of --hparams and those of each point of --grid."""
    return [console.parse_hparams(args.hparams or "{}"), *json.loads(args.grid or "[]")]


def refuse_idle_mending(args: argparse.Namespace) -> None:
    """Refuses the hparam `mended` for methods that have nothing to fix."""
    if any(hparams.get("mended") for hparams in asked_for(args)):
        idle = [name for name in args.algorithms if name in algorithms.SHIPPED
                and not algorithms.get_algorithm_class(name).mends]
        if idle:
            raise ValueError(f"--hparams: mended has nothing to fix in {', '.join(idle)}. Launch "
                             "them without it.")


def refuse_teachers(all_jobs: list[Job]) -> None:
    """Refuses teachers that an algorithm cannot have, before any is trained."""
    asked = {(job.train_args["algorithm"], job.train_args.get("hparams"),
              job.train_args["dataset"]) for job in all_jobs}
    for name, text, dataset in sorted(asked, key=str):
        if text and ('"teacher' in text or '"distill' in text):
            from domainbed_kd.algorithms import composed

            task = datasets.facts(dataset).TASK.name
            composed.check(algorithms.get_algorithm_class(name),
                           console.parse_hparams(text) | {"task": task})


def warn_of_unread(args: argparse.Namespace) -> None:
    """Names --hparams that nothing reads; plug-ins may read any."""
    names = dict.fromkeys(name for hparams in asked_for(args) for name in hparams)
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

    The last launch says how. If the launcher does not block until its jobs end, folders in which
    nothing has begun are jobs in a queue.

    Returns:
        1 if jobs failed, were stopped, or belong to others and are not done; else 0.
    """
    args = launches[-1]
    launcher = with_options(launcher, args)
    for job in all_jobs:
        if job.state == Job.DONE:  # nobody else looks there again
            claims.clear(job.output_dir)
    queued = [] if is_blocking else [
        job for job in all_jobs if job.state == Job.NOT_LAUNCHED and job.has_folder]
    running = [job for job in all_jobs if job.state == Job.RUNNING]
    left = {id(job) for job in [*queued, *running]}
    new = [job for job in all_jobs if job.state != Job.DONE and id(job) not in left]
    ended = [job for job in new if job.state in (Job.INTERRUPTED, Job.FAILED)]
    print(f"About to launch {len(new)} jobs.")
    if ended:
        print(f"{len(ended)} of them ended early and go on where they were.", file=sys.stderr)
    for line in left_alone(running, queued):
        print(line, file=sys.stderr)
    if not new:
        return 1 if left else 0
    for each in launches:
        refuse_idle_mending(each)
        warn_of_unread(each)
    refuse_teachers(new)
    if launcher.func is workers.dummy:
        launcher([job.command_str for job in new])
        return 0
    if launcher.func in (workers.local, workers.multi_gpu):
        for each in launches:
            check_data(each)
    check_writable(args.output_dir)
    if is_blocking:
        launcher([])  # it refuses what it cannot use, before a folder is made
    if not confirmed(args):
        return 0
    with noted(launches):
        return 1 if run_all(new, launcher, is_blocking, args.retry) or not_done(running) else 0


def left_alone(running: list[Job], queued: list[Job]) -> Iterator[str]:
    """Lines about jobs that others run."""
    if running:
        example = running[0].output_dir
        yield (f"{len(running)} jobs are running and are left alone, as {example} on "
               f"{claims.holder(example) or 'this machine'}. Of one that is surely gone, delete "
               f"the file {files.HEARTBEAT} in its folder.")
    if queued:
        yield (f"{len(queued)} jobs wait for their launcher and are left alone. "
               "`delete_incomplete` with the same flags removes them, so that they can be "
               "launched again.")


def not_done(some: list[Job]) -> list[Job]:
    """The jobs that others run and that are not done; says how many."""
    some = [job for job in some if not job.is_done()]
    if some:
        print(f"{len(some)} jobs that others run are not done yet.", file=sys.stderr)
    return some


@contextlib.contextmanager
def noted(launches: list[argparse.Namespace]) -> Iterator[None]:
    """Inside, sweep.json has the launches; a new folder in which nothing begins is removed."""
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
        # Of another launcher folders of those that wait would seem to wait in its queue.
        failed += run(ready, launcher, retry, waiting if is_blocking else [])
        ready, waiting = by_teachers(waiting)
    waiting = ready + waiting
    if waiting:
        print(f"{len(waiting)} jobs are not launched, as their teachers have not finished. The "
              "same command launches them once these have.", file=sys.stderr)
    stopped = [job for job in failed if job.was_stopped]
    if stopped:
        print(f"{len(stopped)} jobs were stopped. The same command goes on with them.",
              file=sys.stderr)
    if errors := [job for job in failed if not job.was_stopped]:
        print(f"{len(errors)} of {len(new)} jobs failed:", file=sys.stderr)
        for job in errors:
            print(f"  {job.output_dir}: {job.why_failed()}", file=sys.stderr)
    others = not_done([job for job in new if job.was_taken and job not in failed])
    return bool(failed or others or waiting)


def by_teachers(some: list[Job]) -> tuple[list[Job], list[Job]]:
    """Jobs whose teachers are all done, and the others."""
    found = [], []
    for job in some:
        found[not all(teacher.is_done() for teacher in job.teachers)].append(job)
    return found


def run(some: list[Job], launcher: Callable, retry: int, later: list[Job] | tuple = ()
        ) -> list[Job]:
    """Launches the jobs, those that fail up to `retry` times more; returns what did not end well.

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
