"""Launches the many runs behind a table, counts them, or deletes incomplete ones.

`launch` runs what is not done, in the order of the list, and continues what was interrupted or
failed. (DomainBed shuffles the list without a seed, which only changes the order.)
Once launched, a sweep is known by its folder: `sweep status DIR`, `sweep launch DIR`.
Methods that learn from a trained network wait for the ERM run of the same dataset, trial and
test domains, which is added if it is missing.
Flags can be read from a file, given as @FILE: any number on a line, quoted as in a shell, with
# comments. Flags after it on the command line override those in the file.
"""

import argparse
import os
from collections import Counter

from domainbed_kd import algorithms, command_launchers, datasets, extensions
from domainbed_kd.console import run_main
from domainbed_kd.sweep import flags, jobs, launch, plan, status
from domainbed_kd.sweep.jobs import Job


def build_parser() -> flags.SweepParser:
    """The parser; its help lists the known names."""
    return flags.build_parser(__doc__, "\n".join(
        f"{kind}: {', '.join([*known, *extensions.names(kind)])}"
        for kind, known in (("algorithms", algorithms.ALGORITHMS),
                            ("datasets", [*datasets.DATASETS, "Folder:NAME", "FolderSeg:NAME"]),
                            ("launchers", [*command_launchers.REGISTRY, "module:function"]))))


def load_names(launches: list[argparse.Namespace]) -> None:
    """Loads plug-ins and replaces names by those that are registered.

    A command that trains nothing runs no code of plug-ins that only the folder names.
    """
    plugins = dict.fromkeys(plugin for args in launches for plugin in args.plugin)
    extensions.load(plugins, [name for args in launches for name in (
        *args.algorithms, *args.datasets, args.command_launcher)])
    for args in launches:
        if not flags.trains(args):
            flags.stand_in(getattr(args, "of_plugins", {}))
        flags.resolve_names(args)
        if args.auto_lr:
            algorithms.check_auto_lr(args.algorithms)


def main(argv: list[str] | None = None) -> int:
    """Parses, lists the jobs, and launches, deletes, counts or prices them."""
    args, launches = flags.parse(build_parser(), argv)
    load_names(launches)
    if args.command in ("status", "delete_incomplete") and not os.path.isdir(args.output_dir):
        raise FileNotFoundError(f"--output_dir {args.output_dir}: there is no such folder. `sweep "
                                "launch` with the same flags makes it.")
    all_jobs = jobs.plan(launches)
    if args.command in ("status", "launch"):
        status.warn_of_lacks(all_jobs)
    if args.command == "status":
        return status.show(launches, all_jobs)
    if args.command == "plan":
        launch.check_hparams(launches, [job for job in all_jobs if job.state != Job.DONE])
        return plan.forecast(launches, all_jobs)
    for job in all_jobs:
        print(job)
    n = Counter(job.state for job in all_jobs)
    print(f"{len(all_jobs)} jobs: "
          + ", ".join(f"{n[state]} {state.lower()}" for state in Job.STATES) + ".")
    if args.command == "delete_incomplete":
        return launch.delete_incomplete(args, all_jobs)
    launcher = command_launchers.get_launcher(args.command_launcher)
    return launch.launch(launches, all_jobs, launcher, launcher in command_launchers.BLOCKING)


if __name__ == "__main__":
    run_main(main)
