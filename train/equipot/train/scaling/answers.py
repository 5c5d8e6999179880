"""The head of a report: what to train next, and what was found, in a line each; computed, as all verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from equipot.train.scaling.better import ALL, SHARES, Contest
from equipot.train.scaling.compare import Comparison
from equipot.train.scaling.figures_compare import is_architecture, is_confound
from equipot.train.scaling.figures_depth import DepthSeries
from equipot.train.scaling.fit import Fits
from equipot.train.scaling.optimal import Optimum
from equipot.train.scaling.rows import Row
from equipot.train.scaling.slices import Family
from equipot.train.scaling.standings import Standing, verdict
from equipot.train.scaling.verdicts import of_data_against_size, of_depth, of_held_out, of_quarter

Answer = tuple[str, str]
"""A question, and the answer."""


def answers(
    fits: Fits,
    compared: Sequence[Comparison],
    rivals: Sequence[Contest],
    paper: Sequence[Standing],
    series: Sequence[DepthSeries],
) -> Iterator[Answer]:
    """In the order in which a reader decides."""
    yield "What to train next", _next(fits, rivals)
    yield "Can the law be trusted?", next(of_held_out(fits))
    yield "Data or parameters?", next(of_data_against_size(fits))
    yield "Width or depth?", next(of_depth(series[:1], fits))
    yield "A better network with a quarter of the compute?", next(of_quarter(rivals, fits.base))
    if paper:
        yield (
            "Against the paper's network?",
            " ".join(line for each in paper[1:2] for line in verdict(each, "it")),
        )
    else:
        yield "Against the paper's network?", "It was not trained with the compute of ours: no verdict."
    yield "Which confounds matter?", _told_apart([each for each in compared if is_confound(each)])
    yield "Another backbone?", _told_apart([each for each in compared if is_architecture(each)])


def _next(fits: Fits, rivals: Sequence[Contest]) -> str:
    words = []
    for each in fits.optima:
        beyond = each.structures > 1.05 * fits.most_epochs * fits.epoch_structures
        text = f"With {each.budget:.2g} FLOPs: {_use(each, fits)}"
        if beyond:
            text += (
                f"; that repeats the data more than the {fits.most_epochs:.3g} epochs tried: get more data, "
                + (
                    f"or within them: {_use(each.within, fits)}"
                    if each.within is not None
                    else "or fewer FLOPs"
                )
            )
        words.append(text + ".")
    if fits.no_optimum:
        words.append(f"No budget can be divided by a law: {fits.no_optimum}.")
    best = next((each for each in rivals if each.share == max(SHARES)), None)
    if best is not None:
        whole, name = best.by_source[ALL], best.family.label(fits.base)
        words.append(
            f"Train {name} instead of the base; at equal compute: {whole.words('test loss')}."
            if whole.significant and whole.ratio < 1
            else f"Of other architectures {name} does best, at equal compute: {whole.words('test loss')}."
        )
    return " ".join(words)


def _use(each: Optimum, fits: Fits) -> str:
    low, high = each.width_interval
    span = f" ({low} to {high})" if low < high else ""  # the epochs bound it
    return (
        f"width {each.width}{span}, {fits.layers} layers, "
        f"{each.structures:,.0f} structures seen ({each.structures / fits.epoch_structures:.3g} epochs), "
        f"loss {each.band.fitted[0]:.3g} (a run {each.band.run_low[0]:.3g} to {each.band.run_high[0]:.3g})"
    )


def _told_apart(found: Sequence[Comparison]) -> str:
    losses = [(each, each.effects["loss"]) for each in found if "loss" in each.effects]
    if not losses:
        return "None has been trained beside the base."
    sure = sorted(((e.ratio, each.label) for each, e in losses if e.significant), reverse=True)
    doubt = [each.label for each, e in losses if not e.significant and e.pairs > 1]
    alone = [each.label for each, e in losses if e.pairs == 1]
    moved = [
        each.label
        for each, _ in losses
        if any(s.exponent_significant for s in each.shifts) or any(t.significant for t in each.tilts)
    ]
    parts = []
    if sure:
        parts.append("Test loss: " + "; ".join(f"{label} {ratio - 1:+.0%}" for ratio, label in sure))
    if doubt:
        parts.append(f"Not told apart: {'; '.join(doubt)}")
    if alone:
        parts.append(f"One pair only, no verdict: {'; '.join(alone)}")
    parts.append(f"Exponents are changed by: {'; '.join(moved) or 'none that can be told'}")
    return ". ".join(parts) + "."


def opponents(rows: Sequence[Row], base: Family) -> set[Family]:
    """What meets the paper's network: the base, and what differs from it in its architecture alone."""
    return {base} | {
        family for family in map(Family.of, rows) if {"architecture"} == set(family.changes(base))
    }
