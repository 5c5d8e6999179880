"""Figures of losses against parameters, data and compute, with their laws."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from equipot.train.scaling.fit import COMPUTE, Fits
from equipot.train.scaling.pictures import (
    COLOURS,
    MARKERS,
    METRIC_NAMES,
    law,
    log_axis,
    panels,
    seeds,
    shown,
    unit,
)
from equipot.train.scaling.rows import METRICS, Row, StudyResults
from equipot.train.scaling.slices import VARIABLES, Family

_BASELINES = {"energy": ("references", "energy_mae_per_atom"), "forces": ("zero_forces", "force_mae")}


def of_variable(fits: Fits, kind: tuple[str, ...]) -> Figure | None:
    """Loss, energy and force errors of the base family along one variable; None where there is no curve."""
    if not any(law.slice.distinct > 1 for law in fits.of(kind)):
        return None
    figure, axes = panels(len(METRICS))
    variable = VARIABLES[kind[0]]
    for axis, metric in zip(axes, METRICS, strict=True):
        laws = [each for each in fits.of(kind, metric) if each.slice.distinct > 1]
        for each, colour, marker in zip(laws, COLOURS, MARKERS, strict=False):
            label = ", ".join(f"{name} {value}" for name, value in each.slice.fixed)
            seeds(axis, each.slice.rows, variable, metric, colour=colour, marker=marker, label=label)
            law(axis, each, colour=colour)
        _baseline(axis, laws[0].slice.rows if laws else (), metric)
        axis.set(xlabel=kind[0], ylabel=METRIC_NAMES[metric])
        log_axis(axis, "x")
        log_axis(axis, "y")
    handles, labels = axes[0].get_legend_handles_labels()
    if any(each.foretold for each in fits.of(kind)):
        handles.append(Line2D([], [], marker="*", color="grey", markeredgecolor="black", linestyle="none"))
        labels.append("held out, not fitted")
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), len(axes)))
    return figure


def of_compute(results: StudyResults, fits: Fits) -> Figure | None:
    """Learning curves, the frontier of end points with its law, and models of equal compute."""
    mine = [row for row in results.usable if Family.of(row) == fits.base]
    found = fits.of(COMPUTE)
    if len(mine) < 2:
        return None
    figure, axes = panels(2 if fits.valleys else 1, width=5.4, height=3.9)
    sizes = [row.parameters for row in mine]
    norm = LogNorm(min(sizes), max(sizes) * 1.01)
    colours = plt.get_cmap("viridis")
    for row in mine:
        curve = results.curves.get(row.name, ())
        axes[0].plot(
            [each.flops for each in curve],
            [each.validation_loss for each in curve],
            color=colours(norm(row.parameters)),
            linewidth=0.7,
            alpha=0.5,
        )
        axes[0].plot(row.flops, shown(row, "loss"), ".", color=colours(norm(row.parameters)), markersize=5)
    for each in found:
        law(axes[0], each, colour="black", band=True)
        axes[0].plot(
            [row.flops for row in each.slice.rows],
            [shown(row, "loss") for row in each.slice.rows],
            "o",
            markerfacecolor="none",
            markeredgecolor="black",
            markersize=6,
            markeredgewidth=0.8,
            label="frontier",
        )
    axes[0].set(xlabel="model FLOPs of training", ylabel="loss (lines: validation, points: test)")
    log_axis(axes[0], "x")
    log_axis(axes[0], "y")
    axes[0].legend()
    if fits.valleys:
        _valleys(axes[1], fits)
    figure.colorbar(ScalarMappable(norm, colours), ax=axes[0], label="parameters", pad=0.01)
    return figure


def _valleys(axis: Axes, fits: Fits) -> None:
    ordered = sorted(fits.valleys, key=lambda each: each.flops)
    for each, colour, marker in zip(ordered, COLOURS, MARKERS, strict=False):
        seeds(
            axis,
            each.rows,
            lambda row: row.parameters,
            "loss",
            colour=colour,
            marker=marker,
            label=f"{each.flops:.2g} FLOPs",
        )
        size = [row.parameters for row in each.rows]
        x = np.geomspace(min(size), max(size), 60)
        axis.plot(x, np.exp(np.polyval(each.coefficients, np.log(x))), color=colour, linewidth=1.1)
        if each.best is not None:
            bottom = np.exp(np.polyval(each.coefficients, np.log(each.best)))
            axis.plot(each.best, bottom, "*", color=colour, markersize=11, markeredgecolor="black")
    axis.set(xlabel="parameters", ylabel="test loss", title="equal compute (★ best size)")
    log_axis(axis, "x")
    log_axis(axis, "y")
    axis.legend()


def _baseline(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    """The trivial baseline as a line, where it does not squeeze everything else."""
    if metric not in _BASELINES or not rows:
        return
    kind, key = _BASELINES[metric]
    value = rows[0].baselines.get(kind, {}).get(key)
    values = [row.value(metric) for row in rows]
    if value and value < 8 * max(each for each in values if each):
        what = {"references": "reference energies alone", "zero_forces": "zero forces"}[kind]
        axis.axhline(value * unit(metric), color="0.4", linestyle=":", linewidth=1.2)
        axis.annotate(
            what, (0.02, value * unit(metric)), xycoords=("axes fraction", "data"), va="bottom", fontsize=7.5
        )
