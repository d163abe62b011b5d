"""The progress of a sweep's jobs."""

import argparse
import sys
import time
from collections import Counter, defaultdict

from domainbed_kd.algorithms import display_name
from domainbed_kd.folder import files
from domainbed_kd.sweep import jobs, plan
from domainbed_kd.sweep.jobs import Job


def show(launches: list[argparse.Namespace], all_jobs: list[Job]) -> int:
    """Prints how far the jobs are; with --watch, repeats that until all are done."""
    args = launches[-1]
    n_slots = plan.slots(args, args.command_launcher)
    print(overview(all_jobs, n_slots))
    while args.watch and any(job.state != Job.DONE for job in all_jobs):
        sys.stdout.flush()
        time.sleep(args.watch)
        all_jobs = jobs.plan(launches)
        text = overview(all_jobs, n_slots)
        # On a terminal the new table replaces the old one.
        print("\x1b[H\x1b[J" + text if sys.stdout.isatty() else "\n" + text)
    return 0


def overview(all_jobs: list[Job], n_slots: int = 1) -> str:
    """Jobs by state, their rate, the time left, failures and their reasons, and memory.

    If no job is running, `n_slots` of them are expected to run at a time.
    """
    def shown(job: Job, kind: str = "algorithm") -> str:
        return display_name(job.train_args[kind])

    counts = Counter((kind, shown(job, kind), job.state)
                     for job in all_jobs for kind in ("algorithm", "dataset"))
    lines = []
    for kind in ("algorithm", "dataset"):
        names = list(dict.fromkeys(shown(job, kind) for job in all_jobs))
        width = max(map(len, [kind, *names]))
        lines.append(" ".join([kind.ljust(width), *(s.lower().rjust(12) for s in Job.STATES)]))
        lines += [" ".join([name.ljust(width),
                            *(str(counts[kind, name, s]).rjust(12) for s in Job.STATES)])
                  for name in names]
        lines.append("")
    rates, unfinished = plan.Rates(all_jobs), [j for j in all_jobs if j.state != Job.DONE]
    running = [job for job in all_jobs if job.state == Job.RUNNING]
    left = [rates.seconds_left(job) for job in unfinished]
    known = [seconds for seconds in left if seconds is not None]
    if running:
        speed = sum(job.cost["steps"] / job.cost["seconds"]
                    for job in running if job.cost.get("seconds"))
        lines.append(f"running: {len(running)} jobs, {speed:.3g} updates a second together")
    if known:
        unknown = len(left) - len(known)
        at_once = len(running) or min(n_slots, len(left))
        lines.append(f"left: {plan.in_words(sum(known) / at_once)} with {at_once} at a time"
                     + (f", and {unknown} jobs of unknown length" if unknown else ""))
    lines += [f"failed: {job.output_dir} ({job.label}): {job.why_failed()}"
              for job in all_jobs if job.state == Job.FAILED]
    diverged = Counter(shown(job) for job in all_jobs
                       if files.divergence(job.output_dir) is not None)
    if diverged:
        each = ", ".join(f"{name} {n}" for name, n in diverged.items())
        lines.append(f"diverged: the losses of {sum(diverged.values())} jobs are not finite "
                     f"({each}); their err.txt says since which step")
    if n_waiting := sum(job.state == Job.NOT_LAUNCHED and job.has_folder for job in all_jobs):
        lines.append(f"{n_waiting} of those not launched have a folder: they wait in a queue, or "
                     "their launcher has ended.")
    peaks = defaultdict(list)
    for job in all_jobs:
        if {"rss_mb", "gpu_mb"} <= (cost := job.cost).keys():
            peaks[shown(job)].append((cost["rss_mb"], cost["gpu_mb"]))
    if peaks:
        each = (f"{name} {max(rss for rss, _ in found):.0f} + {max(gpu for _, gpu in found):.0f}"
                for name, found in peaks.items())
        lines.append(f"most memory of a job, MiB of process + GPU: {', '.join(each)}")
    return "\n".join(lines).rstrip()


def warn_of_lacks(all_jobs: list[Job]) -> None:
    """Names finished runs that lack files or values that the flags ask for."""
    lacking = defaultdict(list)
    for job in all_jobs:
        if job.state == Job.DONE:
            for flag in files.lacks(job.output_dir, job.train_args):
                lacking[flag].append(job.output_dir)
    for flag, folders in lacking.items():
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        print(f"--{flag}: {len(folders)} finished runs were trained without it and lack what it "
              f"keeps: {', '.join(folders[:3])}{more}. To get it, delete their folders and launch "
              "again.", file=sys.stderr)
