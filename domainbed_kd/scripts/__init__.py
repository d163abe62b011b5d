"""The commands: parse, call, print. Each module has `main(argv=None) -> int`."""

import argparse
import errno
import os
import sys
from collections.abc import Callable

from domainbed_kd.user_input import did_you_mean, parse_hparams

# What a user can mend: a missing folder, an unknown name, a value out of range.
USER_ERRORS = (ValueError, OSError, NotImplementedError)
# What to do about an error of the system's.
HINTS = {
    errno.ENOSPC: ". Free some space there; the same command goes on from what is whole.",
    errno.EDQUOT: ". Free some space there; the same command goes on from what is whole.",
    errno.EROFS: ". Choose a folder in which you may write.",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, which --help shows."""

    def parse_args(self, args=None, namespace=None):
        """As argparse's, and names the known flag that is nearest to one that is not.

        That comes first: argparse itself would rather miss the flag that was meant.
        """
        known = self._option_string_actions
        for word in sys.argv[1:] if args is None else args:
            flag = word.split("=")[0]
            if flag.startswith("--") and not any(each.startswith(flag) for each in known):
                self._refuse([word])
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:  # no flags, or in an @FILE
            self._refuse(unknown)
        return parsed

    def _refuse(self, words):
        self.error(f"unrecognized arguments: {' '.join(words)}."
                   + did_you_mean(words[0].split("=")[0], self._option_string_actions))

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices))
            raise

    def error(self, message: str):
        """Prints the message and exits with 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def add_flags_of_runs(group: argparse._ArgumentGroup) -> None:
    """Flags of ours that `train` takes and `sweep` hands on; absent switches are None."""
    def switch(flag, text):
        group.add_argument(flag, action="store_const", const=True, help=text)

    switch("--allow_bad_teacher", "go on with a teacher that is near chance or has other classes")
    switch("--diagnostics",
           "record weight distance, mutual information, calibration and agreement with the "
           "teacher at each evaluation; see docs/analysis.md")
    switch("--save_logits",
           "keep the predictions that model selection looks at, at each evaluation, in "
           "logits/stepN.npz (float16); see docs/analysis.md")
    switch("--log_test_domains", "show accuracies on the test domains in TensorBoard too")
    switch("--wandb", "log to Weights & Biases too, offline unless WANDB_MODE=online")
    switch("--fast",
           "train in bfloat16, channels last, with augmentation as tensor operations, and "
           "evaluate only what model selection reads; see docs/speed.md")
    switch("--compile", "with --fast: compile each run's featurizer, for a minute or two; needs a "
                        "C++ compiler")
    group.add_argument("--image_cache", metavar="DIR",
                       help="folder where decoded images are kept for all runs, 3 bytes a pixel; "
                            "results do not depend on it; see docs/speed.md")
    group.add_argument("--teacher_cache", metavar="DIR",
                       help="keep what frozen teachers make of images without augmentation, for "
                            "all runs; needs the hparam canonical_view; see docs/speed.md")
    group.add_argument("--loader_processes", type=int, metavar="N",
                       help="processes that read a run's images, no more than there are cores; "
                            "default: 0, but on a GPU as many as the run has threads, up to 8; "
                            "results do not depend on it")
    group.add_argument("--format", choices=["safetensors"],
                       help="also write model.safetensors: the tensors by name, and all else that "
                            "model.pkl has as JSON in the file's metadata")
    group.add_argument("--plugin", action="append", default=[], metavar="MODULE",
                       help="module or .py file with algorithms, data sets or, for sweeps, "
                            "launchers of your own; may be given again")
    group.add_argument("--fork", dest="plugin", action="append", metavar="FOLDER", type=_fork,
                       help="folder of a DomainBed fork, which holds its package domainbed: its "
                            "algorithms can be named too; ours keep their names")


def _fork(folder: str) -> str:
    if not os.path.isdir(os.path.join(folder, "domainbed")):
        raise argparse.ArgumentTypeError(f"{folder} is no folder that holds a package domainbed.")
    return folder


def check_compile(compile_: bool | None, fast: bool | None) -> None:
    """Refuses to compile in exact mode, whose numbers a compiler would change.

    Raises:
        ValueError: if so.
    """
    if compile_ and not fast:
        raise ValueError("--compile needs --fast: compiled networks round otherwise than exact "
                         "mode must. Pass both, or neither.")


def check_teacher_cache(folder: str | None, hparams: str | None) -> None:
    """Refuses a folder in which nothing would be kept.

    Raises:
        ValueError: if --teacher_cache is given without the hparam that it serves.
    """
    if folder is None:
        return
    if hparams and parse_hparams(hparams).get("canonical_view"):
        return
    raise ValueError("--teacher_cache keeps what teachers make of images without augmentation, "
                     "which moves results. Ask for that too: --hparams '{\"canonical_view\": "
                     "true}'.")


def one_line(error: Exception) -> str:
    """An error as the line that a user sees."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        hint = may_not(error.filename) if error.errno == errno.EACCES else HINTS.get(error.errno)
        text = f"{where}{error.strerror}{hint or '.'}"
    return f"error: {text}"


def may_not(path: str | os.PathLike | None) -> str:
    """What to do about a path whose permissions forbid what was tried with it."""
    if not path:
        return ""
    found = os.path.abspath(path)
    while not os.path.exists(found):
        found = os.path.dirname(found)
    if not os.access(found, os.R_OK | (os.X_OK if os.path.isdir(found) else 0)):
        return ". You may not read it: have its owner change that, as chmod does."
    return HINTS[errno.EROFS]


def run_main(main: Callable[[], int]) -> None:
    """Runs a command and exits with its status: 0 done, 1 some jobs failed, 2 misuse.

    A user's error is said in one line; DOMAINBED_KD_TRACEBACK=1 shows where it was raised.
    """
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        status = 130
    except USER_ERRORS as error:
        if os.environ.get("DOMAINBED_KD_TRACEBACK"):
            raise
        print(one_line(error), file=sys.stderr)
        status = 2
    sys.exit(status)
