"""Figures of width against depth at equal parameters, and of over-smoothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equipot.train.scaling.pictures import COLOURS, MARKERS, log_axis, panels, seeds
from equipot.train.scaling.rows import Row
from equipot.train.scaling.slices import Family

_EQUAL = 1.25
"""Sizes whose ratio is less are equal: widths are whole numbers, and few of them divide well."""


@dataclass(frozen=True, slots=True, eq=False)
class DepthSeries:
    """Points of one family of equal size, data and steps, of several depths."""

    family: Family
    rows: tuple[Row, ...]

    @property
    def depths(self) -> list[int]:
        """Ascending."""
        return sorted({row.layers for row in self.rows})


def depth_series(rows: Sequence[Row], base: Family) -> list[DepthSeries]:
    """Of each family the series with most depths, the base's first; those of fewer than three are left out.

    All are of the size of the base's series (if it has one), so that they can be compared.
    """
    parts: dict[tuple[Family, float, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.usable:
            parts[(Family.of(row), row.data_fraction, row.structures_per_step, row.steps)].append(row)
    best: dict[Family, list[Row]] = {}
    for (family, *_), members in sorted(parts.items()):
        for row in members:
            equal = [each for each in members if 1 / _EQUAL < each.parameters / row.parameters < _EQUAL]
            if _depths(equal) > _depths(best.get(family, [])):
                best[family] = equal
    if base in best:  # the others at the same size and length, where they were trained at it
        sizes = np.log([row.parameters for row in best[base]])
        middle, steps = float(np.exp(np.mean(sizes))), {row.steps for row in best[base]}
        for (family, *_), members in parts.items():
            alike = [
                row for row in members if 1 / _EQUAL < row.parameters / middle < _EQUAL and row.steps in steps
            ]
            if family != base and _depths(alike) >= 3:
                best[family] = alike
    found = [DepthSeries(family, tuple(members)) for family, members in best.items() if _depths(members) >= 3]
    return sorted(found, key=lambda each: (each.family != base, each.family))


def of_depth(series: Sequence[DepthSeries], base: Family) -> Figure | None:
    """Test loss and the likeness of atoms' last features against depth, and the likeness layer by layer."""
    if not series:
        return None
    with_similarity = [each for each in series if any(len(row.similarity) > 1 for row in each.rows)]
    figure, axes = panels(3 if with_similarity else 1, width=4.4)
    for each, colour, marker in zip(series, COLOURS, MARKERS, strict=False):
        label = each.family.label(base)
        seeds(
            axes[0],
            each.rows,
            lambda row: row.layers,
            "loss",
            colour=colour,
            marker=marker,
            label=label,
            line=True,
        )
    sizes = [row.parameters for each in series for row in each.rows]
    axes[0].set(
        xlabel="layers",
        ylabel="test loss",
        title=f"equal size: {min(sizes):,} to {max(sizes):,} parameters",
        xticks=sorted({depth for each in series for depth in each.depths}),
    )
    log_axis(axes[0], "y")
    if with_similarity:
        _similarity(axes[1:], with_similarity, series)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure


def _similarity(axes: Sequence[Axes], found: Sequence[DepthSeries], series: Sequence[DepthSeries]) -> None:
    last, layers = axes
    for each in found:
        k = list(series).index(each)
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        there = [row for row in each.rows if len(row.similarity) > 1]
        means = [np.mean([r.similarity[-1] for r in there if r.layers == depth]) for depth in each.depths]
        last.plot(each.depths, means, marker + "-", color=colour, linewidth=1.1, markersize=5)
        deepest = [row for row in there if row.layers == max(r.layers for r in there)]
        profile = np.mean([row.similarity for row in deepest], axis=0)
        layers.plot(range(len(profile)), profile, marker + "-", color=colour, linewidth=1.1, markersize=4)
    last.set(xlabel="layers", ylabel="cosine similarity of atoms' features", title="after the last layer")
    layers.set(xlabel="after layer (0: embedding)", title="layer by layer in the deepest")


def _depths(rows: Sequence[Row]) -> int:
    return len({row.layers for row in rows})
