"""Prints the hparams of one cell of the tables, best validation accuracy first."""

import argparse

from domainbed_kd.algorithms import display_name
from domainbed_kd.console import Parser, run_main
from domainbed_kd.folder.args import SETTINGS
from domainbed_kd.folder.curves import Curve, Search, n_records, searches
from domainbed_kd.results import protocols, records, selection


def build_parser() -> argparse.ArgumentParser:
    """DomainBed's flags."""
    parser = Parser(prog="python -m domainbed_kd.scripts.list_top_hparams", description=__doc__)
    parser.add_argument("--input_dir", required=True, help="folder of the sweep")
    parser.add_argument("--dataset", required=True, help="a dataset by name")
    parser.add_argument("--algorithm", required=True, help="an algorithm by name")
    parser.add_argument("--test_env", type=int, required=True, help="number of a held-out domain")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Loads, selects and prints."""
    args = build_parser().parse_args(argv)
    found = records.Folder(args.input_dir).curves(as_listed=True)
    trials = find(searches(found), args)
    print(f"Total records: {n_records(found)}")
    for method in selection.METHODS:
        print(f"Model selection: {method.name}")
        for trial_seed, search in trials.items():
            print(f"trial_seed: {trial_seed}")
            for accs, draw in method.hparams_accs(search):
                print_draw(accs, draw)
    return 0


def find(every: dict, args: argparse.Namespace) -> dict[int, Search]:
    """{trial_seed: its search} of the cell that the flags name."""
    shown = {display_name(algorithm): algorithm for _, _, algorithm, _ in every}
    asked = {"dataset": args.dataset, "algorithm": shown.get(args.algorithm, args.algorithm),
             "test_env": args.test_env}
    remaining = sorted(every)
    for position, (name, value) in enumerate(asked.items(), 1):
        there = sorted({key[position] for key in remaining})
        remaining = [key for key in remaining if key[position] == value]
        if not remaining:
            raise ValueError(f"--{name} {value}: {args.input_dir} has no such results; it has "
                             f"{', '.join(map(str, there)) or 'none at all'}.")
    return {key[0]: every[key] for key in remaining}


def print_draw(accs: dict, draw: list[Curve]) -> None:
    """Prints a draw's accuracies, hparams and folders."""
    print(f"\t{accs}")
    distinct = []
    for curve in draw:
        if curve.hparams not in distinct:
            distinct.append(curve.hparams)
    for hparams in distinct:  # one, unless the draw was run with several --hparams
        print("\t\thparams:")
        for name, value in sorted(hparams.items()):
            print(f"\t\t\t{name}: {value}")
    print("\t\toutput_dirs:")
    told = [name for name in SETTINGS if len({str(curve.args.get(name)) for curve in draw}) > 1]
    for folder, *words in sorted({
            (curve.args.get("output_dir", ""),
             *(protocols.in_words(name, str(curve.args.get(name))) for name in told))
            for curve in draw}):
        print(f"\t\t\t{folder}" + (f" ({', '.join(words)})" if words else ""))


if __name__ == "__main__":
    run_main(main)
