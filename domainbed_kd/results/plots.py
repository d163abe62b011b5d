"""A sweep's plots, drawn with matplotlib from `tables.Table`s and from `summaries`.

All are 4.6 inches wide, so that their text is legible on a phone. An algorithm has the same colour,
marker and line in all of them. Names are drawn as they are: a `$` does not start a formula.
"""

import base64
import io
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from domainbed_kd.algorithms import display_name
from domainbed_kd.results import significance, summaries, tables
from domainbed_kd.results.formats import printable

WIDTH = 4.6  # inches
# Okabe and Ito's colours, which colour-blind people can tell apart, without yellow; then Tol's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#882255",
           "#999999", "#999933")
MARKERS = "osD^vPX*<>p"  # 11, so that a colour and marker recur together after 110 algorithms only
MOST_NUMBERS = 10  # columns in which numbers have room
LINES = ("-", "--", "-.", ":")
STYLE = {
    "text.parse_math": False,
    "font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "lines.linewidth": 1.4, "lines.markersize": 4,
    "svg.hashsalt": "domainbed_kd", "pdf.fonttype": 42}
# Without a date in the files, the same sweep gives the same bytes.
METADATA = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


class Plot(NamedTuple):
    """A figure and its texts."""

    #: The name of its files.
    name: str
    #: The text below it.
    caption: str
    #: What it shows, for screen readers.
    alt: str
    figure: Figure

    def save(self, folder: Path) -> None:
        """Writes NAME.png and NAME.pdf."""
        for kind in ("png", "pdf"):
            self.figure.savefig(folder / f"{self.name}.{kind}", dpi=200, metadata=METADATA[kind])

    def data_uri(self) -> str:
        """The figure as an SVG for the `src` of an <img>."""
        content = io.BytesIO()
        with rc_context(STYLE):
            self.figure.savefig(content, format="svg", metadata=METADATA["svg"])
        return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


