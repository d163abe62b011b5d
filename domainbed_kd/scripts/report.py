"""Writes a sweep's results as one HTML page that needs no network, and its plots as files."""

import argparse
import shlex
import sys
from pathlib import Path

from domainbed_kd import console, extensions
from domainbed_kd.console import Parser, run_main
from domainbed_kd.folder.curves import searches
from domainbed_kd.results import notes, published, records, selection, significance, tables
from domainbed_kd.scripts import collect_results


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="python -m domainbed_kd.scripts.report", description=__doc__)
    collect_results.add_shared_flags(parser)
    parser.add_argument("--output", help="the page (INPUT_DIR/report.html); plots go to a folder "
                                         "of its name beside it, as PNG and PDF")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Reads, draws, writes, and prints where."""
    args = build_parser().parse_args(argv)
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ValueError(f"The report needs {error.name}: pip install 'domainbed_kd[report]'"
                         ) from None
    from domainbed_kd.results import pages

    extensions.load(args.plugin)
    folder = records.Folder(args.input_dir)
    page = Path(args.output or Path(args.input_dir, "report.html"))
    if page.suffix != ".html":
        raise ValueError(f"--output {page}: name a file that ends in .html.")
    images = page.with_suffix("")
    if images.resolve() == Path(args.input_dir).resolve():
        raise ValueError(f"--output {page}: its plots would lie among the runs. Name another file.")
    found = folder.curves(unseal=args.unseal)
    grid = records.whole_grid(folder, found)
    if not found:
        raise ValueError(f"--input_dir {args.input_dir}: it holds no results yet; collect_results "
                         "says what is known of its runs.")
    failures = notes.why_failed(folder, grid)
    made = tables.of_sweep(found, grid, selection.METHODS)
    chosen = made[pages.SELECTION]
    comparison = significance.compare(searches(found), grid, pages.SELECTION, args.compare)
    sections = list(pages.sections(args.input_dir, found, chosen, comparison))
    sections += [pages.Section(f"trust{i}", each.title, each.lead, [], each.rows,
                               remark=each.remark)
                 for i, each in enumerate(collect_results.trust(args, found), 1)]

    merged, sources = published.of_sweep(made, grid) if args.published else (made, [])
    images.mkdir(parents=True, exist_ok=True)
    plots = [plot for section in sections for plot in section.plots]
    for plot in console.bar(plots, desc="writing plots", unit="plot"):
        plot.save(images)
    page.write_text(pages.render(
        f"Results on {', '.join(grid.datasets)}",
        answer=pages.answer(chosen, grid, comparison),
        facts=pages.facts(grid, found, len(failures)), groups=pages.groups(merged, grid),
        marks=pages.marks(merged), sections=sections,
        notes="\n".join([*notes.lines(grid, made, args.input_dir, failures), *sources]).strip(),
        command=shlex.join(["domainbed-kd", "report", *(argv or sys.argv[1:])])),
        encoding="utf-8")
    print(f"{page}\n{len(plots)} plots in {images}, each as PNG and PDF")
    return 0


if __name__ == "__main__":
    run_main(main)
