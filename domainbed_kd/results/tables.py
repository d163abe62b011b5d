"""Results tables: computed once, then written as text, LaTeX, Markdown or CSV."""

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from domainbed_kd import algorithms, datasets
from domainbed_kd.results.selection import Outcome, SelectionMethod

# Names that tables show instead of the class's.
DISPLAY_NAMES = {"FourDs": "4Ds"}


@dataclass
class Cell:
    """A number of a table, in percent, and how far to trust it."""

    mean: float | None = None
    #: Standard error over trials; None where DomainBed gives none (the Avg column).
    stderr: float | None = None
    n_trials: int = 0
    n_finished: int = 0
    n_expected: int = 0
    #: By which (dataset, protocol) its runs were trained.
    protocols: frozenset = frozenset()
    #: Whether the runs of one test env were trained by several protocols, or, of a published
    #: number, by another or an unknown one.
    mixed: bool = False
    #: What was wrong with teachers that its runs learnt from all the same.
    teacher_problems: frozenset[str] = frozenset()
    #: Whether that is not how most of the column was trained; set by `Table`.
    differs: bool = False
    #: 1 for the best of the column's comparable cells, 2 for the second, else 0; set by `Table`.
    rank: int = 0
    #: What stands for no number.
    blank: str = "X"

    @property
    def incomplete(self) -> bool:
        """Whether there is a number, but not from all the runs that belong to it."""
        return self.mean is not None and self.n_finished < self.n_expected

    def number(self, plus_minus: str) -> str:
        """Mean and standard error as DomainBed rounds them; `blank` where there is no number."""
        if self.mean is None:
            return self.blank
        if self.stderr is None:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} {plus_minus} {self.stderr:.1f}"


@dataclass
class Table:
    """One table: a row of cells per algorithm, a column per environment (or dataset) and Avg."""

    method: str
    #: None for the table of averages over datasets.
    dataset: str | None
    columns: list[str]
    rows: dict[str, list[Cell]]
    #: A line on how its runs were trained, for below it; DomainBed's own output has none.
    protocol: str = ""

    def __post_init__(self):
        for column in zip(*self.rows.values()):
            _compare([cell for cell in column if cell.mean is not None])

    @property
    def has_data(self) -> bool:
        """Whether any cell holds a number."""
        return any(cell.mean is not None for row in self.rows.values() for cell in row)


def _compare(column: list[Cell]) -> None:
    """Marks cells trained otherwise than most, and the best two of whole, comparable cells.

    Numbers that print alike rank alike; nothing is best without something to be better than.
    """
    protocols = Counter(cell.protocols for cell in column if not cell.mixed)
    usual = max(protocols, key=protocols.get, default=None)
    for cell in column:
        cell.differs = cell.mixed or cell.protocols != usual
    comparable = [cell for cell in column if not cell.differs and not cell.incomplete]
    values = sorted({f"{cell.mean:.1f}" for cell in comparable}, key=float, reverse=True)
    if len(comparable) > 1:
        for cell in comparable:
            place = values.index(f"{cell.mean:.1f}") + 1
            cell.rank = place if place <= 2 else 0


def _measured(values: Iterable[float], outcomes: list[tuple[str, Outcome]]) -> Cell:
    """The cell of these accuracies, one per trial, which come from (dataset, Outcome) pairs."""
    values = list(values)
    coverages = [outcome.coverage for _, outcome in outcomes]
    return Cell(
        mean=100 * float(np.mean(values)) if values else None,
        stderr=100 * float(np.std(values)) / math.sqrt(len(values)) if values else None,
        n_trials=len(values),
        n_finished=sum(c.n_finished for c in coverages),
        n_expected=sum(c.n_expected for c in coverages),
        protocols=frozenset((dataset, protocol) for dataset, outcome in outcomes
                            for protocol in outcome.coverage.protocols),
        mixed=any(len(c.protocols) > 1 for c in coverages),
        teacher_problems=frozenset().union(*(c.teacher_problems for c in coverages)))


def _average(row: list[Cell]) -> Cell:
    """The plain mean of a row; no number if any cell has none."""
    if not row or any(cell.mean is None for cell in row):
        return Cell()
    return Cell(
        mean=sum(cell.mean for cell in row) / len(row),
        n_trials=min(cell.n_trials for cell in row),
        n_finished=sum(cell.n_finished for cell in row),
        n_expected=sum(cell.n_expected for cell in row),
        protocols=frozenset().union(*(cell.protocols for cell in row)),
        mixed=any(cell.mixed for cell in row),
        teacher_problems=frozenset().union(*(cell.teacher_problems for cell in row)))


def ordered(names: Iterable[str], *orders: Iterable[str]) -> list[str]:
    """The distinct names: those of the orders in their order, then the others as they come."""
    names = list(dict.fromkeys(names))
    known = [name for order in orders for name in order]
    return [name for name in dict.fromkeys(known) if name in names] + [
        name for name in names if name not in known]


