"""Figures of families beside the base: confounds and their laws, architectures, the better one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equipot.train.scaling.better import Contest
from equipot.train.scaling.compare import Comparison, Effect
from equipot.train.scaling.fit import Fits
from equipot.train.scaling.pictures import (
    COLOURS,
    MARKERS,
    METRIC_NAMES,
    grid,
    law,
    log_axis,
    panels,
    seeds,
    shown,
)
from equipot.train.scaling.rows import METRICS, SWITCHES, Row
from equipot.train.scaling.slices import VARIABLES, Family, by_setting

_SHORT = {"loss": "loss", "energy": "energy MAE", "forces": "force MAE"}


def is_confound(comparison: Comparison) -> bool:
    """Whether switches alone differ."""
    return set(comparison.changes) <= set(SWITCHES)


def is_architecture(comparison: Comparison) -> bool:
    """Whether another backbone is what differs (with what it needs)."""
    return "architecture" in comparison.changes


def of_effects(comparisons: Sequence[Comparison]) -> Figure | None:
    """Each family's errors as multiples of the base's, and what becomes of the exponents."""
    there = [each for each in comparisons if each.effects]
    if not there:
        return None
    shifted = any(each.shifts for each in there)
    figure, axes = panels(1 + shifted, width=5.6, height=1.4 + 0.5 * len(there), sharey=True)
    left, right = axes[0], axes[-1]
    for k, each in enumerate(there):
        for offset, effect in enumerate(each.effects.values()):
            _interval(left, effect, k + 0.22 * (offset - 1), COLOURS[offset], MARKERS[offset])
        for shift in each.shifts:
            value, low, high = shift.exponent
            size = shift.law.slice.variables == ("parameters",)
            colour, marker = (COLOURS[3], "o") if size else (COLOURS[4], "s")
            right.errorbar(
                value,
                k + (-0.1 if size else 0.1),
                xerr=[[value - low], [high - value]],
                fmt=marker,
                color=colour,
                capsize=2.5,
                markersize=5,
            )
    left.axvline(1, color="0.3", linewidth=0.8)
    left.set_yticks(range(len(there)), [each.label for each in there])
    left.set_ylim(len(there) - 0.5, -0.5)
    left.set(xlabel="error / that of the base (paired; interval over pairs)", title="errors")
    if shifted:
        right.axvline(0, color="0.3", linewidth=0.8)
        right.set(xlabel="exponent − that of the base", title="laws: ● in parameters, ■ in data")
    log_axis(left, "x")
    handles = [left.plot([], [], MARKERS[k], color=COLOURS[k], markersize=5)[0] for k in range(len(METRICS))]
    figure.legend(handles, list(_SHORT.values()), loc="outside lower center", ncols=3)
    return figure


def of_shifted_laws(comparisons: Sequence[Comparison]) -> Figure | None:
    """The laws of families over those of the base, a panel for each."""
    shifts = [(each, shift) for each in comparisons for shift in each.shifts]
    if not shifts:
        return None
    figure, axes = grid(len(shifts), min(3, len(shifts)))
    for axis, (each, shift) in zip(axes, shifts, strict=True):
        for found, colour, marker, label in (
            (shift.base, "0.35", "o", "base"),
            (shift.law, COLOURS[1], "s", each.label),
        ):
            seeds(
                axis,
                found.slice.rows,
                VARIABLES[found.slice.variables[0]],
                "loss",
                colour=colour,
                marker=marker,
                label=label,
            )
            law(axis, found, colour=colour, held=False, band=False)
        axis.set(xlabel=shift.law.slice.variables[0], ylabel="test loss")
        log_axis(axis, "x")
        log_axis(axis, "y")
        axis.legend()
    return figure


def of_architectures(groups: Mapping[str, Sequence[Row]], how: str) -> Figure | None:
    """Errors of architectures, each seed and the mean, at equal settings."""
    if len(groups) < 2:
        return None
    figure, axes = panels(len(METRICS), width=4.2, height=1.3 + 0.42 * len(groups), sharey=True)
    for axis, metric in zip(axes, METRICS, strict=True):
        for k, rows in enumerate(groups.values()):
            values = np.array([shown(row, metric) for row in rows])
            values = values[np.isfinite(values)]
            if not len(values):
                continue
            colour = COLOURS[k % len(COLOURS)]
            axis.plot(values, np.full(len(values), k), ".", color=colour, alpha=0.5)
            alone = len(values) > 1 and len(by_setting(rows)) == 1
            spread = values.std(ddof=1) if alone else 0.0
            axis.errorbar(
                np.exp(np.log(values).mean()),
                k,
                xerr=spread or None,
                fmt=MARKERS[k % len(MARKERS)],
                color=colour,
                capsize=3,
            )
        axis.set(xlabel=METRIC_NAMES[metric])
        axis.set_ylim(len(groups) - 0.5, -0.5)
        log_axis(axis, "x")
    axes[0].set_yticks(range(len(groups)), list(groups))
    figure.suptitle(how, fontsize=9)
    return figure


def of_contests(contests: Sequence[Contest], base: Family) -> Figure | None:
    """The loss of candidates over that of their rival, by source and share of the rival's compute."""
    if not contests:
        return None
    shown = [each for k, each in enumerate(contests) if k == 0 or each.reached] or contests
    height = 1.2 + 0.35 * max(len(each.by_source) for each in shown)
    figure, axes = grid(len(shown), min(3, len(shown)), width=4.6, height=height)
    for axis, contest in zip(axes, shown, strict=True):
        names = list(contest.by_source)
        for k, name in enumerate(names):
            _interval(axis, contest.by_source[name], k, COLOURS[0 if k else 6], "o" if k else "D")
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set(
            xlabel="test loss / that of the rival",
            title=f"{contest.family.label(base)} at {contest.share:.0%} of the compute",
        )
        log_axis(axis, "x")
    return figure


def pairs_by_label(comparisons: Sequence[Comparison], fits: Fits) -> tuple[dict[str, list[Row]], str]:
    """Rows of the base and of each architecture that are paired alike; and what the pairs share."""
    chosen = [each for each in comparisons if is_architecture(each) and each.pairs]
    if not chosen:
        return {}, ""
    how = max((each.how for each in chosen), key=lambda word: sum(each.how == word for each in chosen))
    base = {pair[0].name: pair[0] for each in chosen if each.how == how for pair in each.pairs}
    groups = {fits.base.label(fits.base): list(base.values())}
    for each in chosen:
        if each.how == how:
            groups[each.label] = [pair[1] for pair in each.pairs]
    return groups, how


def _interval(axis: Axes, effect: Effect, y: float, colour: str, marker: str) -> None:
    low = effect.low if effect.pairs > 1 else effect.ratio
    high = effect.high if effect.pairs > 1 else effect.ratio
    axis.plot(effect.ratios, [y] * len(effect.ratios), ".", color=colour, alpha=0.3, markersize=3)
    axis.errorbar(
        effect.ratio,
        y,
        xerr=[[max(effect.ratio - low, 0)], [max(high - effect.ratio, 0)]],
        fmt=marker,
        color=colour,
        markersize=5,
        capsize=2.5,
        markerfacecolor=colour if effect.significant else "white",
    )
