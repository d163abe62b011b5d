"""Tables of results: their cells, marks and order.

`formats` writes them as text, LaTeX, Markdown or CSV.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from domainbed_kd import algorithms, datasets
from domainbed_kd.folder import curves
from domainbed_kd.folder.curves import Curve
from domainbed_kd.results import protocols, selection
from domainbed_kd.results.records import Grid
from domainbed_kd.results.selection import Outcome, SelectionMethod
from domainbed_kd.tasks import CLASSIFICATION


@dataclass
class Cell:
    """A number of a table, in percent, and how reliable it is."""

    mean: float | None = None
    #: Standard error over trials; None where DomainBed gives none (the Avg column).
    stderr: float | None = None
    n_trials: int = 0
    n_finished: int = 0
    n_expected: int = 0
    #: The (dataset, settings) with which its runs were trained.
    settings: frozenset = frozenset()
    #: Whether the runs of one test env were trained with several settings or, for a published
    #: number, with different or unknown ones.
    mixed: bool = False
    #: Problems of bad teachers from which its runs learnt anyway.
    teacher_problems: frozenset[str] = frozenset()
    #: Whether most of the column was trained differently; set by `Table`.
    differs: bool = False
    #: 1 for the best of the column's comparable cells, 2 for the second, else 0; set by `Table`.
    rank: int = 0
    #: Shown where there is no number.
    blank: str = "X"

    @property
    def incomplete(self) -> bool:
        """Whether there is a number, but not from all the runs that belong to it."""
        return self.mean is not None and self.n_finished < self.n_expected

    @property
    def has_error(self) -> bool:
        """Whether its standard error means something: that of a single trial is always 0."""
        return self.stderr is not None and self.n_trials != 1

    @property
    def spoken(self) -> str:
        """The number and its marks in words, for screen readers."""
        said = [self.number("plus or minus") if self.has_error or self.mean is None
                else f"{self.mean:.1f}", {1: "best", 2: "second"}.get(self.rank, ""),
                "trained by another protocol" if self.differs else "",
                "teacher failed its audit" if self.teacher_problems else "",
                f"{self.n_finished} of {self.n_expected} runs" if self.incomplete else ""]
        return ", ".join(filter(None, said))

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
    #: The line below it on how its runs were trained; DomainBed's own output has none.
    protocol: str = ""
    #: What its numbers are, in percent.
    metric: str = CLASSIFICATION.metric

    def __post_init__(self):
        for column in zip(*self.rows.values()):
            _compare([cell for cell in column if cell.mean is not None])

    @property
    def has_data(self) -> bool:
        """Whether any cell holds a number."""
        return any(cell.mean is not None for row in self.rows.values() for cell in row)


def _compare(column: list[Cell]) -> None:
    """Marks cells trained differently from most, and the best two complete, comparable cells.

    Numbers that print alike rank alike. A lone cell is not the best.
    """
    settings = Counter(cell.settings for cell in column if not cell.mixed)
    usual = max(settings, key=settings.get, default=None)
    for cell in column:
        cell.differs = cell.mixed or cell.settings != usual
    comparable = [cell for cell in column if not cell.differs and not cell.incomplete]
    values = sorted({f"{cell.mean:.1f}" for cell in comparable}, key=float, reverse=True)
    if len(comparable) > 1:
        for cell in comparable:
            place = values.index(f"{cell.mean:.1f}") + 1
            cell.rank = place if place <= 2 else 0


def _measured(values: Iterable[float], outcomes: list[tuple[str, Outcome]]) -> Cell:
    """The cell of accuracies, one for each trial, which come from (dataset, Outcome) pairs."""
    values = list(values)
    coverages = [outcome.coverage for _, outcome in outcomes]
    return Cell(
        mean=100 * float(np.mean(values)) if values else None,
        stderr=100 * float(np.std(values / np.sqrt(len(values)))) if values else None,
        n_trials=len(values),
        n_finished=sum(c.n_finished for c in coverages),
        n_expected=sum(c.n_expected for c in coverages),
        settings=frozenset((dataset, settings) for dataset, outcome in outcomes
                           for settings in outcome.coverage.settings),
        mixed=any(len(c.settings) > 1 for c in coverages),
        teacher_problems=frozenset().union(*(c.teacher_problems for c in coverages)))


def average(row: list[Cell], blank: str = "X") -> Cell:
    """The plain mean of a row; `blank` if any cell has no number."""
    if not row or any(cell.mean is None for cell in row):
        return Cell(blank=blank)
    return Cell(
        mean=sum(cell.mean for cell in row) / len(row),
        n_trials=min(cell.n_trials for cell in row),
        n_finished=sum(cell.n_finished for cell in row),
        n_expected=sum(cell.n_expected for cell in row),
        settings=frozenset().union(*(cell.settings for cell in row)),
        mixed=any(cell.mixed for cell in row),
        teacher_problems=frozenset().union(*(cell.teacher_problems for cell in row)))


def row_order(names: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """The distinct algorithms in the order of a table's rows: the known ones, then the others.

    By default `known` are DomainBed's algorithms, then this package's and its plug-ins'. Each is
    followed by its rows with something on top, such as teachers, in the order of the names.
    """
    names = dict.fromkeys(names)
    known = dict.fromkeys(known or (
        name + mark for name in (*algorithms.DOMAINBED, *algorithms.ALGORITHMS)
        for mark in ("", curves.MENDED)))
    on_top = defaultdict(list)
    for name in names:
        if name not in known and (base := algorithms.base_of(name)) in known:
            on_top[base].append(name)
    placed = {*known, *(name for some in on_top.values() for name in some)}
    return [*(name for base in known for name in (base, *on_top[base]) if name in names),
            *(name for name in names if name not in placed)]


def environments(dataset: str, n_envs: int) -> list[str]:
    """The labels of a dataset's columns; numbers where the dataset is not registered."""
    if dataset in datasets.DATASETS:
        return datasets.environments(dataset)
    return [str(i) for i in range(n_envs)]


