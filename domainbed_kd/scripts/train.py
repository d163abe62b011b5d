"""Trains one algorithm on one data set, holding out the test domains."""

import argparse
import contextlib
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from domainbed_kd import console
from domainbed_kd.console import USER_ERRORS, Parser, one_line, run_main
from domainbed_kd.folder import claims
from domainbed_kd.folder.args import add_flags_of_runs, check_compile, check_teacher_cache

# Flags of ours that go on record, but only when they are given: DomainBed's records know none.
OPTIONAL = ("teacher", "allow_bad_teacher", "diagnostics", "save_logits", "fast", "compile",
            "format")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults that are values."""

    def _get_help_string(self, action):
        is_value = action.default is not False and action.default not in (None, [])
        return super()._get_help_string(action) if is_value else action.help


def build_parser() -> argparse.ArgumentParser:
    """DomainBed's flags, then ours."""
    parser = Parser(
        prog="python -m domainbed_kd.scripts.train", description=__doc__,
        formatter_class=_Defaults)
    parser.add_argument("--data_dir", help="folder that holds the data sets")
    parser.add_argument("--dataset", default="RotatedMNIST",
                        help="a data set by name, or Folder:NAME for images of your own in "
                             "DATA_DIR/NAME/DOMAIN/CLASS/")
    parser.add_argument("--algorithm", default="ERM", help="an algorithm by name")
    parser.add_argument("--task", default="domain_generalization",
                        choices=["domain_generalization", "domain_adaptation"],
                        help="domain_adaptation also gives unlabeled test-domain images to update")
    parser.add_argument("--hparams", help="JSON object merged over the chosen hparams")
    parser.add_argument("--hparams_seed", type=int, default=0,
                        help="seed of the random hparams; 0 takes the defaults")
    parser.add_argument("--trial_seed", type=int, default=0,
                        help="seed of the splits and, with hparams_seed, of the random hparams")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything else")
    parser.add_argument("--steps", type=int,
                        help="updates; the data set's own number if absent or, as in DomainBed, 0")
    parser.add_argument("--checkpoint_freq", type=int,
                        help="steps between evaluations; the data set's own if absent or 0")
    parser.add_argument("--test_envs", type=int, nargs="+", default=[0],
                        help="numbers of the domains to hold out")
    parser.add_argument("--output_dir", default="train_output", help="folder of this run")
    parser.add_argument("--holdout_fraction", type=float, default=0.2,
                        help="share of each domain kept for validation")
    parser.add_argument("--uda_holdout_fraction", type=float, default=0,
                        help="share of the test domains given to update without labels")
    parser.add_argument("--skip_model_save", action="store_true", help="write no model.pkl")
    parser.add_argument("--save_model_every_checkpoint", action="store_true",
                        help="write model_stepN.pkl at each evaluation")
    ours = parser.add_argument_group("beyond DomainBed")
    ours.add_argument("--teacher", metavar="FOLDER",
                      help="finished run whose model teaches, for methods that learn from one")
    ours.add_argument("--resume", choices=["auto", "never"], default="auto",
                      help="auto continues an unfinished run; never starts again and appends")
    ours.add_argument("--wait", type=float, default=claims.WAIT_S, metavar="SECONDS",
                      help="how long to wait for another process that trains in the folder")
    add_flags_of_runs(ours)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses values that no run can use.

    Raises:
        ValueError: naming the flag, what was found and what it takes.
    """
    for name in ("steps", "checkpoint_freq", "loader_processes"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise ValueError(f"--{name} is {value}; it takes a number from 0 up.")
    if not 0 <= args.wait < math.inf:
        raise ValueError(f"--wait is {args.wait}; it takes a number of seconds from 0 up.")
    if not 0 < args.holdout_fraction < 1:
        raise ValueError(f"--holdout_fraction is {args.holdout_fraction}; it takes a share "
                         "between 0 and 1, both excluded, as validation needs images too.")
    if not 0 <= args.uda_holdout_fraction < 1:
        raise ValueError(f"--uda_holdout_fraction is {args.uda_holdout_fraction}; it takes a "
                         "share from 0 up to, but not including, 1.")
    if len(set(args.test_envs)) < len(args.test_envs):
        raise ValueError(f"--test_envs names an environment twice: {args.test_envs}.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed is {args.seed}; it takes a number from 0 to {2**32 - 1}.")
    if args.hparams is not None:
        console.parse_hparams(args.hparams)
    check_compile(args.compile, args.fast)
    check_teacher_cache(args.teacher_cache, args.hparams)


class Tee:
    """A text stream that writes to two, and at once."""

    def __init__(self, stream, path: Path):
        self.stream, self.file = stream, path.open("a", encoding="utf-8")

    def write(self, text: str) -> None:
        """Writes to both."""
        for out in (self.stream, self.file):
            out.write(text)
            out.flush()

    def flush(self) -> None:
        """Does nothing: every write is already flushed."""

    def isatty(self) -> bool:
        """Whether the first stream is a terminal."""
        return self.stream.isatty()


@contextlib.contextmanager
def output_kept_in(folder: Path) -> Iterator[None]:
    """Copies what is printed to out.txt and err.txt, and notes there why a run failed.

    The file `failed` has the reason in a line, until the run is started again.
    """
    (folder / "failed").unlink(missing_ok=True)
    with contextlib.redirect_stdout(Tee(sys.stdout, folder / "out.txt")), \
            contextlib.redirect_stderr(Tee(sys.stderr, folder / "err.txt")) as err:
        try:
            yield
        except USER_ERRORS as error:
            note_failure(folder, error)
            if isinstance(error, BlamedOnHparams):
                traceback.print_exception(error.__cause__, file=err.file)
            print(one_line(error), file=err.file, flush=True)
            raise
        except Exception as error:
            note_failure(folder, error)
            traceback.print_exc(file=err.file)
            err.file.flush()
            raise


def note_failure(folder: Path, error: Exception) -> None:
    """Leaves the reason in the file `failed`, which stays empty if the disk is full."""
    line = one_line(error)
    if not isinstance(error, USER_ERRORS):
        line = f"{type(error).__name__}: {line.removeprefix('error: ')}"
    with contextlib.suppress(OSError):  # the first error is the one to report
        (folder / "failed").write_text(line + "\n", encoding="utf-8")


class BlamedOnHparams(ValueError):
    """An algorithm failed with hparams of the user's choice; the cause is what it raised."""


