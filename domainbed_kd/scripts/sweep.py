"""Launches the many runs behind a table, counts them, or deletes incomplete ones.

`launch` runs what is not done, in the order of the list (DomainBed shuffles it without a seed,
which only changes who waits for whom), and goes on with what was interrupted or failed.
Methods that learn from a trained network wait for the ERM run of the same data set, trial and
test domains, which is added where it is missing.
Flags may stand in a file, given as @FILE: any number a line, quoted as in a shell, with #
comments; flags after it on the command line win.
"""

import argparse
import functools
import glob
import inspect
import math
import os
import shlex
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable

from domainbed_kd import algorithms, command_launchers, console, datasets, extensions
from domainbed_kd.console import Parser, run_main
from domainbed_kd.folder import claims, files
from domainbed_kd.folder.args import FLAGS, add_flags, of_sweep, off_record
from domainbed_kd.folder.args import check as check_runs
from domainbed_kd.sweep import clusters, costs, jobs, workers
from domainbed_kd.sweep.jobs import Job

# DomainBed's default: all but its debug datasets.
DEFAULT_DATASETS = [name for name in datasets.DOMAINBED if datasets.facts(name).NEEDS_FILES]
# DomainBed's own jobs hold no claim; one that wrote this recently may be running.
RECENT_S = 600


class _Parser(Parser):
    """Reads the lines of an @FILE as a shell would."""

    def _read_args_from_files(self, arg_strings):
        for word in arg_strings:
            if word.startswith("@") and not os.path.isfile(word[1:]):
                there = glob.glob(os.path.join(glob.escape(os.path.dirname(word[1:])), "*.args"))
                self.error(f"{word}: No such file. After the @ comes the path of one that holds "
                           f"flags.{console.did_you_mean(word, [f'@{path}' for path in there])}")
        return super()._read_args_from_files(arg_strings)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            self.error(f"{error} in a line of the @FILE: {arg_line}")


