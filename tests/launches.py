"""Sweeps on Debug28 for tests: their command lines, folders and what becomes of these."""

import subprocess
import sys
from pathlib import Path

from domainbed_kd.sweep import listing, workers

SMALL = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1", "--n_trials", "1",
         "--hparams", '{"batch_size": 4}', "--steps", "3"]


def flags(command, folder, *more):
    return [command, *SMALL, "--output_dir", str(folder), "--skip_confirmation", *more]


def sh(args, **options):
    return subprocess.run([sys.executable, "-m", "domainbed_kd.scripts.sweep", *args],
                          capture_output=True, text=True, **options)


def command_of(command):
    """{flag: values} of a command line."""
    found = {}
    for word in workers.words(command)[3:]:
        if word.startswith("--"):
            values = found.setdefault(word[2:], [])
        else:
            values.append(word)
    return found


def runs_in(folder):
    """The folders of runs in a sweep's."""
    return [path for path in folder.iterdir() if path.is_dir()]


def args_list_of(args):
    return listing.make_args_list(
        args.n_trials, args.datasets, args.algorithms, args.n_hparams_from, args.n_hparams,
        args.data_dir, args.task, args.holdout_fraction, args.single_test_envs, steps=args.steps,
        hparams=args.hparams)


def left_by_a_killed_job(folder, launched):
    """Makes an incomplete job of one that `pretend` finished, and returns its folder."""
    run = Path(command_of(launched[0])["output_dir"][0])
    (run / "done").unlink()
    (run / "out.txt").write_text("Environment:\n")
    return run
