"""What the commands share: parsers, one-line errors, exit status, progress bars."""

import argparse
import difflib
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

# Errors that a user can fix: a missing folder, an unknown name, a value out of range.
USER_ERRORS = (ValueError, OSError, NotImplementedError)
# Advice on errors of the system.
HINTS = {
    errno.ENOSPC: ". Free some space there; the same command then continues.",
    errno.EDQUOT: ". Free some space there; the same command then continues.",
    errno.EROFS: ". Choose a folder in which you may write.",
}


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage, which --help shows."""

    def parse_args(self, args=None, namespace=None):
        """As argparse's, but first suggests the known flag nearest to an unknown one.

        argparse itself would report the intended flag as missing.
        """
        known = self._option_string_actions
        for word in sys.argv[1:] if args is None else args:
            flag = word.split("=")[0]
            if flag.startswith("--") and not any(each.startswith(flag) for each in known):
                self._refuse([word])
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:  # not flags, or in an @FILE
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


def one_line(error: Exception) -> str:
    """An error as one line for the user."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        hint = may_not(error.filename) if error.errno == errno.EACCES else HINTS.get(error.errno)
        text = f"{where}{error.strerror}{hint or '.'}"
    return f"error: {text}"


def may_not(path: str | os.PathLike | None) -> str:
    """Advice on a path without the necessary permissions."""
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

    A user's error is printed in one line; DOMAINBED_KD_TRACEBACK=1 shows where it was raised.
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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """" Did you mean X?" with the nearest known name, ignoring case; empty if none is near."""
    known = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.5)
    return f" Did you mean {known[near[0]]}?" if near else ""


def count(n: int, what: str) -> str:
    """A number of things, such as "1 run" or "2 runs"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def parse_hparams(text: str) -> dict:
    """The hparams of a JSON object, such as '{"lr": 0.001}'; raises as `parse_object` does."""
    return renamed(parse_object("--hparams", text, '{"lr": 0.001}'))


def parse_object(flag: str, text: str, example: str) -> dict:
    """The content of a flag that takes a JSON object.

    Raises:
        ValueError: if the text is not a JSON object, or holds a number that is not finite.
    """
    def finite(number):
        if not math.isfinite(float(number)):
            raise ValueError(f"{flag}: {number} is not a finite number: {text}")
        return float(number)

    try:
        found = json.loads(text, parse_float=finite, parse_constant=finite)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{flag} is not JSON ({error}): {text[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{flag} takes a JSON object such as {example}; found {text[:200]}")
    return found


def renamed(hparams: dict) -> dict:
    """Hparams by their present names, as an earlier version may have recorded them.

    `upstream_exact` was the opposite of `mended`; true is now the default.
    """
    if "upstream_exact" not in hparams:
        return hparams
    kept = {name: value for name, value in hparams.items() if name != "upstream_exact"}
    return kept if hparams["upstream_exact"] else kept | {"mended": True}


def bar(*args, **options):
    """A tqdm bar, if stderr is a terminal; files that stderr is copied to do not get it."""
    from tqdm import tqdm

    return tqdm(*args, file=sys.__stderr__, disable=not sys.stderr.isatty(), **options)


def lifted() -> AbstractContextManager:
    """Inside, bars make room for printed lines."""
    from tqdm import tqdm

    return tqdm.external_write_mode(file=sys.__stderr__)
