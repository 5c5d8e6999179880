"""Whether the promised coverage is kept on the test split: a table, a picture, numbers for the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from equipot.model.conformal import PERCENTS, Calibration
from equipot.train.uncertainty.cases import Cases
from equipot.train.uncertainty.measure import Coverage, Measured, coverage_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

SHOWN = (50, 80, 90, 95)
"""Percents of coverage that tables and cards name."""

_BINS = 12


def report(measured: Measured, levels: tuple[str, ...], picture: Path, console: Console) -> dict[str, Any]:
    """Prints how the test split fares, draws it, and gives the numbers for the bundle's card."""
    calibration, cases = measured.uncertainty.calibration, measured.test
    assert calibration is not None
    if cases is None:
        console.print("the test split is empty: calibrated, but not tested")
        return {}
    found = coverage_of(cases, calibration, levels, PERCENTS)
    outside = float(cases.outside.mean())
    table = Table(
        title=f"{len(cases)} structures of the test split, truth within the interval", title_justify="left"
    )
    table.add_column("promised", justify="right")
    shown = [name for name in ("energy", "forces") if getattr(found, name)]
    for name in shown:
        table.add_column(name, justify="right")
    for percent in SHOWN:
        shares = [getattr(found, name).get(percent) for name in shown]
        table.add_row(f"{percent} %", *("too few" if share is None else f"{share:.1%}" for share in shares))
    console.print(table)
    console.print(f"outside the training domain: {outside:.1%} of them")
    draw(found, cases, calibration, levels, picture)
    console.print(escape(f"coverage, and errors beside spreads: {picture}"), soft_wrap=True)
    some = Coverage(*({p: of[p] for p in SHOWN if p in of} for of in (found.energy, found.forces)))
    return {"uncertainty": {"structures": len(cases), "outside": round(outside, 4), **some.to_json()}}


def draw(
    found: Coverage, cases: Cases, calibration: Calibration, levels: tuple[str, ...], picture: Path
) -> None:
    """Draws promised against observed coverage, and errors against spreads where there are any."""
    has_spread = bool(cases.energy_spread.any() or cases.forces_spread.any())
    figure, axes = plt.subplots(1, 3 if has_spread else 1, figsize=(13 if has_spread else 4.6, 4.2))
    figure.subplots_adjust(left=0.06 if has_spread else 0.16, right=0.98, bottom=0.14, top=0.9, wspace=0.28)
    first: Axes = axes[0] if has_spread else axes
    first.plot([0, 100], [0, 100], color="0.6", linewidth=0.8)
    for name in ("energy", "forces"):
        of = getattr(found, name)
        first.plot(list(of), [100 * share for share in of.values()], label=name)
    first.set(title=f"coverage of {len(cases)} test structures", xlabel="promised, %", ylabel="observed, %")
    first.legend(frameon=False)
    first.grid(alpha=0.3)
    if has_spread:
        _compare(axes[1], "energy, eV/atom", cases.energy_spread, cases.energy_error)
        _compare(axes[2], "forces, eV/Å", cases.forces_spread, cases.forces_error)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _compare(axes: Axes, title: str, spread: NDArray[np.float64], error: NDArray[np.float64]) -> None:
    """Errors of cases and their root mean square in bins of equally many, by spread."""
    known = np.isfinite(error) & (spread > 0) & (error > 0)
    spread, error = spread[known], error[known]
    if not len(error):
        return
    few = np.linspace(0, len(error) - 1, min(len(error), 5_000)).astype(int)
    axes.plot(spread[few], error[few], ".", color="0.75", markersize=2, label="each")
    order = np.argsort(spread)
    bins = [part for part in np.array_split(order, min(_BINS, len(order))) if len(part)]
    rms = [float(np.sqrt((error[part] ** 2).mean())) for part in bins]
    axes.plot([float(np.median(spread[part])) for part in bins], rms, "o-", label="RMS of a bin")
    axes.set(title=title, xlabel="spread", ylabel="|error|", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())  # between powers of ten they lie over each other
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
