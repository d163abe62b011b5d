"""The commands: parse, call, print. Each module has `main(argv=None) -> int`."""

import os
import sys
from collections.abc import Callable


def run_main(main: Callable[[], int]) -> None:
    """Runs a command and exits with its status: 0 done, 1 some jobs failed, 2 misuse.

    What a user can mend (a missing folder, an unknown name, a bad value) is said in one line.
    Set DOMAINBED_KD_TRACEBACK=1 to see where it was raised.
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
    except (ValueError, OSError, NotImplementedError) as error:
        if os.environ.get("DOMAINBED_KD_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    sys.exit(status)
