r"""Tables and their remarks as text, LaTeX, Markdown or CSV.

Anybody may have chosen the names, so each format escapes what it would interpret: control
characters in all, commands in LaTeX and Markdown, formulas in CSV. Only `upstream` prints them raw,
as DomainBed does.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from domainbed_kd.algorithms import display_name
from domainbed_kd.results import tables
from domainbed_kd.results.records import Grid
from domainbed_kd.results.tables import Cell, Table
from domainbed_kd.tasks import CLASSIFICATION

#: The file name extension of each format.
EXTENSIONS = {"text": "txt", "latex": "tex", "csv": "csv", "markdown": "md"}


def document(style: str, made: dict, compared: dict, grid: Grid, n_records: int,
             remarks: list[str], more: Iterable["Strings"] = ()) -> str:
    """All tables of a sweep in one of the formats, with the remarks below, except in csv.

    `made` and `compared` have the tables and the comparison of each selection method, if any;
    `more` are further tables.
    """
    if style == "csv":
        return as_csv(table for method, group in made.items() for table in group
                      if not tables.needs_pairs(method, grid))
    write = {"text": text, "latex": latex, "markdown": markdown}[style]
    parts = [] if style == "latex" else [f"Total records: {n_records}\n"]
    for method, group in made.items():
        if style == "latex":
            parts.append(_latex_section(method.name))
        if why := tables.needs_pairs(method, grid):
            parts.append("\n" + escape_latex(why) if style == "latex" else f"\n{why}\n")
        else:
            parts += map(write, group)
        if method in compared:
            parts.append(strings(style, compared[method]))
    if more and style == "latex":
        parts.append("\n\\subsection{Trust}")
    parts += [strings(style, each) for each in more]
    lines = [printable(line) for line in remarks]
    if style == "latex":
        return _latex_document([*parts, *(f"% {line}".rstrip() for line in lines)], n_records)
    if style == "markdown" and lines:
        longest = max(map(len, re.findall("`+", "".join(lines))), default=0)
        fence = "`" * max(3, longest + 1)
        lines = [f"\n{fence}text", *lines[1:], fence]
    return "".join(parts) + "".join(f"{line}\n" for line in lines)


def upstream(made: dict, n_records: int, style: str) -> str:
    """DomainBed's own output in text or latex, byte for byte."""
    if style == "text":
        return f"Total records: {n_records}\n" + "".join(
            upstream_text(table) for group in made.values() for table in group)
    return _latex_document(
        (part for method, group in made.items()
         for part in (_latex_section(method.name), *map(upstream_latex, group))), n_records)


def printable(name: str) -> str:
    r"""The name on one line, with control characters as escapes such as \n."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def _rows(table: Table, name: Callable[[str], str], label: Callable[[str], str],
          cell: Callable[[Cell], str]) -> list[list[str]]:
    """The table as rows of strings, the header first."""
    return [[label(column) for column in ("Algorithm", *table.columns)],
            *([name(algorithm), *map(cell, row)] for algorithm, row in table.rows.items())]


# Text. DomainBed's own output cuts cells to width and has no marks.


def _title(table: Table) -> str:
    what = "Averages" if table.dataset is None else f"Dataset: {table.dataset}"
    return f"-------- {what}, model selection method: {table.method}{_metric(table)}"


def _metric(table: Table) -> str:
    """The metric as a title shows it; empty for accuracy, as in DomainBed."""
    return "" if table.metric == CLASSIFICATION.metric else f", {table.metric} in %"


def _width(table: Table) -> int:
    return 25 if table.dataset is None else 20


def upstream_text(table: Table) -> str:
    """The table as DomainBed prints it, byte for byte; the first line is empty."""
    width = _width(table)
    rows = _rows(table, str, str, lambda cell: cell.number("+/-"))
    lines = ["  ".join(text.ljust(width)[:width] for text in row) + " " for row in rows]
    return "\n".join(["", _title(table), *lines, ""])


def text(table: Table) -> str:
    """As DomainBed's, but with whole names, and marks on cells."""
    rows = _rows(table, lambda name: printable(display_name(name)), printable,
                 lambda cell: cell.number("+/-") + _marks(cell, "*"))
    below = [printable(table.protocol)] if table.protocol else []
    return "\n".join(
        ["", printable(_title(table)), *_columns(rows, _width(table)), *below, ""])


