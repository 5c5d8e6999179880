"""An audit's distributions as pictures, each a data URI of SVG; matplotlib escapes the names in them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from equipot.train.audit.pairs import Regression
from equipot.train.audit.run import StoreAudit
from equipot.train.audit.sketch import Sketch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

_STYLE: Any = {
    "svg.hashsalt": "equipot",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
    "text.parse_math": False,
}
_BINS = 60
_POINTS = 1000
Curve = tuple[str, Sketch]


def compare(audits: Sequence[StoreAudit]) -> dict[str, str]:
    """Title → picture, the stores' curves in each."""
    stores = list(audits)[:10]
    pictures = {
        "Energy per atom after references, eV": _linear(
            [(a.named.name, a.statistics.residual) for a in stores]
        ),
        "Size of forces, eV/Å": _logarithmic([(a.named.name, a.statistics.force_sizes) for a in stores]),
        "Atoms per structure": _logarithmic([(a.named.name, a.statistics.sizes) for a in stores]),
    }
    return {title: picture for title, picture in pictures.items() if picture}


def of_store(audit: StoreAudit) -> dict[str, str]:
    """Title → picture of one store."""
    s = audit.statistics
    pictures = {
        "Energy per atom after references, eV": _linear([("", s.residual)]),
        "Size of forces, eV/Å": _logarithmic([("", s.force_sizes)]),
        "Atoms per structure": _logarithmic([("", s.sizes)]),
        "Atoms per Å³": _linear([("", s.number_density)]),
        "Pressure, eV/Å³": _linear([("", s.pressure)]),
        "Nearest distance over sum of covalent radii": _linear([("", audit.geometry.closest)]),
        "Change of energy against work of the forces, eV": _scatter(
            audit.pairs.points, audit.pairs.energy_force
        ),
        "Change of energy against work of the stress, eV": _scatter(
            audit.pairs.strain_points, audit.pairs.energy_stress
        ),
    }
    return {title: picture for title, picture in pictures.items() if picture}


def _linear(curves: Sequence[Curve]) -> str:
    there = [(name, sketch) for name, sketch in curves if sketch.n]
    if not there:
        return ""
    # Outliers would squeeze the rest into one bin: the axis ends at the outer quantiles, widened.
    low = min(sketch.quantile(0.005) for _, sketch in there)
    high = max(sketch.quantile(0.995) for _, sketch in there)
    margin = 0.1 * (high - low) or 0.05 * abs(high) or 0.5
    edges = np.linspace(low - margin, high + margin, _BINS + 1)
    with _picture() as (axes, result):
        _draw(axes, there, edges)
    return result[0]


def _logarithmic(curves: Sequence[Curve]) -> str:
    there = [(name, sketch) for name, sketch in curves if sketch.n and sketch.high > 0]
    if not there:
        return ""
    low = min(max(sketch.quantile(0.005), sketch.high * 1e-6) for _, sketch in there)
    high = max(sketch.high for _, sketch in there)
    if high < 5 * low:  # a logarithmic axis would have hardly a number to read
        return _linear(curves)
    edges = np.geomspace(low / 1.1, high * 1.1, _BINS + 1)
    with _picture() as (axes, result):
        axes.set_xscale("log")
        _plain_ticks(axes)
        _draw(axes, there, edges)
    return result[0]


def _draw(axes: Axes, curves: Sequence[Curve], edges: NDArray[np.float64]) -> None:
    for name, sketch in curves:
        share = sketch.histogram(edges) / sketch.n
        axes.stairs(share, edges, fill=len(curves) == 1, label=name[:24] or None)
    axes.set_ylabel("share")
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=7)


def _scatter(points: NDArray[np.float64], found: Regression | None) -> str:
    if found is None or not len(points):
        return ""
    shown = points[np.unique(np.linspace(0, len(points) - 1, _POINTS).astype(int))]
    with _picture() as (axes, result):
        axes.plot(shown[:, 0], shown[:, 1], ".", markersize=3, alpha=0.5)
        ends = np.array([shown[:, 0].min(), shown[:, 0].max()])
        axes.plot(ends, ends, color="0.6", linewidth=1, label="slope 1")
        axes.plot(ends, found.slope * ends, color="tab:red", linewidth=1, label=f"slope {found.slope:.4g}")
        axes.set_xscale("symlog", linthresh=max(float(np.abs(shown[:, 0]).mean()), 1e-6))
        axes.set_yscale("symlog", linthresh=max(float(np.abs(shown[:, 1]).mean()), 1e-6))
        _plain_ticks(axes)
        axes.legend(frameon=False, fontsize=7)
    return result[0]


def _plain_ticks(axes: Axes) -> None:
    # matplotlib writes powers in its own markup, which is off: names of stores must not be read as markup
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


@contextmanager
def _picture() -> Iterator[tuple[Axes, list[str]]]:
    result: list[str] = []
    with matplotlib.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(3.6, 2.5), layout="constrained")
        try:
            yield axes, result
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        finally:
            plt.close(figure)
    result.append("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"))
