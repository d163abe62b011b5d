"""Fetches datasets into the folders that the loaders read, and verifies what is there.

DomainBed's script fetches TerraIncognita unless it is edited; here --datasets names what to fetch.
Archives go to DATA_DIR/downloads. An interrupted download continues where it stopped. Unpacking is
all or nothing; then the archive is deleted. Its SHA-256 stays there as ARCHIVE.sha256, and an
archive fetched later must have the same. To check the first one, put that file there yourself.
"""

import argparse
from pathlib import Path

from domainbed_kd import datasets
from domainbed_kd.console import Parser, run_main
from domainbed_kd.datasets import counts, sources


def build_parser() -> argparse.ArgumentParser:
    """DomainBed's flag, then ours."""
    parser = Parser(prog="python -m domainbed_kd.scripts.download", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog=sources.listing(sources.known()))
    parser.add_argument("--data_dir", type=Path, help="folder that holds the datasets; required")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="NAME",
                        help="what to fetch or, with --verify, to verify (all that are there)")
    parser.add_argument("--verify", action="store_true",
                        help="fetch nothing; count images against the published numbers")
    parser.add_argument("--list", action="store_true", help="show what can be fetched, and stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0: everything is there and as published. 1: something is not, or must be fetched by hand."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in args.datasets:
        sources.check_name(name)
    if args.list:
        print(sources.listing(args.datasets or sources.known()))
        return 0
    if args.data_dir is None:
        parser.error("--data_dir is required")
    if args.verify:
        names = args.datasets or [name for name in counts.published()
                                  if datasets.facts(name).folder(args.data_dir).is_dir()]
        if not names:
            raise ValueError(f"{args.data_dir} holds none of {', '.join(counts.published())}.")
        return 0 if all([counts.verify(name, args.data_dir) for name in names]) else 1
    if not args.datasets:
        print(sources.listing(sources.known()))
        raise ValueError("Nothing was fetched. Name what to fetch, for example --datasets PACS.")
    return 0 if all([sources.install(name, args.data_dir) for name in args.datasets]) else 1


if __name__ == "__main__":
    run_main(main)
