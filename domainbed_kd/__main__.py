"""`domainbed-kd COMMAND`, or `python -m domainbed_kd COMMAND`: the scripts under one name."""

import importlib
import sys

from domainbed_kd import __version__
from domainbed_kd.console import Parser, run_main

COMMANDS = {
    "demo": "train a small sweep on digits that ship with the package, and report on it (minutes)",
    "train": "train one algorithm on one dataset, holding out test domains",
    "sweep": "launch many runs, count them, estimate their cost",
    "collect_results": "print a sweep's tables",
    "list_top_hparams": "list the hparams behind a cell of a table, best validation accuracy first",
    "report": "write the tables and plots of a sweep as one HTML page",
    "download": "fetch datasets and verify them",
    "save_images": "save some images of each domain as a network sees them",
}


def build_parser() -> Parser:
    """The names of the commands; each command parses its own flags."""
    parser = Parser(
        prog="domainbed-kd", usage="%(prog)s [-h] [--version] COMMAND ...", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    return parser


def dispatch(argv: list[str] | None = None) -> int:
    """Runs the command that is named first, with the flags after it."""
    argv = sys.argv[1:] if argv is None else argv
    command = build_parser().parse_args(argv[:1]).command
    return importlib.import_module(f"domainbed_kd.scripts.{command}").main(argv[1:])


def main() -> None:
    """The console script: exits with the command's status."""
    run_main(dispatch)


if __name__ == "__main__":
    main()
