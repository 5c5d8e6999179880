"""Figures of one model's errors: parity by source, forces by element; and of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from equipot.train.scaling.laws import Array
from equipot.train.scaling.pictures import COLOURS, MARKERS, grid, log_axis, panels
from equipot.train.scaling.rows import Row
from equipot.train.scaling.verdicts import PAPER

_OUTER = 0.005
"""Of the labels at either end: outliers would squeeze the rest into one spot."""


def of_parity(path: Path, row: Row) -> Figure | None:
    """Predictions against labels, energies above, force components below, a column for each source."""
    with np.load(path, allow_pickle=False) as arrays:
        sources = sorted({key.rsplit("/", 1)[0] for key in arrays.files})
        found = {key: np.asarray(arrays[key], dtype=np.float64) for key in arrays.files}
    if not sources:
        return None
    figure, axes = grid(2 * len(sources), len(sources), width=3.1, height=3.0)
    for k, source in enumerate(sources):
        for below, (label, key, unit) in enumerate(
            (("energy", "energy_mae_per_atom", "eV/atom"), ("forces", "force_mae", "eV/Å"))
        ):
            axis = axes[k + below * len(sources)]
            values: Array = found[f"{source}/{label}"]
            colour = COLOURS[below]
            axis.plot(
                values[:, 0], values[:, 1], ".", color=colour, alpha=0.35, markersize=3.5, rasterized=True
            )
            if len(values):
                low, high = np.quantile(values[:, 0], (_OUTER, 1 - _OUTER))
                margin = 0.08 * (high - low) or 1.0
                span = (low - margin, high + margin)
                axis.plot(span, span, color="black", linewidth=0.8)
                axis.set(xlim=span, ylim=span)
            axis.set_aspect("equal", adjustable="box")
            mae = row.of_source(source, key)
            error = "" if mae is None else f"MAE {1000 * mae:.3g} m{unit}"
            axis.annotate(error, (0.04, 0.96), xycoords="axes fraction", va="top", fontsize=8)
            what = "energy less references" if label == "energy" else "force component"
            axis.set(xlabel=f"{what}: label, {unit}", ylabel=f"prediction, {unit}")
            if not below:
                axis.set_title(source)
    return figure


def of_elements(row: Row) -> Figure | None:
    """Force errors by element beside those of zero forces, the commonest elements first."""
    found: Mapping[str, Mapping[str, Any]] = row.test.get("by_element", {})
    names = sorted(
        (name for name in found if found[name].get("force_mae")), key=lambda n: -found[n]["n_atoms"]
    )
    names = names[:40]
    if not names:
        return None
    figure, (axis,) = panels(1, width=max(5.0, 1.5 + 0.28 * len(names)), height=3.3)
    at = range(len(names))
    zero = [1000 * (found[name].get("zero_forces_mae") or np.nan) for name in names]
    axis.plot(at, zero, "_", color="0.35", markersize=11, markeredgewidth=1.8, label="zero forces")
    axis.bar(at, [1000 * found[name]["force_mae"] for name in names], color=COLOURS[0], label="model")
    axis.set_xticks(at, [f"{name}\n{_count(found[name]['n_atoms'])}" for name in names], fontsize=7.5)
    axis.set(ylabel="force MAE, meV/Å", xlabel="element, and atoms in the test split")
    axis.grid(axis="x", visible=False)
    axis.legend()
    return figure


def of_memory(memory: Mapping[str, Any], rows: Sequence[Row]) -> Figure | None:
    """Predicted memory against width, memory against time beside the paper's; and what points took."""
    runs = memory.get("runs", [])
    measured = [(row.parameters, row.peak_memory_bytes) for row in rows if row.peak_memory_bytes]
    if not runs and not measured:
        return None
    figure, axes = panels(3 if runs else 1, width=4.5, height=3.6)
    if runs:
        for k, name in enumerate(dict.fromkeys(each["setting"] for each in runs)):
            mine = [each for each in runs if each["setting"] == name]
            colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
            axes[0].plot(
                [each["width"] for each in mine],
                [each["bytes"] / 2**30 for each in mine],
                color=colour,
                marker=marker,
                label=name,
                markersize=4,
                linewidth=1.1,
            )
            axes[1].plot(
                [100 * each["relative_time"] for each in mine],
                [100 * each["relative_memory"] for each in mine],
                color=colour,
                marker=marker,
                linewidth=0.6,
                markersize=5,
            )
            axes[1].annotate(
                f"{mine[-1]['width']}",
                (100 * mine[-1]["relative_time"], 100 * mine[-1]["relative_memory"]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
                color=colour,
            )
        axes[0].set(xlabel="width", ylabel="predicted peak memory of all ranks, GiB")
        log_axis(axes[0], "x")
        log_axis(axes[0], "y")
        axes[1].plot(
            100 * PAPER["relative_time"],
            100 * PAPER["relative_memory"],
            "*",
            color="black",
            markersize=12,
        )
        axes[1].annotate(
            "the paper",
            (100 * PAPER["relative_time"], 100 * PAPER["relative_memory"]),
            xytext=(-6, 7),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        axes[1].set(xlabel="time, % of the plain form's", ylabel="memory, % of the plain form's")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    if measured:
        axis = axes[-1]
        axis.plot(*np.array(measured).T * np.array([[1], [2**-20]]), ".", color=COLOURS[0], alpha=0.6)
        axis.set(xlabel="parameters", ylabel="measured peak of a point's process, MiB")
        log_axis(axis, "x")
    elif runs:
        axes[2].set_axis_off()
    return figure


def _count(number: int) -> str:
    return f"{number / 1000:.3g}k" if number >= 1000 else str(number)