def row_order(names: Iterable[str]) -> list[str]:
    """Algorithms as the rows of a table: DomainBed's, ours, then those of neither."""
    return ordered(names, algorithms.DOMAINBED, algorithms.ALGORITHMS)


def environments(dataset: str, n_envs: int) -> list[str]:
    """The labels of a dataset's columns; numbers where the dataset is not registered."""
    if dataset in datasets.DATASETS:
        return datasets.environments(dataset)
    return [str(i) for i in range(n_envs)]


def build(method: type[SelectionMethod], outcomes: dict, algorithm_names: list[str],
          dataset_names: list[str], n_envs: dict[str, int]) -> list[Table]:
    """A method's tables: one per dataset, then that of averages.

    Args:
        method: the selection method.
        outcomes: {(dataset, algorithm, test env): Outcome} of `model_selection.outcomes`.
        algorithm_names: the rows, in order.
        dataset_names: the datasets, in order.
        n_envs: {dataset: how many environments its records have}.
    """
    tables = []
    for dataset in dataset_names:
        labels = environments(dataset, n_envs[dataset])
        rows = {}
        for algorithm in algorithm_names:
            found = [outcomes.get((dataset, algorithm, env)) for env in range(len(labels))]
            row = [_measured(o.accs.values(), [(dataset, o)]) if o else Cell() for o in found]
            rows[algorithm] = [*row, _average(row)]
        tables.append(Table(method.name, dataset, [*labels, "Avg"], rows))
    rows = {}
    for algorithm in algorithm_names:
        row = [_over_environments(dataset, algorithm, outcomes, n_envs[dataset])
               for dataset in dataset_names]
        rows[algorithm] = [*row, _average(row)]
    tables.append(Table(method.name, None, [*dataset_names, "Avg"], rows))
    return tables


def _over_environments(dataset: str, algorithm: str, outcomes: dict, n_envs: int) -> Cell:
    """Each trial's mean over the test envs that it has, then over trials."""
    found = {env: outcomes[dataset, algorithm, env] for env in range(n_envs)
             if (dataset, algorithm, env) in outcomes}
    trials = sorted({trial for outcome in found.values() for trial in outcome.accs})
    values = [float(np.mean([o.accs[trial] for o in found.values() if trial in o.accs]))
              for trial in trials]
    return _measured(values, [(dataset, outcome) for outcome in found.values()])


def teacher_problems(cells: Iterable[Cell]) -> str:
    """What the mark of bad teachers means in these cells; empty if none has it."""
    found = frozenset().union(*(cell.teacher_problems for cell in cells if cell.mean is not None))
    return ("learnt from teachers that failed their audit (--allow_bad_teacher): "
            f"{', '.join(sorted(found))}." if found else "")


def display_name(algorithm: str) -> str:
    """An algorithm's name for readers."""
    return DISPLAY_NAMES.get(algorithm, algorithm)


def _grid(table: Table, name: Callable[[str], str], label: Callable[[str], str],
          cell: Callable[[Cell], str]) -> list[list[str]]:
    """The table as rows of strings, the header first."""
    return [[label(column) for column in ("Algorithm", *table.columns)],
            *([name(algorithm), *map(cell, row)] for algorithm, row in table.rows.items())]


# Text. DomainBed's own differs in that it cuts cells and has no marks.


def _title(table: Table) -> str:
    what = "Averages" if table.dataset is None else f"Dataset: {table.dataset}"
    return f"-------- {what}, model selection method: {table.method}"


def _width(table: Table) -> int:
    return 25 if table.dataset is None else 20


def upstream_text(table: Table) -> str:
    """The table as DomainBed prints it, to the byte, an empty line first."""
    width = _width(table)
    rows = _grid(table, str, str, lambda cell: cell.number("+/-"))
    lines = ["  ".join(text.ljust(width)[:width] for text in row) + " " for row in rows]
    return "\n".join(["", _title(table), *lines, ""])


def text(table: Table) -> str:
    """As DomainBed's, but whole names, and cells that say what they lack."""
    def cell_text(cell):
        marks = " !" if cell.differs else ""
        marks += " ?" if cell.teacher_problems else ""
        marks += f" *{cell.n_finished}/{cell.n_expected}" if cell.incomplete else ""
        return cell.number("+/-") + marks

    rows = _grid(table, display_name, str, cell_text)
    below = [table.protocol] if table.protocol else []
    return "\n".join(["", _title(table), *_columns(rows, _width(table)), *below, ""])


def _columns(rows: list[list[str]], least_width: int) -> list[str]:
    """Lines in which cells stand below each other, two spaces apart."""
    widths = [max(least_width, *map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)) + " " for row in rows]


# LaTeX.

_ESCAPES = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    **{character: rf"\{character}" for character in "_%&#${}"}})


def escape_latex(name: str) -> str:
    """A name that LaTeX prints as it is."""
    return name.translate(_ESCAPES)


