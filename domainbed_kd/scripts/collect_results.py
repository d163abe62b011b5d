"""Prints the tables of a sweep, and writes them beside its runs."""

import argparse
import sys
from pathlib import Path

from domainbed_kd import extensions
from domainbed_kd.console import Parser, run_main
from domainbed_kd.folder import curves
from domainbed_kd.results import (
    formats,
    notes,
    published,
    records,
    selection,
    significance,
    tables,
)


def build_parser() -> argparse.ArgumentParser:
    """DomainBed's flags, then ours."""
    parser = Parser(prog="python -m domainbed_kd.scripts.collect_results", description=__doc__)
    ours = add_shared_flags(parser)
    parser.add_argument("--latex", action="store_true", help="the same as --format latex")
    parser.add_argument("--auto_lr", action="store_true",
                        help="select by the rule for ERM++'s two stages only")
    ours.add_argument("--format", choices=formats.EXTENSIONS,
                      help="text (the default), latex, csv or markdown; also written to "
                           "INPUT_DIR/results.{txt,tex,csv,md}")
    ours.add_argument("--upstream", action="store_true",
                      help="exactly what DomainBed prints: only its datasets, no marks, no notes, "
                           "cells cut to width")
    return parser


def add_shared_flags(parser: argparse.ArgumentParser):
    """Adds flags that `report` takes too; returns the group of flags that DomainBed lacks."""
    parser.add_argument("--input_dir", required=True, help="folder of the sweep")
    ours = parser.add_argument_group("beyond DomainBed")
    ours.add_argument("--published", action="store_true",
                      help="also show published results on the same datasets, marked if their "
                           "protocol differs or is not stated (docs/report.md)")
    ours.add_argument("--compare", metavar="ALGORITHM",
                      help="compare every other algorithm with this one (default in a report: "
                           "ERM): paired differences in points with 95 percent intervals, "
                           "corrected tests, mean ranks (docs/report.md)")
    ours.add_argument("--alignment", nargs="?", const="", metavar="CLIP",
                      help="also show accuracy on the test images that CLIP's pre-training knew "
                           "and on the others, where CLIP is right and where it is wrong, and the "
                           "share of errors that CLIP makes too; needs runs with --save_logits, "
                           "and their images at the first time; default: the CLIP from which the "
                           "runs learnt (docs/analysis.md)")
    ours.add_argument("--calibration", action="store_true",
                      help="also show expected calibration errors on test domains, before and "
                           "after temperature scaling on the training domains; needs runs with "
                           "--save_logits (docs/analysis.md)")
    ours.add_argument("--unseal", action="store_true",
                      help="also read the test accuracies of runs that were trained with --seal, "
                           "and note that in INPUT_DIR/looks.jsonl")
    ours.add_argument("--plugin", action="append", default=[], metavar="MODULE",
                      help="module or .py file of algorithms and datasets, which tables then name "
                           "and order as it declares; may be given again")
    return ours


def main(argv: list[str] | None = None) -> int:
    """Loads, selects, prints and writes."""
    args = build_parser().parse_args(argv)
    style = args.format or ("latex" if args.latex else "text")
    _check(args, style)
    extensions.load(args.plugin)
    folder = records.Folder(args.input_dir)
    found = folder.curves(as_listed=args.upstream, unseal=args.unseal)
    if args.upstream:
        # DomainBed has no rule for weight averages, and no rows named after hparams.
        found = [curve._replace(selection=None, args={**curve.args, "hparams": None}
                                if curves.row(curve.args) != curve.args["algorithm"]
                                else curve.args) for curve in found]
        grid = records.Grid(found)
    else:
        grid = records.whole_grid(folder, found)
    output, remarks = _tables(args, style, folder, found, grid)
    if not found:
        print(f"{args.input_dir} holds no results yet.", file=sys.stderr)
    sys.stderr.writelines(f"{line}\n" for line in remarks)
    sys.stdout.write(output)
    path = Path(args.input_dir, f"results.{formats.EXTENSIONS[style]}")
    try:
        path.write_text(output, encoding="utf-8")
    except OSError as error:
        print(f"Not written to {path}: {error.strerror}.", file=sys.stderr)
    if remark := notes.at_work(folder, grid):
        print(remark, file=sys.stderr)
    return 0


def _check(args: argparse.Namespace, style: str) -> None:
    if args.latex and style != "latex":
        raise ValueError(f"--latex and --format {style} contradict each other. Pass one of them.")
    if args.upstream and style not in ("text", "latex"):
        raise ValueError(f"--upstream: DomainBed prints text or latex, not {style}.")
    if args.published and args.upstream:
        raise ValueError("--published does not go with --upstream, which prints what DomainBed "
                         "does. Leave one out.")
    asked = {"compare": args.compare, "alignment": args.alignment is not None,
             "calibration": args.calibration}
    for name in asked:
        if asked[name] and (args.upstream or style == "csv"):
            raise ValueError(f"--{name} goes with text, latex or markdown, and without --upstream.")


def _tables(args: argparse.Namespace, style: str, folder: records.Folder, found: list[curves.Curve],
            grid: records.Grid) -> tuple[str, list[str]]:
    """The text for stdout, and lines for stderr."""
    methods = (selection.IIDAutoLRAccuracySelectionMethod,) if args.auto_lr else selection.METHODS
    made = tables.of_sweep(found, grid, methods, args.upstream)
    n_records = curves.n_records(found)
    if args.upstream:
        return formats.upstream(made, n_records, style), []
    remarks = notes.lines(grid, made, args.input_dir, notes.why_failed(folder, grid))
    shown = made
    if args.published:
        shown, sources = published.of_sweep(made, grid)
        remarks += sources
    compared = significance.of_sweep(found, grid, methods, args.compare) if args.compare else {}
    output = formats.document(style, shown, compared, grid, n_records, remarks,
                              trust(args, found))
    return output, remarks if style == "csv" else []


def trust(args: argparse.Namespace, found: list[curves.Curve]) -> list[formats.Strings]:
    """The tables that --alignment and --calibration ask for."""
    made = []
    if args.alignment is not None:
        from domainbed_kd.results import alignment  # slow to import, like calibration

        made += alignment.of_sweep(args.input_dir, found, args.alignment)
    if args.calibration:
        from domainbed_kd.results import calibration

        made += calibration.of_sweep(args.input_dir, found)
    return made


if __name__ == "__main__":
    run_main(main)