class Looks:
    """The colour, marker and line of each algorithm, by its place among all."""

    def __init__(self, algorithms: Iterable[str]):
        self.places = {name: place for place, name in enumerate(algorithms)}

    def ordered(self, names: Iterable[str]) -> list[str]:
        """The algorithms among the names, in order."""
        return sorted(set(names), key=self.places.get)

    def colour(self, algorithm: str) -> str:
        """One of `COLOURS`."""
        return COLOURS[self.places[algorithm] % len(COLOURS)]

    def line(self, algorithm: str) -> dict:
        """Keyword arguments for `Axes.plot`."""
        place = self.places[algorithm]
        return {"color": self.colour(algorithm), "marker": MARKERS[place % len(MARKERS)],
                "linestyle": LINES[place // len(COLOURS) % len(LINES)],
                "label": label_of(algorithm)}


def label_of(algorithm: str) -> str:
    """The algorithm's name for readers, in one line."""
    return printable(display_name(algorithm))


def _panels(n: int, height: float, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with n panels of this height in inches, in two columns if there are several."""
    rows, columns = -(-n // 2), min(n, 2)
    figure = Figure(figsize=(WIDTH, rows * height))
    axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False).flatten()
    for axis in axes[n:]:
        axis.remove()
    return figure, list(axes[:n])


def _legend(figure: Figure) -> None:
    """Adds one legend below all panels, and room for it."""
    drawn = {label: handle for axis in figure.axes
             for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(drawn) // 4) + 0.1)
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=min(4, len(drawn)),
                  columnspacing=1.2, handlelength=2.2)


def ready(name: str, caption: str, alt: str, figure: Figure) -> Plot:
    """The plot. Its figure is laid out here, once instead of once for each file."""
    ConstrainedLayoutEngine().execute(figure)
    return Plot(name, caption, alt, figure)


def _spoken(values: dict[str, float], unit: str = " %") -> str:
    """Numbers and their names, for an alt text."""
    return ", ".join(f"{name} {value:.1f}{unit}" for name, value in values.items())


@rc_context(STYLE)
def domains(table: tables.Table, looks: Looks) -> Plot:
    """A panel of bars with standard errors, for each column of a table that has numbers."""
    shown = [i for i in range(len(table.columns))
             if any(row[i].mean is not None for row in table.rows.values())]
    names = list(table.rows)
    figure, axes = _panels(len(shown), 0.2 * len(names) + 0.55, share_y=True)
    top = max(row[i].mean + (row[i].stderr or 0)
              for i in shown for row in table.rows.values() if row[i].mean is not None)
    for axis, i in zip(axes, shown):
        for y, name in enumerate(names):
            cell = table.rows[name][i]
            if cell.mean is None:
                continue
            axis.barh(y, cell.mean, xerr=cell.stderr or None, color=looks.colour(name),
                      height=0.72, error_kw={"elinewidth": 1, "capsize": 2})
            axis.text(cell.mean + (cell.stderr or 0) + 0.015 * top, y, f"{cell.mean:.1f}",
                      va="center", fontsize=8)
        axis.set_title(printable(table.columns[i]))
        axis.set_xlim(0, 1.17 * top)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(names)), map(label_of, names))
    axes[0].invert_yaxis()
    figure.supxlabel(f"{table.metric}, %", fontsize=9)
    means = {label_of(name): row[-1].mean for name, row in table.rows.items()
             if row[-1].mean is not None}
    return ready(f"{slug(table.dataset)}_domains", table.dataset,
                 f"Bars of {table.metric} on each held-out domain of {table.dataset}, with "
                 f"standard errors. Averages: {_spoken(means) or 'none yet'}.", figure)


@rc_context(STYLE | {"axes.grid": False})
def critical_difference(ranking: significance.Ranking, looks: Looks) -> Plot:
    """Demsar's diagram: mean ranks on a line, the best at the left.

    Bars join ranks that do not differ significantly.
    """
    k, names = len(ranking.ranks), ranking.algorithms
    n_left = -(-k // 2)
    groups = ranking.groups()
    top = 0.4 + 0.16 * len(groups)  # inches from the axis to the first name
    figure, (axis,) = _panels(1, 0.22 * n_left + top + 0.75)
    axis.set_axis_off()
    margin = 0.42 * (k - 1)  # for the names
    axis.set_xlim(1 - margin, k + margin)
    axis.set_ylim(top + 0.22 * n_left, -0.75)
    line = {"color": "black", "linewidth": 1, "clip_on": False}
    axis.plot([1, k], [0, 0], **line)
    for rank in range(1, k + 1):
        axis.plot([rank, rank], [-0.09, 0], **line)
        axis.text(rank, -0.14, rank, ha="center", va="bottom")
    axis.plot([1, min(k, 1 + ranking.critical_difference)], [-0.52, -0.52], linewidth=2.5,
              color="black", solid_capstyle="butt")
    axis.text(1, -0.58, f"critical difference {ranking.critical_difference:.2f}", va="bottom")
    for y, (first, last) in enumerate(groups):
        axis.plot([ranking.ranks[first], ranking.ranks[last]], [0.2 + 0.16 * y] * 2,
                  color="black", linewidth=3.5, solid_capstyle="round")
    for i, (name, rank) in enumerate(zip(names, ranking.ranks)):
        left = i < n_left
        y = top + 0.22 * (i if left else k - 1 - i)
        end = 1 - 0.05 * (k - 1) if left else k + 0.05 * (k - 1)
        axis.plot([rank, rank, end], [0, y, y], **line)
        axis.plot(rank, 0, "o", color=looks.colour(name), markersize=5)
        label = f"{label_of(name)} {rank:.2f}"
        axis.text(end, y, f"{label} " if left else f" {label}", va="center",
                  ha="right" if left else "left")
    ranks = ", ".join(f"{label_of(n)} {r:.2f}" for n, r in zip(names, ranking.ranks))
    joined = "; ".join(" to ".join(label_of(names[i]) for i in group) for group in groups)
    return ready("ranks", "Critical-difference diagram",
                 f"Mean ranks over {ranking.n_blocks} domains, the best first: {ranks}. Critical "
                 f"difference {ranking.critical_difference:.2f}. Not significantly different: "
                 f"{joined or 'none'}.", figure)


@rc_context(STYLE)
def curves(dataset: str, points, metric: str, looks: Looks) -> Plot:
    """Validation and test metric over training; `points` are from `summaries.curves`."""
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots(2, 1, sharex=True)
    titles = ("on the training domains' validation images", "on the held-out domain")
    for axis, name, title in zip(axes, ("val_acc", "test_acc"), titles):
        for algorithm in looks.ordered(points["args.algorithm"]):
            of = points[points["args.algorithm"] == algorithm]
            axis.plot(of["step"], 100 * of[name], **looks.line(algorithm))
        axis.set_title(title, loc="left")
        axis.set_ylabel(f"{metric}, %")
    axes[1].set_xlabel("step")
    _legend(figure)
    last = points.sort_values("step").groupby("args.algorithm")["test_acc"].last()
    ends = {label_of(name): 100 * last[name] for name in looks.ordered(last.index)}
    return ready(f"{slug(dataset)}_curves", dataset,
                 f"Curves of {metric} over steps on {dataset}. At the end, on the held-out domain: "
                 f"{_spoken(ends)}.", figure)


@rc_context(STYLE)
def costs(dataset: str, seconds: dict[str, float], table: tables.Table, looks: Looks
          ) -> Plot | None:
    """A dot for each algorithm: seconds of training against average result; None without any."""
    known = [name for name in looks.ordered(seconds) if table.rows[name][-1].mean is not None]
    if not known:
        return None
    longest = max(seconds[name] for name in known)
    unit, per = next((u, p) for u, p in (("hours", 3600), ("minutes", 60), ("seconds", 1))
                     if longest >= 2 * p or p == 1)
    figure, (axis,) = _panels(1, 2.9)
    for name in known:
        axis.plot(seconds[name] / per, table.rows[name][-1].mean,
                  **looks.line(name) | {"linestyle": "none", "markersize": 7})
    axis.margins(y=0.1)
    shortest = min(seconds[name] for name in known)
    if longest > 10 * shortest > 0:
        _log_axis(axis, shortest / per, longest / per)
    else:
        axis.set_xlim(0, 1.08 * longest / per or 1)
    axis.set_xlabel(f"updates of one run, {unit}")
    axis.set_ylabel(f"average {table.metric}, %")
    _legend(figure)
    spoken = _spoken({label_of(name): seconds[name] / per for name in known}, f" {unit}")
    return ready(f"{slug(dataset)}_cost", dataset,
                 f"Average {table.metric} on {dataset} against the time that a run's updates take: "
                 f"{spoken}.", figure)


def _log_axis(axis: Axes, low: float, high: float) -> None:
    """Makes x logarithmic, with so few ticks that their labels do not touch."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    steps = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    every = -(-(last - first) // 6)
    ticks = [step * 10.0 ** power for power in range(first, last + 1, every) for step in steps]
    axis.set_xscale("log")
    axis.set_xlim(low / 1.3, high * 1.3)
    axis.xaxis.set_major_locator(FixedLocator([t for t in ticks if low / 1.3 < t < high * 1.3]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@rc_context(STYLE | {"axes.grid": False})
def hparams(dataset: str, effects, metric: str, looks: Looks) -> Plot:
    """Rank correlations, a row for each hparam; `effects` are from `summaries.hparam_effects`."""
    grid = effects.pivot(index="hparam", columns="algorithm", values="rho")
    grid = grid[looks.ordered(grid.columns)]
    grid = grid.loc[grid.abs().max(axis=1).sort_values(ascending=False).index]
    figure, (axis,) = _panels(1, 0.26 * len(grid) + 1.2)
    image = axis.imshow(grid, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    axis.set_xticks(range(grid.shape[1]), map(label_of, grid.columns),
                    rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(grid)), map(printable, grid.index))
    axis.tick_params(length=0)
    if grid.shape[1] > MOST_NUMBERS:
        figure.colorbar(image, label="Spearman's ρ", shrink=0.9)
    else:
        for (y, x), rho in np.ndenumerate(grid):
            text = "" if np.isnan(rho) else f"{rho:+.2f}".replace("0.", ".")
            axis.text(x, y, text, ha="center", va="center", fontsize=7.5,
                      color="white" if abs(rho) > 0.7 else "black")
    first = effects.loc[effects["rho"].abs().idxmax()]
    return ready(f"{slug(dataset)}_hparams", dataset,
                 f"Rank correlations of hparams with validation {metric} on {dataset}. The "
                 f"strongest: {first['hparam']} of {label_of(first['algorithm'])}, "
                 f"{first['rho']:+.2f}.", figure)


@rc_context(STYLE)
def teachers(dataset: str, pairs, table: tables.Table, looks: Looks) -> Plot:
    """A student's dot and its teacher's ring for each domain; `pairs`: `summaries.teachers`."""
    names = looks.ordered(pairs["algorithm"])
    figure, (axis,) = _panels(1, 0.19 * (len(pairs) + 1.3 * len(names)) + 0.9)
    y, ticks = 0.0, {}
    for name in names:
        axis.text(0.01, y, label_of(name), fontweight="bold", va="center",
                  transform=axis.get_yaxis_transform())
        for _, pair in pairs[pairs["algorithm"] == name].sort_values("test_env").iterrows():
            y += 1
            env = pair["test_env"]
            ticks[y] = printable(tables.environments(dataset, env + 1)[env])
            student, teacher = 100 * pair["student"], 100 * pair["teacher"]
            axis.plot([student, teacher], [y, y], color="#999999", linewidth=1.2)
            axis.plot(teacher, y, "o", markersize=7, markerfacecolor="white",
                      markeredgecolor="#333333")
            axis.plot(student, y, "o", markersize=6, color=looks.colour(name))
        y += 1.3
    axis.plot([], [], "o", markersize=7, markerfacecolor="white", markeredgecolor="#333333",
              label="teacher")
    axis.plot([], [], "o", markersize=6, color="#777777", label="student (coloured)")
    axis.set_yticks(list(ticks), ticks.values())
    axis.set_ylim(y - 0.6, -0.8)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"{table.metric} on the held-out domain, %")
    _legend(figure)
    gains = (pairs["student"] - pairs["teacher"]).groupby(pairs["algorithm"]).mean()
    spoken = _spoken({label_of(name): 100 * gains[name] for name in names}, " points")
    return ready(f"{slug(dataset)}_teachers", dataset,
                 f"Students and their teachers on each held-out domain of {dataset}. Mean gain of "
                 f"the student: {spoken}.", figure)


@rc_context(STYLE)
def diagnostics(dataset: str, points, looks: Looks) -> Plot | None:
    """A panel for each diagnostic over training; `points` are from `summaries.diagnostics`.

    None if no run on the dataset measured any.
    """
    shown = [label for label in summaries.DIAGNOSTICS.values() if label in points
             and points[label].notna().any()]
    if not shown:
        return None
    figure, axes = _panels(len(shown), 2.1)
    for axis, label in zip(axes, shown):
        for algorithm in looks.ordered(points["args.algorithm"]):
            of = points[(points["args.algorithm"] == algorithm) & points[label].notna()]
            if len(of):
                axis.plot(of["step"], of[label], **looks.line(algorithm))
        axis.set_title(textwrap.fill(label, 26), loc="left")
        axis.set_xlabel("step")
    _legend(figure)
    return ready(f"{slug(dataset)}_diagnostics", dataset,
                 f"Curves over steps on {dataset} of: {'; '.join(shown)}.", figure)


def slug(name: str) -> str:
    """A name in a form that fits into a file's name."""
    return re.sub(r"\W", "_", name)[:50]