def build_parser() -> argparse.ArgumentParser:
    """DomainBed's flags, then ours."""
    parser = _Parser(
        prog="python -m domainbed_kd.scripts.sweep", description=__doc__,
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            f"{kind}: {', '.join([*known, *extensions.names(kind)])}"
            for kind, known in (("algorithms", algorithms.ALGORITHMS),
                                ("datasets", [*datasets.DATASETS, "Folder:NAME"]),
                                ("launchers", [*command_launchers.REGISTRY, "module:function"]))))
    parser.add_argument("command", choices=["launch", "delete_incomplete", "status", "plan"],
                        help="run what is not done, or go on with it; delete the folders of jobs "
                             "that are neither done nor running; count jobs by state; tell what "
                             "the sweep will cost")
    parser.add_argument("--datasets", nargs="+", default=DEFAULT_DATASETS, metavar="NAME",
                        help="default: all of DomainBed's but the Debug ones")
    parser.add_argument("--algorithms", nargs="+", default=list(algorithms.ALGORITHMS),
                        metavar="NAME", help="default: all that ship")
    parser.add_argument("--n_hparams_from", type=int, default=0, metavar="SEED",
                        help="first hparams seed, 0 being the defaults; default: 0")
    parser.add_argument("--n_hparams", type=int, default=20, metavar="SEED",
                        help="hparams seed after the last; default: 20")
    parser.add_argument("--output_dir", required=True, help="folder of the sweep")
    parser.add_argument("--seed", type=int, default=0, help="has no effect, as in DomainBed")
    parser.add_argument("--n_trials", type=int, default=3, metavar="N",
                        help="trials, that is splits and random hparams, of each; default: 3")
    parser.add_argument("--command_launcher", default="local", metavar="NAME",
                        help="default: local")
    parser.add_argument("--single_test_envs", action="store_true",
                        help="hold out single domains only; leave-one-out model selection needs "
                             "the pairs too")
    parser.add_argument("--skip_confirmation", action="store_true", help="ask nothing")
    of_runs = parser.add_argument_group(
        "of each run", "as `train` takes them; DomainBed's sweep has the first five")
    add_flags(of_runs, FLAGS.values(), for_sweep=True)
    ours = parser.add_argument_group("beyond DomainBed")
    ours.add_argument("--retry", type=int, default=0, metavar="N",
                      help="launch: start jobs that fail up to N times more; default: 0")
    ours.add_argument("--watch", type=float, nargs="?", const=5.0, metavar="SECONDS",
                      help="status: show it again every so often, by itself every 5 seconds, "
                           "until all jobs are done")
    ours.add_argument("--hours_per_run", type=float, metavar="HOURS",
                      help="plan: what a run takes where no run in the folder has measured it")
    ours.add_argument("--budget", type=float, metavar="HOURS",
                      help="plan: print the most trials and seeds of hparams that the "
                           "launcher can finish in so long")
    ours.add_argument("--jobs_per_device", type=int, metavar="N",
                      help="jobs at a time, on each GPU if there are several; default: 1")
    ours.add_argument("--threads_per_job", type=int, metavar="N",
                      help="CPU threads of a job; default: the cores shared out evenly")
    slurm = parser.add_argument_group("launcher slurm", "see docs/clusters.md")
    slurm.add_argument("--slurm_partition", metavar="NAME", help="default: the cluster's own")
    slurm.add_argument("--slurm_gpus", type=int, metavar="N", help="GPUs of a job; default: 1")
    slurm.add_argument("--slurm_cpus", type=int, metavar="N", help="CPUs of a job; default: 4")
    slurm.add_argument("--slurm_time", type=int, metavar="MINUTES",
                       help="after so long a job saves its state and queues again; default: 1440")
    slurm.add_argument("--slurm_parallel", type=int, metavar="N",
                       help="jobs at a time; default: 256")
    slurm.add_argument("--slurm_extra", metavar="JSON",
                       help="object of further submitit parameters, as "
                            "'{\"slurm_account\": \"me\"}'")
    slurm.add_argument("--slurm_logs", metavar="FOLDER",
                       help="where submitit keeps its files; default: slurm_logs")
    slurm.add_argument("--slurm_cluster", choices=["slurm", "local"],
                       help="local: try it on this machine, without Slurm")
    ray = parser.add_argument_group("launcher ray", "see docs/clusters.md")
    ray.add_argument("--ray_address", metavar="ADDRESS",
                     help="of a running cluster, or auto; default: one on this machine")
    ray.add_argument("--ray_gpus", type=float, metavar="SHARE",
                     help="GPUs of a job, such as 0.5; default: 1 where there are any")
    ray.add_argument("--ray_cpus", type=float, metavar="N", help="CPUs of a job; default: 1")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses values that no sweep can use.

    Raises:
        ValueError: naming the flag, what was found and what it takes.
    """
    check_runs(args)
    lowest = {"n_trials": 1, "n_hparams_from": 0,
              "jobs_per_device": 1, "threads_per_job": 1, "retry": 0,
              "slurm_gpus": 0, "slurm_cpus": 1, "slurm_time": 1, "slurm_parallel": 1,
              "ray_gpus": 0, "ray_cpus": 0}
    for name, low in lowest.items():
        if (value := getattr(args, name)) is not None and not low <= value < math.inf:
            raise ValueError(f"--{name} is {value}; it takes a number from {low} up.")
    for name in ("hours_per_run", "budget"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; it takes a number of hours above 0.")
    if args.watch is not None and not 0 < args.watch < math.inf:
        raise ValueError(f"--watch is {args.watch}; it takes a number of seconds above 0.")
    if args.n_hparams <= args.n_hparams_from:
        raise ValueError(
            f"--n_hparams is {args.n_hparams} and --n_hparams_from {args.n_hparams_from}: no seed "
            "is left. The one is the hparams seed after the last, not a count.")
    if args.task == "domain_adaptation" and not args.uda_holdout_fraction:
        raise ValueError("--task domain_adaptation needs unlabeled images of the test domains. "
                         "Pass --uda_holdout_fraction, for example 0.5.")
    clusters.parse_extra(args.slurm_extra)
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise NotADirectoryError(f"--output_dir {args.output_dir} is a file; it takes a folder.")


def resolve_names(args: argparse.Namespace) -> None:
    """Loads plug-ins and puts each name as it is registered, once.

    Raises:
        NotImplementedError: if a name is unknown.
    """
    extensions.load(args.plugin, [*args.algorithms, *args.datasets, args.command_launcher])
    args.algorithms = list(dict.fromkeys(
        name if name in algorithms.ALGORITHMS else algorithms.get_algorithm_class(name).__name__
        for name in args.algorithms))
    args.datasets = list(dict.fromkeys(
        datasets.get_dataset_class(name, args.data_dir).__name__ for name in args.datasets))


def make_launcher(args: argparse.Namespace) -> Callable:
    """The launcher with the options it takes.

    Raises:
        NotImplementedError: if it is unknown.
        ValueError: if an option is given that it does not take.
    """
    launcher = command_launchers.get_launcher(args.command_launcher)
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
    """Refuses a sweep whose data are not on this machine.

    Raises:
        ValueError, FileNotFoundError: naming the data set and the folder.
    """
    for name in args.datasets:
        cls = datasets.get_dataset_class(name)
        if cls.NEEDS_FILES and not os.path.isdir(folder := cls.folder(args.data_dir)):
            raise FileNotFoundError(f"{name}: there is no folder {folder}. Pass --data_dir, or "
                                    "fetch the data with `domainbed-kd download`.")


def check_writable(folder: str) -> None:
    """Refuses a folder in which no file can be made.

    Raises:
        OSError: saying why; none if there is no folder yet.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except FileNotFoundError:
        return
    except OSError as error:
        error.filename = folder
        raise