@contextlib.contextmanager
def hparams_blamed(algorithm: str, hparams: str | None) -> Iterator[None]:
    """Inside, what goes wrong with --hparams is said in a line; without them it is our bug.

    Raises:
        BlamedOnHparams: with hparams, for what Python or torch raise when they are of no use.
        OSError: if memory ran out.
    """
    try:
        yield
    except USER_ERRORS:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "out of memory" in reason or "can't allocate memory" in reason:
            raise OSError(f"{algorithm} needs more memory than there is ({reason}). Lower "
                          "batch_size or jobs_per_device.") from error
        if hparams is None:
            raise
        raise BlamedOnHparams(f"{algorithm} fails with --hparams {hparams} ({reason}). Its "
                              "traceback is in err.txt.") from error


def check_names(args: argparse.Namespace) -> None:
    """Loads plug-ins and refuses what is wrong with the names; without plug-ins it needs no torch.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: naming what was found, and what to do.
    """
    from domainbed_kd import algorithms, datasets, extensions

    extensions.load(args.plugin, [args.algorithm, args.dataset])
    algorithms.check_name(args.algorithm)
    name = algorithms.canonical_name(args.algorithm)
    if args.teacher is not None and name in algorithms.SHIPPED and (
            not algorithms.learns_from_run(name)):
        taught = ", ".join(filter(algorithms.learns_from_run, algorithms.ALGORITHMS))
        raise ValueError(f"--teacher {args.teacher}: {args.algorithm} does not learn from a run. "
                         f"Leave the flag out, or choose one of {taught}.")
    cls = datasets.get_dataset_class(args.dataset, args.data_dir)
    folders = cls.domain_folders(args.data_dir) if hasattr(cls, "domain_folders") else None
    if names := cls.ENVIRONMENTS or folders:
        datasets.check_test_envs(args.dataset, len(names), args.test_envs)


def main(argv: list[str] | None = None) -> int:
    """Parses, tees the output to out.txt and err.txt, and trains."""
    args = build_parser().parse_args(argv)
    check(args)
    folder = Path(args.output_dir)
    if not folder.exists():
        check_names(args)  # so that a slip of the fingers makes no folder
    folder.mkdir(parents=True, exist_ok=True)
    ours = ("plugin", "resume", "loader_processes", "wait", "log_test_domains", "wandb",
            "image_cache", "teacher_cache")
    on_record = {k: v for k, v in vars(args).items() if k not in ours}
    for name in OPTIONAL:
        if not on_record[name]:
            del on_record[name]
    with claims.held(folder, args.wait), output_kept_in(folder):
        check_names(args)
        from domainbed_kd.run import training

        with hparams_blamed(args.algorithm, args.hparams):
            return training.train(on_record, args.resume, args.loader_processes,
                                  args.log_test_domains, args.wandb, args.image_cache,
                                  args.teacher_cache)


if __name__ == "__main__":
    run_main(main)
