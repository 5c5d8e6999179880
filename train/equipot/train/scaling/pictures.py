"""How the report's figures look: colours that everybody can tell apart, scales, error bars over seeds."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from equipot.train.scaling.fit import Law
from equipot.train.scaling.laws import Array
from equipot.train.scaling.rows import Row
from equipot.train.scaling.slices import VARIABLES

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Okabe and Ito's, which colour-blind readers tell apart, without the yellow that paper swallows."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
METRIC_NAMES = {"loss": "test loss", "energy": "energy MAE, meV/atom", "forces": "force MAE, meV/Å"}
_UNITS = {"loss": 1.0, "energy": 1000.0, "forces": 1000.0}
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
}


def shown(row: Row, metric: str) -> float:
    """A metric in the unit of its axis; NaN where there is none."""
    value = row.value(metric)
    return np.nan if value is None else value * _UNITS[metric]


def unit(metric: str) -> float:
    """Of the axis, in eV."""
    return _UNITS[metric]


@contextmanager
def style() -> Any:  # noqa: ANN401 - a context
    """Figures made within look alike."""
    with plt.rc_context(_STYLE):
        yield


def panels(
    count: int, *, width: float = 4.3, height: float = 3.5, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A row of panels."""
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False, sharey=sharey)
    return figure, list(axes[0])


def grid(count: int, columns: int, *, width: float = 3.6, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """Panels in rows; those too many are hidden."""
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_axis_off()
    return figure, flat[:count]


def log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis with numbers to read, also within a decade."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if low > 0 and high / low < 30:
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)) if high / low > 4 else MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def seeds(
    axes: Axes,
    rows: Sequence[Row],
    x: Callable[[Row], float],
    metric: str,
    *,
    colour: str,
    marker: str = "o",
    label: str | None = None,
    line: bool = False,
) -> None:
    """Each seed faintly, and their mean with an error bar of one standard deviation for each x."""
    groups: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        if np.isfinite(value := shown(row, metric)):
            groups[x(row)].append(value)
    if not groups:
        return
    at = sorted(groups)
    mean = np.array([np.mean(groups[k]) for k in at])
    error = np.array([np.std(groups[k], ddof=1) if len(groups[k]) > 1 else 0.0 for k in at])
    for k in at:
        if len(groups[k]) > 1:
            axes.plot([k] * len(groups[k]), groups[k], ".", color=colour, alpha=0.35, markersize=4, zorder=2)
    axes.errorbar(
        at,
        mean,
        yerr=np.where(error > 0, error, np.nan),
        fmt=marker + ("-" if line else ""),
        color=colour,
        markersize=5,
        linewidth=1.1,
        capsize=2.5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=label,
        zorder=3,
    )


def law(axes: Axes, found: Law, *, colour: str, held: bool = True, band: bool = True) -> None:
    """A fitted law with its bands, and the points it had to foretell; nothing where there is no trend."""
    if found.fit is None or not found.has_trend:
        return
    x = found.grid()
    values = found.fit.band(x)
    factor = unit(found.metric)
    at: Array = x[:, 0]
    if band:
        axes.fill_between(
            at, values.run_low * factor, values.run_high * factor, color=colour, alpha=0.10, linewidth=0
        )
    axes.fill_between(at, values.low * factor, values.high * factor, color=colour, alpha=0.22, linewidth=0)
    axes.plot(at, values.fitted * factor, color=colour, linewidth=1.4, zorder=2)
    for each in found.foretold if held else ():
        axes.plot(
            VARIABLES[found.slice.variables[0]](each.row),
            each.observed * factor,
            marker="*",
            color=colour,
            markersize=12,
            markeredgecolor="black",
            markeredgewidth=0.7,
            linestyle="none",
            zorder=4,
        )


def save(figure: Figure, path: Path) -> str:
    """Write a PNG, and give it as a data URI."""
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    path.write_bytes(memory.getvalue())
    return "data:image/png;base64," + base64.b64encode(memory.getvalue()).decode()