def _marks(cell: Cell, star: str) -> str:
    """The marks behind a number."""
    return "".join([" !" * cell.differs, " ?" * bool(cell.teacher_problems),
                    f" {star}{cell.n_finished}/{cell.n_expected}" * cell.incomplete])


def _columns(rows: list[list[str]], least_width: int) -> list[str]:
    """Lines with aligned cells, two spaces apart."""
    widths = [max(least_width, *map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)) + " " for row in rows]


# LaTeX.

_ESCAPES = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    **{character: rf"\{character}" for character in "_%&#${}"}})


def escape_latex(name: str) -> str:
    """The name so that LaTeX prints it as it is; two hyphens do not become an en dash."""
    return re.sub("-(?=-)", "-{}", printable(name).translate(_ESCAPES))


def _latex_document(parts: Iterable[str], n_records: int) -> str:
    """A whole document, as DomainBed's."""
    return "\n".join([
        r"\documentclass{article}", r"\usepackage{booktabs}", r"\usepackage{adjustbox}",
        r"\begin{document}", r"\section{Full DomainBed results}", f"% Total records: {n_records}",
        *parts, r"\end{document}", ""])


def _latex_section(method: str) -> str:
    """The heading over a method's tables."""
    return f"\n\\subsection{{Model selection: {method}}}"


def _latex(rows: list[list[str]], title: str, after: Iterable[str] = ()) -> str:
    return "\n".join([
        "", rf"\subsubsection{{{title}}}", "", r"\begin{center}",
        r"\adjustbox{max width=\textwidth}{%",
        rf"\begin{{tabular}}{{l{'c' * (len(rows[0]) - 1)}}}", r"\toprule",
        " & ".join(rows[0]) + r" \\", r"\midrule", *(" & ".join(row) + r" \\" for row in rows[1:]),
        r"\bottomrule", r"\end{tabular}}", *after, r"\end{center}"])


def upstream_latex(table: Table) -> str:
    """The table as DomainBed writes it, byte for byte: long labels lose their closing brace."""
    width = _width(table)
    rows = _rows(table, str, lambda name: rf"\textbf{{{name}}}".replace("%", r"\%"),
                 lambda cell: cell.number(r"$\pm$"))
    rows = [[text.ljust(width)[:width] for text in row] for row in rows]
    return _latex(rows, table.dataset or "Averages")


def latex(table: Table) -> str:
    """A booktabs table that compiles: best in bold, second underlined, marks explained below."""
    def cell_latex(cell):
        number = f"{cell.mean:.1f}" if _is_lone(cell) else cell.number(r"$\pm$")
        number = {1: rf"\textbf{{{number}}}", 2: rf"\underline{{{number}}}"}.get(cell.rank, number)
        number += r"$^{\circ}$" if _is_lone(cell) else ""
        number += r"$^{\dagger}$" if cell.differs else ""
        number += r"$^{\ddagger}$" if cell.teacher_problems else ""
        return number + (rf"$^{{*{cell.n_finished}/{cell.n_expected}}}$" if cell.incomplete else "")

    def bold(name):
        return rf"\textbf{{{escape_latex(name)}}}"

    rows = _rows(table, lambda name: escape_latex(display_name(name)), bold, cell_latex)
    cells = [cell for row in table.rows.values() for cell in row if cell.mean is not None]
    after = []
    if any(map(_is_lone, cells)):
        after.append(r"$^{\circ}$ one trial, so no standard error.")
    if any(cell.incomplete for cell in cells):
        after.append(r"$^{*}$ finished runs / runs of a whole sweep.")
    if any(cell.differs for cell in cells):
        after.append(r"$^{\dagger}$ trained by another protocol than most of the column.")
    if problems := tables.teacher_problems(cells):
        after.append(r"$^{\ddagger}$ " + escape_latex(problems))
    if table.protocol:
        after.append(escape_latex(table.protocol))
    if after:
        after = ["", r"\smallskip\footnotesize " + " ".join(after)]
    return _latex(rows, escape_latex((table.dataset or "Averages") + _metric(table)), after)


