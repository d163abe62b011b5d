"""Keeps a run's output, and the reason for a failure, in its folder."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from domainbed_kd import machine
from domainbed_kd.console import USER_ERRORS, one_line
from domainbed_kd.folder import files


class Tee:
    """A text stream that also writes to a file, unbuffered."""

    def __init__(self, stream, path: Path):
        self.stream, self.file = stream, files.open_to_write(path, "a")

    def write(self, text: str) -> None:
        """Writes to both."""
        for out in (self.stream, self.file):
            out.write(text)
            out.flush()

    def flush(self) -> None:
        """Does nothing: every write is already flushed."""

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()


class BlamedOnHparams(ValueError):
    """An algorithm failed with the user's hparams; the cause is the original error."""


@contextlib.contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Copies output to out.txt and err.txt, and writes the reason for a failure to err.txt.

    The file `failed` has the reason in one line, until the run is restarted.
    """
    (folder / files.FAILED).unlink(missing_ok=True)
    with contextlib.redirect_stdout(Tee(sys.stdout, folder / files.OUT)), \
            contextlib.redirect_stderr(Tee(sys.stderr, folder / files.ERR)) as err:
        try:
            yield
        except USER_ERRORS as error:
            files.note_failure(folder, one_line(error))
            if isinstance(error, BlamedOnHparams):
                traceback.print_exception(error.__cause__, file=err.file)
            print(one_line(error), file=err.file, flush=True)
            raise
        except SystemExit as error:
            # A run ends by returning.
            stopped = ValueError(f"sys.exit({error.code!r}) was called during the run, which has "
                                 "not finished. Look for it in the plug-ins.")
            files.note_failure(folder, one_line(stopped))
            print(one_line(stopped), file=err.file, flush=True)
            raise stopped from error
        except Exception as error:
            files.note_failure(
                folder, f"{type(error).__name__}: {one_line(error).removeprefix('error: ')}")
            traceback.print_exc(file=err.file)
            err.file.flush()
            raise


@contextlib.contextmanager
def hparams_blamed(algorithm: str, hparams: str | None) -> Iterator[None]:
    """Inside, failures with --hparams are reported in one line; without, they are our bugs.

    Raises:
        BlamedOnHparams: with hparams, instead of the error from Python or torch.
        OSError: if memory ran out, or this PyTorch does not support the GPU.
    """
    try:
        yield
    except USER_ERRORS:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if advice := machine.advice_on(reason):
            raise OSError(f"{algorithm}: {advice} ({reason}).") from error
        if hparams is None:
            raise
        raise BlamedOnHparams(f"{algorithm} fails with --hparams {hparams} ({reason}). Its "
                              "traceback is in err.txt.") from error