def confirmed(args: argparse.Namespace) -> bool:
    """Whether the user agrees.

    Raises:
        ValueError: if nobody can be asked.
    """
    if args.skip_confirmation:
        return True
    if sys.stdin is None or not sys.stdin.isatty():
        raise ValueError("Nobody can be asked, as the input is no terminal. Pass "
                         "--skip_confirmation to go ahead.")
    try:
        answer = input("Are you sure? (y/n) ")
    except EOFError:  # Ctrl-D
        answer = ""
    if answer.strip().lower().startswith("y"):
        return True
    print("Nevermind!")
    return False


def warn_of_unread(args: argparse.Namespace) -> None:
    """Names --hparams that nothing reads; each job knows better, but says so only in its err.txt.

    What comes from elsewhere may read any.
    """
    if args.hparams is None or args.plugin or not set(args.algorithms) <= set(algorithms.SHIPPED):
        return
    known = algorithms.hparam_names()
    for name in console.parse_hparams(args.hparams):
        if name not in known:
            print(f"--hparams: nothing here reads {name!r}.{console.did_you_mean(name, known)}",
                  file=sys.stderr)


def warn_of_lacks(all_jobs: list[Job]) -> None:
    """Names finished runs that lack what the flags ask for, as they were trained without them."""
    lacking = defaultdict(list)
    for job in all_jobs:
        if job.state == Job.DONE:
            for flag in files.lacks(job.output_dir, job.train_args):
                lacking[flag].append(job.output_dir)
    for flag, folders in lacking.items():
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        print(f"--{flag}: {len(folders)} finished runs were trained without it and lack what it "
              f"keeps: {', '.join(folders[:3])}{more}. To have it, delete their folders and "
              "launch again.", file=sys.stderr)