def latex_document(parts: Iterable[str], n_records: int) -> str:
    """A whole document, as DomainBed's."""
    return "\n".join([
        r"\documentclass{article}", r"\usepackage{booktabs}", r"\usepackage{adjustbox}",
        r"\begin{document}", r"\section{Full DomainBed results}", f"% Total records: {n_records}",
        *parts, r"\end{document}", ""])


def latex_section(method: str) -> str:
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
    """The table as DomainBed writes it, to the byte: long labels lose their brace."""
    width = _width(table)
    rows = _grid(table, str, lambda name: rf"\textbf{{{name}}}".replace("%", r"\%"),
                 lambda cell: cell.number(r"$\pm$"))
    rows = [[text.ljust(width)[:width] for text in row] for row in rows]
    return _latex(rows, table.dataset or "Averages")


def latex(table: Table) -> str:
    """A booktabs table that compiles: best in bold, second underlined, marks explained below."""
    def cell_latex(cell):
        number = cell.number(r"$\pm$")
        number = {1: rf"\textbf{{{number}}}", 2: rf"\underline{{{number}}}"}.get(cell.rank, number)
        number += r"$^{\dagger}$" if cell.differs else ""
        number += r"$^{\ddagger}$" if cell.teacher_problems else ""
        return number + (rf"$^{{*{cell.n_finished}/{cell.n_expected}}}$" if cell.incomplete else "")

    def bold(name):
        return rf"\textbf{{{escape_latex(name)}}}"

    rows = _grid(table, lambda name: escape_latex(display_name(name)), bold, cell_latex)
    cells = [cell for row in table.rows.values() for cell in row if cell.mean is not None]
    after = []
    if any(cell.incomplete for cell in cells):
        after.append(r"$^{*}$ finished runs / runs of a whole sweep.")
    if any(cell.differs for cell in cells):
        after.append(r"$^{\dagger}$ trained by another protocol than most of the column.")
    if problems := teacher_problems(cells):
        after.append(r"$^{\ddagger}$ " + escape_latex(problems))
    if table.protocol:
        after.append(escape_latex(table.protocol))
    if after:
        after = ["", r"\smallskip\footnotesize " + " ".join(after)]
    return _latex(rows, escape_latex(table.dataset or "Averages"), after)


# Markdown and CSV.


def markdown(table: Table) -> str:
    """A pipe table with the best in bold."""
    def cell_markdown(cell):
        number = cell.number("±")
        number = f"**{number}**" if cell.rank == 1 else number
        number += " !" if cell.differs else ""
        number += " ?" if cell.teacher_problems else ""
        return number + (rf" \*{cell.n_finished}/{cell.n_expected}" if cell.incomplete else "")

    rows = _grid(table, lambda name: _escape_markdown(display_name(name)), _escape_markdown,
                 cell_markdown)
    below = f"\n{_escape_markdown(table.protocol)}\n" if table.protocol else ""
    title = f"{_escape_markdown(table.dataset or 'Averages')}, {table.method}"
    return _markdown(rows, title) + below


def _escape_markdown(name: str) -> str:
    return "".join("\\" + c if c in r"\`*_{}[]<>#|~" else c for c in name)


def _markdown(rows: list[list[str]], title: str) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(["", f"### {title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


# Other tables than of accuracies.


def grid(style: str, title: str, rows: list[list[str]], remark: str) -> str:
    """Rows of strings, the header first, as text, latex or markdown, with a remark below."""
    if style == "latex":
        header, *body = [[escape_latex(cell) for cell in row] for row in rows]
        header = [rf"\textbf{{{cell}}}" for cell in header]
        return _latex([header, *body], escape_latex(title),
                      ["", r"\smallskip\footnotesize " + escape_latex(remark)])
    if style == "markdown":
        escaped = [[_escape_markdown(cell) for cell in row] for row in rows]
        return f"{_markdown(escaped, _escape_markdown(title))}\n{_escape_markdown(remark)}\n"
    return "\n".join(["", f"-------- {title}", *_columns(rows, 0), remark, ""])


def as_csv(tables: Iterable[Table]) -> str:
    """One line per cell that has a number or should; accuracies in percent, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["selection", "dataset", "algorithm", "environment", "mean", "stderr",
                     "n_trials", "runs_finished", "runs_expected", "other_protocol",
                     "teacher_problem"])
    for table in tables:
        for algorithm, row in table.rows.items():
            for column, cell in zip(table.columns, row):
                if cell.mean is None and not cell.n_expected:
                    continue
                writer.writerow([
                    table.method, *((table.dataset, display_name(algorithm), column)
                                    if table.dataset else (column, display_name(algorithm), "all")),
                    *("" if value is None else value for value in (cell.mean, cell.stderr)),
                    cell.n_trials, cell.n_finished, cell.n_expected, int(cell.differs),
                    "; ".join(sorted(cell.teacher_problems))])
    return out.getvalue()
