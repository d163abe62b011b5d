"""Published results beside a sweep's own, marked if another protocol was used.

`assets/published.csv` has a line for each method and dataset: the mean accuracy in percent over the
dataset's domains or, if `domain` is given, on that domain. A field is empty if the source does not
state it. `verified` is false if a number was only found in a later paper, not in the authors' own.
"""

import csv
import dataclasses
from pathlib import Path
from typing import NamedTuple

from domainbed_kd.results import protocols
from domainbed_kd.results.protocols import Protocol
from domainbed_kd.results.records import Grid
from domainbed_kd.results.tables import Cell, Table, average

PATH = Path(__file__).parents[1] / "assets" / "published.csv"
#: The selection method assumed if the source states none; such results are marked.
USUAL_SELECTION = "training-domain validation set"


class Row(NamedTuple):
    """A line of the file."""

    method: str
    dataset: str
    domain: str
    mean: float
    stderr: float | None
    selection: str
    backbone: str
    weights: str
    teacher: str
    steps: int | None
    search: str
    source: str
    verified: bool

    @property
    def label(self) -> str:
        """The method as the row of a table."""
        return f"{self.method}, published"


def load(unverified: bool = False) -> list[Row]:
    """The verified lines of the file, which tables print; with `unverified`, all lines."""
    with PATH.open(encoding="utf-8", newline="") as file:
        rows = [Row(**line | {
            "mean": float(line["mean"]),
            "stderr": float(line["stderr"]) if line["stderr"] else None,
            "steps": int(line["steps"]) if line["steps"] else None,
            "verified": line["verified"] == "true"})
            for line in csv.DictReader(file)]
    return [row for row in rows if row.verified or unverified]


def search(n_hparams: int, n_trials: int) -> str:
    """A random search, as in the file's column `search`."""
    return f"{n_hparams} draws, {n_trials} trials"


def of_table(table: Table) -> list[Row]:
    """The lines that belong in a table, by dataset and selection method."""
    datasets = table.columns if table.dataset is None else [table.dataset]
    return [row for row in load() if row.dataset in datasets
            and (row.selection or USUAL_SELECTION) == table.method]


def of_sweep(made: dict[type, list[Table]], grid: Grid
             ) -> tuple[dict[type, list[Table]], list[str]]:
    """A sweep's tables with published rows, and lines on their sources; the first is empty."""
    known = protocols.of_runs(grid)
    searched = search(len(grid.hparams_seeds), len(grid.trial_seeds))
    merged = {method: [merge(table, known, searched) for table in group]
              for method, group in made.items()}
    rows = [row for group in made.values() for table in group if table.dataset and table.has_data
            for row in of_table(table)]
    if not rows:
        return made, ["", f"No published results are known on {', '.join(grid.datasets)}."]
    return merged, ["", "Published rows, marked ! where a protocol differs or is not stated:",
                    *(f"    {line}" for line in describe(
                        list(dict.fromkeys(rows)), known, searched))]


def merge(table: Table, known: dict[tuple[str, str], set[Protocol]], searched: str) -> Table:
    """The table with a row for each published method that has a number in it.

    Cells are marked as of another protocol unless network, initial weights, steps, selection and
    search are stated and equal the sweep's. Unmarked ones compete for best and second like others.
    `known` are the sweep's protocols, from `protocols.of_runs`, and `searched` is from `search`.
    """
    if not table.has_data:
        return table
    rows = dict(table.rows)
    for row in of_table(table):
        column = row.dataset if table.dataset is None else row.domain or "Avg"
        if column not in table.columns or (table.dataset is None and row.domain):
            continue
        cells = rows.setdefault(row.label, [Cell(blank="-") for _ in table.columns])
        i = table.columns.index(column)
        usual = next((cells[i].settings for cells in table.rows.values()
                      if cells[i].mean is not None and not cells[i].differs), frozenset())
        is_alike = usual and not differences(row, table.method, known, searched)
        cells[i] = Cell(mean=row.mean, stderr=row.stderr, settings=usual, mixed=not is_alike)
    if table.dataset is None:
        for label in rows.keys() - table.rows.keys():
            rows[label][-1] = average(rows[label][:-1], blank="-")
    return dataclasses.replace(table, rows=rows)


def differences(row: Row, selection: str, known: dict[tuple[str, str], set[Protocol]],
                searched: str) -> list[str]:
    """The parts of a line's protocol that are not stated, or differ from a run's on its dataset.

    Runs whose network is a CLIP's are compared with such lines, and others with the rest.
    """
    ours = {p for (dataset, _), found in known.items() if dataset == row.dataset for p in found
            if (p.weights == protocols.CLIP_WEIGHTS) == (row.weights == protocols.CLIP_WEIGHTS)}
    stated = {
        "network": (row.backbone, {p.backbone for p in ours}),
        "initial weights": (row.weights, {p.weights for p in ours}),
        "steps": (row.steps, {p.steps for p in ours}),
        "selection": (row.selection, {selection}),
        "search": (row.search, {searched}),
        "exact mode": (False, {p.is_fast for p in ours})}
    return [name for name, (theirs, found) in stated.items() if found != {theirs}]


def describe(rows: list[Row], known: dict[tuple[str, str], set[Protocol]], searched: str
             ) -> list[str]:
    """A line for each published method: its protocol, where it differs, and its source."""
    lines = {}
    for row in rows:
        lines.setdefault(row.label, []).append(row)
    return [_describe(same, known, searched) for same in lines.values()]


def _describe(rows: list[Row], known: dict, searched: str) -> str:
    first, steps = rows[0], {}
    for row in rows:
        steps.setdefault(row.steps, {})[row.dataset] = None
    told = ", ".join(("steps not stated" if n is None else f"{n:,} steps")
                     + (f" ({', '.join(on)})" if len(steps) > 1 else "")
                     for n, on in steps.items())
    parts = [first.backbone, f"initial weights {first.weights or 'not stated'}", told,
             f"search {first.search or 'not stated'}",
             f"selected by {first.selection or 'a method that is not stated'}",
             *[f"teacher {first.teacher}"] * bool(first.teacher)]
    selection = first.selection or USUAL_SELECTION
    differ = dict.fromkeys(
        name for row in rows for name in differences(row, selection, known, searched))
    return (f"{first.label}: {'; '.join(parts)}. Other or not stated: "
            f"{', '.join(differ) or 'nothing'}. {first.source}")