def launch(args: argparse.Namespace, all_jobs: list[Job]) -> int:
    """Runs the jobs that have not begun, and goes on with those that were interrupted or failed."""
    launcher = make_launcher(args)
    for job in all_jobs:
        if job.state == Job.DONE:  # nobody else looks there again
            claims.clear(job.output_dir)
    # A launcher that returns at once leaves folders of jobs that wait in its queue.
    queued = [] if launcher.func in command_launchers.BLOCKING else [
        job for job in all_jobs if job.state == Job.NOT_LAUNCHED and job.has_folder]
    running = [job for job in all_jobs if job.state == Job.RUNNING]
    left = {id(job) for job in [*queued, *running]}
    new = [job for job in all_jobs if job.state != Job.DONE and id(job) not in left]
    ended = [job for job in new if job.state in (Job.INTERRUPTED, Job.FAILED)]
    print(f"About to launch {len(new)} jobs.")
    if ended:
        print(f"{len(ended)} of them ended early and go on where they were.", file=sys.stderr)
    if running:
        print(f"{len(running)} jobs are running and are left alone.", file=sys.stderr)
    if queued:
        print(f"{len(queued)} jobs wait for their launcher and are left alone. "
              "`delete_incomplete` with the same flags removes them, so that they can be launched "
              "again.", file=sys.stderr)
    if not new:
        return 0
    warn_of_unread(args)
    if launcher.func is command_launchers.dummy:
        launcher([job.command_str for job in new])
        return 0
    if launcher.func in (command_launchers.local, command_launchers.multi_gpu):
        check_data(args)
    check_writable(args.output_dir)
    if launcher.func in command_launchers.BLOCKING:
        launcher([])  # it refuses what it cannot use, before a folder is made
    if not confirmed(args):
        return 0
    taught = [job for job in new if job.teacher and not job.teacher.is_done()]
    if taught:
        print(f"{len(taught)} of them wait for their teachers and are counted after these.",
              file=sys.stderr)
    waiting = {id(job) for job in taught}
    # Of another launcher such folders would seem to wait in its queue.
    later = taught if launcher.func in command_launchers.BLOCKING else []
    failed = run([job for job in new if id(job) not in waiting], launcher, args.retry, later)
    ready = [job for job in taught if job.teacher.is_done()]
    if ready and not any(job.was_stopped for job in failed):
        failed += run(ready, launcher, args.retry)
    if len(ready) < len(taught):
        print(f"{len(taught) - len(ready)} jobs are not launched, as their teachers have not "
              "finished. The same command launches them once these have.", file=sys.stderr)
    stopped = [job for job in failed if job.was_stopped]
    if stopped:
        print(f"{len(stopped)} jobs were stopped. The same command goes on with them.",
              file=sys.stderr)
    if errors := [job for job in failed if not job.was_stopped]:
        print(f"{len(errors)} of {len(new)} jobs failed:", file=sys.stderr)
        for job in errors:
            print(f"  {job.output_dir}: {job.why_failed()}", file=sys.stderr)
    return 1 if failed or len(ready) < len(taught) else 0


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


def status(args: argparse.Namespace, all_jobs: list[Job]) -> int:
    """Prints how far the jobs are, with --watch again and again until nothing is left to do."""
    n_slots = slots_here(args)
    print(overview(all_jobs, n_slots))
    while args.watch and any(job.state != Job.DONE for job in all_jobs):
        sys.stdout.flush()
        time.sleep(args.watch)
        all_jobs = plan(args, list_args(args))
        text = overview(all_jobs, n_slots)
        # On a terminal the new table replaces the old one.
        print("\x1b[H\x1b[J" + text if sys.stdout.isatty() else "\n" + text)
    return 0