def of_sweep(found: list[Curve], grid: Grid, methods: Iterable[type[SelectionMethod]],
             upstream: bool = False) -> dict[type[SelectionMethod], list[Table]]:
    """{selection method: its tables}.

    Numbers are DomainBed's to the bit if the curves come in the order in which it reads them. With
    `upstream`, tables have only its datasets, and its algorithms come first, in its order.
    """
    seen = [curves.row(curve.args) for curve in found]
    if upstream:
        rows = row_order(seen, algorithms.DOMAINBED)
        columns = [name for name in datasets.DOMAINBED if name in grid.datasets]
    else:
        rows = row_order([*seen, *grid.algorithms])
        columns = [*(name for name in datasets.DATASETS if name in grid.datasets),
                   *(name for name in grid.datasets if name not in datasets.DATASETS)]
    searches = curves.searches(found)
    made = {method: build(method, selection.outcomes(searches, grid, method), rows, columns,
                          grid.n_envs, grid.metric, grid.held_out) for method in methods}
    known = protocols.of_runs(grid)
    for table in (table for group in made.values() for table in group if table.has_data):
        table.protocol = protocols.line(known, grid, table.dataset, table.method, rows)
    return made


def build(method: type[SelectionMethod], outcomes: dict, algorithm_names: list[str],
          dataset_names: list[str], n_envs: dict[str, int],
          metric: str = CLASSIFICATION.metric, held_out: dict[str, list[int]] | None = None
          ) -> list[Table]:
    """A method's tables of `selection.outcomes`: one for each dataset, then that of averages.

    Rows and datasets come in the order of the names given. `n_envs` is the number of environments
    of each dataset, `metric` is what the outcomes measure, and `held_out` has the environments
    that are columns, if these are not all.
    """
    tables = []
    for dataset in dataset_names:
        labels = environments(dataset, n_envs[dataset])
        held = [env for env in range(len(labels))
                if held_out is None or env in held_out[dataset]]
        rows = {}
        for algorithm in algorithm_names:
            found = [outcomes.get((dataset, algorithm, env)) for env in held]
            row = [_measured(o.accs.values(), [(dataset, o)]) if o else Cell() for o in found]
            rows[algorithm] = [*row, average(row)]
        columns = [*(labels[env] for env in held), "Avg"]
        tables.append(Table(method.name, dataset, columns, rows, metric=metric))
    rows = {}
    for algorithm in algorithm_names:
        row = [_over_environments(dataset, algorithm, outcomes, n_envs[dataset])
               for dataset in dataset_names]
        rows[algorithm] = [*row, average(row)]
    tables.append(Table(method.name, None, [*dataset_names, "Avg"], rows, metric=metric))
    return tables


def _over_environments(dataset: str, algorithm: str, outcomes: dict, n_envs: int) -> Cell:
    """The mean over trials of each trial's mean over its test envs."""
    found = [outcomes[dataset, algorithm, env] for env in range(n_envs)
             if (dataset, algorithm, env) in outcomes]
    values = []
    for trial in sorted({trial for outcome in found for trial in outcome.accs}):
        having = [outcome for outcome in found if trial in outcome.accs]
        having.sort(key=lambda outcome: outcome.places.get(trial, 0))  # sums depend on the order
        values.append(float(np.mean([outcome.accs[trial] for outcome in having])))
    return _measured(values, [(dataset, outcome) for outcome in found])


def teacher_problems(cells: Iterable[Cell]) -> str:
    """What the mark of bad teachers in these cells means; empty if none has it."""
    found = frozenset().union(*(cell.teacher_problems for cell in cells if cell.mean is not None))
    return ("learnt from teachers that failed their audit (--allow_bad_teacher): "
            f"{', '.join(sorted(found))}." if found else "")


def needs_pairs(method: type[SelectionMethod], grid: Grid) -> str | None:
    """Why a method that needs runs with two test envs has no tables; None if it has."""
    if not method.uses_pairs or grid.has_pairs or not grid.begun:
        return None
    return (f"{method.name}: needs runs with two test envs "
            "(launch the sweep without --single_test_envs).")
