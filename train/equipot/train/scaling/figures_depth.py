"""Figures of width against depth at equal parameters, and of over-smoothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equipot.train.scaling.pictures import COLOURS, MARKERS, log_axis, panels, seeds
from equipot.train.scaling.rows import Row
from equipot.train.scaling.slices import LENGTHS, Family, equally_long

_EQUAL = 1.25
"""Sizes whose ratio is less are equal: widths are whole numbers, and few of them divide well."""

_OF_BASE = 3


@dataclass(frozen=True, slots=True, eq=False)
class DepthSeries:
    """Points of one family of equal size and data and of one length, of several depths."""

    family: Family
    rows: tuple[Row, ...]
    unit: str
    """What the length is equal in: "steps", or "FLOPs"."""

    @property
    def depths(self) -> list[int]:
        """Ascending."""
        return sorted({row.layers for row in self.rows})

    @property
    def size(self) -> float:
        """Parameters, the geometric mean."""
        return float(np.exp(np.mean(np.log([row.parameters for row in self.rows]))))

    def label(self, base: Family) -> str:
        """Family, size and what else is equal."""
        return f"{self.family.label(base)}, {self.size / 1000:.2g}k parameters, equal {self.unit}"

    def alike(self, other: DepthSeries) -> bool:
        """Whether both are of one size and length."""
        lengths = [LENGTHS[self.unit](each.rows[0]) for each in (self, other)]
        same = 0.9 < lengths[0] / lengths[1] < 1.1
        return self.unit == other.unit and same and 1 / _EQUAL < self.size / other.size < _EQUAL


def depth_series(rows: Sequence[Row], base: Family) -> list[DepthSeries]:
    """Of at least three depths: the base's, and of each family those like one of these, or its best."""
    found: dict[Family, list[DepthSeries]] = defaultdict(list)
    parts: dict[tuple[Family, float, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.usable:
            parts[(Family.of(row), row.data_fraction, row.structures_per_step)].append(row)
    for (family, *_), members in parts.items():
        series = [
            DepthSeries(family, tuple(equal), unit)
            for unit in ("steps", "FLOPs")
            for _, long in equally_long(members, LENGTHS[unit])
            for equal in _equal_sizes(long)
            if len({row.layers for row in equal}) >= 3
        ]
        for each in sorted(series, key=lambda each: -len(each.depths)):
            if not any(
                {row.name for row in each.rows} <= {r.name for r in other.rows} for other in found[family]
            ):
                found[family].append(each)
    mine = sorted(found.pop(base, []), key=lambda each: (-len(each.depths), each.size))[:_OF_BASE]
    others = []
    for _, theirs in sorted(found.items()):
        others += [each for each in theirs if any(each.alike(other) for other in mine)] or theirs[:1]
    return [*mine, *others]


def _equal_sizes(rows: Sequence[Row]) -> Iterator[list[Row]]:
    ordered = sorted(rows, key=lambda row: row.parameters)
    while ordered:
        equal = [row for row in ordered if row.parameters < _EQUAL * ordered[0].parameters]
        yield equal
        ordered = ordered[len(equal) :]


def of_depth(series: Sequence[DepthSeries], base: Family) -> Figure | None:
    """Test loss and the likeness of atoms' last features against depth, and the likeness layer by layer."""
    if not series:
        return None
    with_similarity = [each for each in series if any(len(row.similarity) > 1 for row in each.rows)]
    figure, axes = panels(3 if with_similarity else 1, width=4.4)
    for each, colour, marker in zip(series, COLOURS, MARKERS, strict=False):
        label = each.label(base)
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
    axes[0].set(
        xlabel="layers",
        ylabel="test loss",
        xticks=sorted({depth for each in series for depth in each.depths}),
    )
    log_axis(axes[0], "y")
    if with_similarity:
        _similarity(axes[1:], with_similarity, series)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), len(axes)))
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