def overview(all_jobs: list[Job], n_slots: int = 1) -> str:
    """Jobs by state, their rate, the time left, what failed and why, and the memory they held.

    Args:
        all_jobs: of the sweep.
        n_slots: jobs at a time where none is running, which would tell.
    """
    counts = Counter((kind, job.train_args[kind], job.state)
                     for job in all_jobs for kind in ("algorithm", "dataset"))
    lines = []
    for kind in ("algorithm", "dataset"):
        names = list(dict.fromkeys(job.train_args[kind] for job in all_jobs))
        width = max(map(len, [kind, *names]))
        lines.append(" ".join([kind.ljust(width), *(s.lower().rjust(12) for s in Job.STATES)]))
        lines += [" ".join([name.ljust(width),
                            *(str(counts[kind, name, s]).rjust(12) for s in Job.STATES)])
                  for name in names]
        lines.append("")
    rates, unfinished = costs.Rates(all_jobs), [j for j in all_jobs if j.state != Job.DONE]
    running = [job for job in all_jobs if job.state == Job.RUNNING]
    left = [rates.seconds_left(job) for job in unfinished]
    known = [seconds for seconds in left if seconds is not None]
    if running:
        speed = sum(job.cost()["steps"] / job.cost()["seconds"]
                    for job in running if job.cost().get("seconds"))
        lines.append(f"running: {len(running)} jobs, {speed:.3g} updates a second together")
    if known:
        unknown = len(left) - len(known)
        at_once = len(running) or min(n_slots, len(left))
        lines.append(f"left: {costs.in_words(sum(known) / at_once)} with {at_once} at a time"
                     + (f", and {unknown} jobs of unknown length" if unknown else ""))
    lines += [f"failed: {job.output_dir} ({job.label}): {job.why_failed()}"
              for job in all_jobs if job.state == Job.FAILED]
    diverged = Counter(job.train_args["algorithm"] for job in all_jobs if job.has_diverged())
    if diverged:
        each = ", ".join(f"{name} {n}" for name, n in diverged.items())
        lines.append(f"diverged: the losses of {sum(diverged.values())} jobs are not finite "
                     f"({each}); their err.txt says since when")
    if n_waiting := sum(job.state == Job.NOT_LAUNCHED and job.has_folder for job in all_jobs):
        lines.append(f"{n_waiting} of those not launched have a folder: they wait in a queue, or "
                     "their launcher is gone.")
    peaks = defaultdict(list)
    for job in all_jobs:
        if {"rss_mb", "gpu_mb"} <= (cost := job.cost()).keys():
            peaks[job.train_args["algorithm"]].append((cost["rss_mb"], cost["gpu_mb"]))
    if peaks:
        each = (f"{name} {max(rss for rss, _ in found):.0f} + {max(gpu for _, gpu in found):.0f}"
                for name, found in peaks.items())
        lines.append(f"most memory of a job, MiB of process + GPU: {', '.join(each)}")
    return "\n".join(lines).rstrip()


def slots_here(args: argparse.Namespace) -> int:
    """How many jobs the launcher would have at a time; GPUs that are not here count as one."""
    try:
        return slots(args, args.command_launcher)
    except ValueError:
        return slots(args, "local")


def slots(args: argparse.Namespace, launcher: str) -> int:
    """How many jobs a launcher of ours has at a time; other launchers count as one.

    Raises:
        ValueError: if it has no GPU.
    """
    per_device = args.jobs_per_device or 1
    if launcher == "multi_gpu":
        return workers.n_gpus() * per_device
    if launcher == "slurm":
        return args.slurm_parallel or 256
    if launcher == "ray" and not args.ray_address:
        return max(1, int((os.cpu_count() or 1) / (args.ray_cpus or 1)))
    return per_device if launcher == "local" else 1


def forecast(args: argparse.Namespace, all_jobs: list[Job]) -> int:
    """Prints how many runs there are, what each takes, and what that is by launcher.

    Returns:
        1 if not even one trial with one seed of hparams fits the budget, else 0.

    Raises:
        ValueError: if a budget is given and the cost of a run is not known.
    """
    rates, stated = costs.Rates(all_jobs), args.hours_per_run and 3600 * args.hours_per_run
    left = {id(job): rates.seconds_left(job, stated) for job in all_jobs}
    teachers = {id(job.teacher) for job in all_jobs if job.teacher}
    kinds = defaultdict(list)
    for job in all_jobs:
        kinds[job.train_args["algorithm"], job.train_args["dataset"]].append(job)
    for (algorithm, dataset), some in kinds.items():
        job = some[0]
        rate = rates.of(job)
        if rates.is_measured(job):
            cost = f"{costs.in_words(rate * job.n_steps)} each, measured"
        elif stated:
            cost = f"{costs.in_words(stated)} each, as stated"
        elif rate is not None:
            cost = f"{costs.in_words(rate * job.n_steps)} each, by other algorithms on {dataset}"
        else:
            cost = "not measured yet: pass --hours_per_run"
        n_teachers = sum(id(job) in teachers for job in some)
        n_done = sum(job.state == Job.DONE for job in some)
        print(f"{algorithm} {dataset}: {len(some)} runs"
              + (f", {n_teachers} of them teachers" if n_teachers else "")
              + (", after their teachers" if job.teacher else "")
              + f", {n_done} done; {cost}")
    print(f"total: {len(all_jobs)} runs, {len(teachers)} teachers, "
          f"{sum(job.state == Job.DONE for job in all_jobs)} done")
    for flag, attribute in (("steps", "N_STEPS"), ("checkpoint_freq", "CHECKPOINT_FREQ")):
        if getattr(args, flag) == 0:
            own = ((name, datasets.get_dataset_class(name)) for name in args.datasets)
            print(f"--{flag} 0, as in DomainBed, is the data set's own: "
                  + ", ".join(f"{name} {getattr(cls, attribute)}" for name, cls in own))
    if None in left.values():
        if args.budget:
            raise ValueError("--budget needs what a run takes: pass --hours_per_run, or finish a "
                             "run of each data set first.")
        return 0

    def hours(some: list[Job], launcher: str) -> float:
        return costs.wall_seconds(some, left, slots(args, launcher)) / 3600

    for launcher in dict.fromkeys(("local", "slurm", "ray", args.command_launcher)):
        print(f"{launcher}: {hours(all_jobs, launcher):.3g} hours, {slots(args, launcher)} at a "
              "time")
    if not args.budget:
        return 0

    def fits(n_trials: int, n_hparams: int) -> bool:
        kept = [job for job in all_jobs if job.train_args["trial_seed"] < n_trials
                and (id(job) in teachers
                     or job.train_args["hparams_seed"] < args.n_hparams_from + n_hparams)]
        return hours(kept, args.command_launcher) <= args.budget

    chosen = costs.trimmed(args.n_trials, args.n_hparams - args.n_hparams_from, fits)
    if chosen is None:
        print(f"{args.budget:g} hours do not suffice for one trial with one seed of hparams.")
        return 1
    print(f"within {args.budget:g} hours: --n_trials {chosen[0]} --n_hparams "
          f"{args.n_hparams_from + chosen[1]}")
    return 0