def _is_lone(cell: Cell) -> bool:
    """Whether a cell has a single trial, so that its standard error is 0."""
    return cell.stderr is not None and not cell.has_error


# Markdown and CSV.


def markdown(table: Table) -> str:
    """A pipe table with the best in bold."""
    def cell_markdown(cell):
        number = cell.number("±")
        return (f"**{number}**" if cell.rank == 1 else number) + _marks(cell, r"\*")

    rows = _rows(table, lambda name: _escape_markdown(display_name(name)), _escape_markdown,
                 cell_markdown)
    below = f"\n{_escape_markdown(table.protocol)}\n" if table.protocol else ""
    title = f"{_escape_markdown(table.dataset or 'Averages')}, {table.method}{_metric(table)}"
    return _markdown(rows, title) + below


def _escape_markdown(name: str) -> str:
    return "".join("\\" + c if c in r"\`*_{}[]<>#|~&" else c for c in printable(name))


def _markdown(rows: list[list[str]], title: str, lead: str = "") -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(["", f"### {title}", "", *([lead, ""] if lead else []),
                      *(f"| {' | '.join(row)} |" for row in rows), ""])


class Strings(NamedTuple):
    """A table other than of accuracies: a title, a sentence above, rows, a remark below."""

    title: str
    #: Empty if there is nothing to say first.
    lead: str
    #: The header comes first.
    rows: list[list[str]]
    remark: str


def strings(style: str, of: Strings) -> str:
    """The table as text, latex or markdown."""
    escape = {"text": printable, "latex": escape_latex, "markdown": _escape_markdown}[style]
    title, lead, remark = map(escape, (of.title, of.lead, of.remark))
    rows = [list(map(escape, row)) for row in of.rows]
    if style == "latex":
        rows[0] = [rf"\textbf{{{cell}}}" for cell in rows[0]]
        below = " ".join(filter(None, (lead, remark)))
        return _latex(rows, title, ["", r"\smallskip\footnotesize " + below])
    if style == "markdown":
        return f"{_markdown(rows, title, lead)}\n{remark}\n"
    return "\n".join(["", f"-------- {title}", *([lead] if lead else []), *_columns(rows, 0),
                      remark, ""])


def as_csv(made: Iterable[Table]) -> str:
    """One line for each cell that has or should have a number, in percent and unrounded.

    Text that begins with = + - or @ gets an apostrophe in front, as a spreadsheet would take it
    for a formula.
    """
    def quoted(name):
        name = printable(name)
        return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["selection", "dataset", "algorithm", "environment", "mean", "stderr",
                     "n_trials", "runs_finished", "runs_expected", "other_protocol",
                     "teacher_problem", "metric"])
    for table in made:
        for algorithm, row in table.rows.items():
            for column, cell in zip(table.columns, row):
                if cell.mean is None and not cell.n_expected:
                    continue
                on, env = (table.dataset, column) if table.dataset else (column, "all")
                writer.writerow([
                    table.method, *map(quoted, (on, display_name(algorithm), env)),
                    *("" if value is None else value for value in (cell.mean, cell.stderr)),
                    cell.n_trials, cell.n_finished, cell.n_expected, int(cell.differs),
                    quoted("; ".join(sorted(cell.teacher_problems))), table.metric])
    return out.getvalue()