def list_args(args: argparse.Namespace) -> list[dict]:
    """The train arguments of the jobs that the flags ask for."""
    return jobs.make_args_list(
        n_trials=args.n_trials, dataset_names=args.datasets, algorithms=args.algorithms,
        n_hparams_from=args.n_hparams_from, n_hparams=args.n_hparams,
        single_test_envs=args.single_test_envs, **of_sweep(args))


def plan(args: argparse.Namespace, args_list: list[dict]) -> list[Job]:
    """The jobs of the list, each with its teacher; teachers that it lacks come first.

    Raises:
        ValueError: if teachers are needed but are to save no model.
    """
    runs = jobs.Runs(args.output_dir)
    flags = off_record(argparse.Namespace(**{**vars(args), "plugin": []}))
    listed = {repr(train_args): Job(train_args, args.output_dir, runs, args.plugin, flags=flags)
              for train_args in args_list}
    added = {}
    for train_args, job in zip(args_list, listed.values()):
        if not algorithms.learns_from_run(train_args["algorithm"]):
            continue
        if args.skip_model_save:
            raise ValueError(f"--skip_model_save: {train_args['algorithm']} learns from the model "
                             "of an ERM run. Leave the flag out.")
        teacher = jobs.teacher_args(train_args)
        key = repr(teacher)
        if key not in listed and key not in added:
            added[key] = Job(teacher, args.output_dir, runs, args.plugin, flags=flags)
        job.teacher = listed.get(key) or added[key]
    return [*added.values(), *listed.values()]


def main(argv: list[str] | None = None) -> int:
    """Parses, lists the jobs, and launches, deletes or counts them."""
    args = build_parser().parse_args(argv)
    check(args)
    resolve_names(args)
    if args.command in ("status", "delete_incomplete") and not os.path.isdir(args.output_dir):
        raise FileNotFoundError(f"--output_dir {args.output_dir}: there is no such folder. `sweep "
                                "launch` with the same flags makes it.")
    all_jobs = plan(args, list_args(args))
    if args.command in ("status", "launch"):
        warn_of_lacks(all_jobs)
    if args.command == "status":
        return status(args, all_jobs)
    if args.command == "plan":
        return forecast(args, all_jobs)
    for job in all_jobs:
        print(job)
    n = Counter(job.state for job in all_jobs)
    print(f"{len(all_jobs)} jobs: "
          + ", ".join(f"{n[state]} {state.lower()}" for state in Job.STATES) + ".")
    return (launch if args.command == "launch" else delete_incomplete)(args, all_jobs)


if __name__ == "__main__":
    run_main(main)
