"""What the numbers of a study say, in words. Nothing here is said that is not computed from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from equipot.train.scaling.better import ALL, SHARES, WANTED_SOURCES, Contest
from equipot.train.scaling.bootstrap import settings_needed
from equipot.train.scaling.compare import Comparison, Effect, LawShift, effect, shift
from equipot.train.scaling.figures_depth import DepthSeries
from equipot.train.scaling.fit import COMPUTE, DATA, SIZE_AND_DATA, Fits, Foretold, Law
from equipot.train.scaling.rows import Row, seeds_of
from equipot.train.scaling.slices import Family

_METRICS = {"loss": "test loss", "energy": "energy MAE", "forces": "force MAE"}
_DEEP = 10

PAPER = {"relative_memory": 0.27, "relative_time": 1.33}
"""Memory and time of activation checkpointing and ZeRO, relative to neither: arXiv 2504.08112."""


def of_law(law: Law) -> Iterator[str]:
    """One single-variable law of the loss: its exponent, its floor, how well it describes the points."""
    if law.fit is None:
        yield f"No law of {law.slice.title}: {law.refused}."
        return
    what, letter = law.slice.variables[0], law.letters[0]
    x, found = law.slice.x[:, 0], law.fit.intervals(law.letters)
    if not law.has_trend:
        yield (
            f"No trend of the loss with {what}: losses that do not depend on it would look like this with "
            f"probability {law.fit.trend:.2g} (at {_fixed(law)})."
        )
        return
    exponent, floor = found["exponent"], found["E"]
    ends = law.fit.best.curve(np.array([[x.min()], [x.max()]]))[0]
    yield (
        f"At {_fixed(law)}, the loss falls as E + A·{letter}^−α with α = "
        f"{_span(exponent.value, exponent.low, exponent.high)}{_note(exponent.note)} and floor "
        f"E = {_span(floor.value, floor.low, floor.high)}"
        f"{_note(floor.note)}: "
        f"{x.max() / x.min():,.3g} times the {what} bring it down to {ends[1] / ends[0]:.0%} "
        f"({len(law.slice.rows)} points, {law.fit.settings} settings, {seeds_of(law.slice.rows)} seed(s))."
    )
    yield _description(law)


def of_steps_and_epochs(fits: Fits) -> Iterator[str]:
    """Whether data scaling at equal steps and at equal epochs are the same law."""
    found = steps_against_epochs(fits)
    if found is None:
        yield "Equal steps against equal epochs: not both curves are there, or one shows no law."
        return
    value, low, high = found.exponent
    verdict = "differs from" if found.exponent_significant else "is not told apart from"
    yield (
        f"The exponent in data at equal epochs {verdict} that at equal steps (difference "
        f"{_span(value, low, high)}; floor {found.offset_ratio[0]:.2f} times, {found.offset_ratio[1]:.2f} to "
        f"{found.offset_ratio[2]:.2f}): at equal epochs less data also means fewer steps, so its law mixes "
        "both."
    )


def steps_against_epochs(fits: Fits) -> LawShift | None:
    """The base's law in data at equal epochs beside that at equal steps."""

    def apart(law: Law) -> tuple[str, tuple[tuple[str, str], ...]]:
        rest = tuple(each for each in law.slice.fixed if each[0] not in ("steps", "epochs"))
        return next((name for name in ("steps", "epochs") if name in dict(law.slice.fixed)), ""), rest

    fitted = [law for law in fits.of(DATA) if law.has_trend]
    for one in fitted:
        for other in fitted:
            (unit, rest), (other_unit, other_rest) = apart(one), apart(other)
            if (unit, other_unit) == ("steps", "epochs") and rest == other_rest:
                return shift(one, other)
    return None


def of_data_against_size(fits: Fits) -> Iterator[str]:
    """Which of twice the data and twice the parameters lowers the loss more, at the largest of both."""
    law = next((each for each in fits.of(SIZE_AND_DATA) if each.fit is not None), None)
    if law is None or law.fit is None:
        refused = next((each.refused for each in fits.of(SIZE_AND_DATA)), "no points differ in both")
        yield f"Data against parameters: no joint law ({refused})."
        return
    top = law.slice.x.max(axis=0)
    x = np.array([top, top * (2, 1), top * (1, 2)])
    gains = 1 - law.fit.replicates.curve(x)[:, 1:] / law.fit.replicates.curve(x)[:, :1]
    best = law.fit.best.curve(x)[0]
    tail = (1 - law.fit.level) / 2
    low, high = np.quantile(gains, (tail, 1 - tail), axis=0)
    apart = np.quantile(gains[:, 1] - gains[:, 0], (tail, 1 - tail))
    verdict = (
        "data beat parameters"
        if apart[0] > 0
        else "parameters beat data"
        if apart[1] < 0
        else "the two are not told apart"
    )
    yield (
        f"By the joint law (at {_fixed(law)}), from {top[0]:,.0f} parameters and {top[1]:,.0f} "
        f"structures on, twice the data lower the loss by {1 - best[2] / best[0]:.1%} ({low[1]:.1%} to "
        f"{high[1]:.1%}) and twice the parameters by {1 - best[1] / best[0]:.1%} ({low[0]:.1%} to "
        f"{high[0]:.1%}): {verdict} there."
    )


def of_compute(fits: Fits) -> Iterator[str]:
    """The law along the frontier, and what budgets are best spent on."""
    for law in fits.of(COMPUTE):
        yield from of_law(law)
    growth = fits.growth()
    if growth is not None:
        yield f"By models of equal compute, the best size grows as compute to the power {growth:.2f}."
    for each in fits.optima:
        epochs = each.structures / fits.epoch_structures
        yield (
            f"{each.budget:.3g} FLOPs are best spent on width {each.width} ({each.width_interval[0]} to "
            f"{each.width_interval[1]}) with {fits.layers} layers, {each.parameters:,.0f} parameters, for "
            f"{each.structures:,.0f} structures ({epochs:.3g} epochs of the {fits.epoch_structures:,} there "
            f"are): loss {each.band.fitted[0]:.4g}, a run {each.band.run_low[0]:.4g} to "
            f"{each.band.run_high[0]:.4g}."
            + (" The best width lies at the end of what was searched." if each.at_end else "")
            + (
                f" No point was trained for more than {fits.most_epochs:.3g} epochs: beyond it the law is "
                "not tested, and repeated data are worth less than new."
                if epochs > 1.05 * fits.most_epochs
                else ""
            )
        )
    if fits.no_optimum:
        yield f"No best use of a budget: {fits.no_optimum}."


def of_depth(series: Sequence[DepthSeries], fits: Fits) -> Iterator[str]:
    """Width against depth at equal size; whether deep models are as good as shallow ones, by family."""
    for each in series:
        label = each.label(fits.base)
        means = {
            depth: float(np.mean([row.value("loss") for row in each.rows if row.layers == depth]))
            for depth in each.depths
        }
        best = min(means, key=lambda depth: means[depth])
        shallow, deep = each.depths[0], each.depths[-1]
        yield (
            f"{label}: of equal size the best has {best} layers; {_depth_words(each, deep, best)}; "
            f"{_depth_words(each, shallow, best)}. {_width_or_depth(each)}"
        )
        if deep >= _DEEP:
            reference = min(each.depths, key=lambda depth: abs(depth - 3))
            found = _over_depth(each, reference, deep)
            if found is not None:
                verdict = (
                    f"worse than {reference}"
                    if found.significant and found.ratio > 1
                    else f"better than {reference}"
                    if found.significant
                    else f"not told apart from {reference}"
                )
                yield f"{label}: {deep} layers are {verdict} ({found.words('test loss')})."
    pairs = [
        (row.similarity[-1], row.value("loss")) for each in series for row in each.rows if row.similarity
    ]
    if len(pairs) > 4:
        rank = stats.spearmanr(*zip(*pairs, strict=True))
        yield (
            f"Likeness of the atoms' last features and test loss go together with rank correlation "
            f"{rank.statistic:+.2f} (p = {rank.pvalue:.2g}, {len(pairs)} points)."
        )
    if not series:
        yield "No series of at least three depths at equal size has been trained."


def of_comparisons(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """What each family does to errors and laws."""
    for each in comparisons:
        words = [found.words(_METRICS[metric]) for metric, found in each.effects.items() if metric == "loss"]
        words += [
            f"{_METRICS[metric]} {found.ratio - 1:+.0%}{'' if found.significant else ' (not told apart)'}"
            for metric, found in each.effects.items()
            if metric != "loss"
        ]
        errors = "; ".join(words) or "no pair with the base"
        yield f"{each.label} ({each.how or 'no pairs'}): {errors}. On the law: {_on_law(each)}."
    if not comparisons:
        yield "None has been trained."


def of_contests(found: Sequence[Contest], rival: str, base: Family) -> Iterator[str]:
    """Whether a candidate, named by what it differs in from the base, reaches a rival with less compute."""
    for each in found:
        if each is not found[0] and not each.reached:
            continue  # the table has them
        whole = each.by_source[ALL]
        sources = len(each.by_source) - 1
        yield (
            f"{each.family.label(base)} with {each.share:.0%} of the compute of {rival}: "
            f"{whole.words('test loss')}; reaches it on {len(each.reached)} of {sources} source(s)"
            f"{_listed(each.reached)}, beyond the seeds' doubt on {len(each.surely_reached)}"
            f"{_listed(each.surely_reached)}."
        )
    if not found:
        yield f"Nothing was trained on the same data with the compute of {rival}, or a quarter of it."


def of_quarter(found: Sequence[Contest], base: Family) -> Iterator[str]:
    """Whether a quarter of the base's compute reaches the base's loss on two sources, in numbers and words.

    A source counts where the mean over the pairs of seeds is not above the base's, and counts beyond doubt
    where their interval leaves out the base, too.
    """
    quarter = [contest for contest in found if contest.share == min(SHARES)]
    for k, each in enumerate(quarter):
        sure, reached = each.surely_reached, each.reached
        if k and len(reached) < WANTED_SOURCES:
            continue  # the table has them
        sources = {name: effect for name, effect in each.by_source.items() if name != ALL}
        verdict = (
            "holds beyond the seeds' doubt"
            if len(sure) >= WANTED_SOURCES
            else "does not hold"
            if len(reached) < WANTED_SOURCES
            else "holds in the one pair of seeds there is, which is no verdict yet"
            if len(each.pairs) == 1
            else "holds by the means of the seeds, not beyond their doubt"
        )
        spans = "; ".join(f"{name} {_ratio(effect)}" for name, effect in sources.items())
        yield (
            f"That {each.family.label(base)} reaches the loss of {base.label(base)} with a quarter of its "
            f"compute (at most {each.compute:.1%} of the model FLOPs in these pairs) on at least "
            f"{WANTED_SOURCES} sources {verdict}: {len(reached)} of {len(sources)}{_listed(reached)}, beyond "
            f"doubt {len(sure)}{_listed(sure)}. Loss over the base's by source, with the interval over "
            f"{len(each.pairs)} pair(s) of seeds: {spans}."
        )
        if each.clock is not None:
            yield (
                f"By the clock {each.family.label(base)} took {_ratio(each.clock)} times the base's seconds "
                "for it, on machines that points share with each other and with whatever else ran: a hint, "
                "not a measurement."
            )
    if not quarter:
        yield "Nothing was trained on the same data with a quarter of the base's compute: no verdict."


def of_held_out(fits: Fits) -> Iterator[str]:
    """Whether points left out of the fits lie where the laws said."""
    found = [(law, each) for law, each in fits.foretold if law.metric == "loss"]
    if not found:
        yield "No point was held out, or none of those has a law that could foretell it."
        return
    inside = sum(each.inside for _, each in found)
    level = next(law.fit.level for law, _ in found if law.fit)
    runs = len({each.row.name for _, each in found})
    yield (
        f"{inside} of {len(found)} predictions of the loss of {runs} run(s) that were not fitted lie inside "
        f"the {level:.0%} band of a run; the errors of the predictions are {_mean_size(found)} on the mean, "
        f"{max((each.error for _, each in found), key=abs):+.1%} at worst."
    )
    by_law: dict[str, list[tuple[Law, Foretold]]] = {}
    for law, each in found:
        by_law.setdefault(f"{law.slice.family.label(fits.base)}, {law.slice.title}", []).append((law, each))
    for title, mine in by_law.items():
        words = "; ".join(
            f"{_briefly(each.row)}: {'inside' if each.inside else 'outside'}, error {each.error:+.1%} (band "
            f"{each.low / each.fitted - 1:+.1%} to {each.high / each.fitted - 1:+.1%})"
            for _, each in mine
        )
        yield f"{title}: {sum(each.inside for _, each in mine)} of {len(mine)} inside. {words}."


def of_memory(memory: Mapping[str, Any]) -> Iterator[str]:
    """Memory and time of the paper's settings, and of ours, at the largest width."""
    runs = memory.get("runs", [])
    if not runs:
        yield "No prediction: make it with `equipot scaling memory`."
        return
    width, paper = max(each["width"] for each in runs), PAPER
    yield (
        f"The paper's checkpointing and ZeRO take {paper['relative_memory']:.0%} of the memory for "
        f"{paper['relative_time']:.0%} of the time. Predicted here at width {width} on {runs[0]['ranks']} "
        "rank(s), relative to the plain form as it is: "
        + "; ".join(
            f"{each['setting']} {each['relative_memory']:.0%} of the memory, {each['relative_time']:.0%} of "
            "the time"
            for each in runs
            if each["width"] == width and each["relative_memory"] != 1
        )
        + "."
    )
    faster = [each for each in runs if each["width"] == width and each["relative_time"] <= 1]
    both = [each for each in faster if each["relative_memory"] <= paper["relative_memory"]]
    verdict = f"won back by {', '.join(each['setting'] for each in both)}" if both else "not won back by any"
    yield f"The latency that less memory costs, at no more than the paper's: {verdict} (by prediction)."


def of_latency(measured: Mapping[str, Any]) -> Iterator[str]:
    """Which measured settings take no more time than the plain form, with no more memory than the paper's."""
    settings: Mapping[str, Mapping[str, float]] = measured.get("relative to plain", {})
    if not settings:
        yield "Not measured: give `python benchmarks/latency.py` --out latency.json in the study's folder."
        return
    won = {
        name: each
        for name, each in settings.items()
        if each["time"] <= 1 and each["memory"] <= PAPER["relative_memory"]
    }
    words = ", ".join(
        f"{name} ({each['memory']:.0%} of the memory, {each['time']:.0%} of the time)"
        for name, each in won.items()
    )
    yield (
        f"Measured at width {measured['width']} on {measured['ranks']} ranks, the latency is "
        f"{f'won back by {words}' if won else 'won back by no setting'} ({measured['machine']})."
    )


def _over_depth(series: DepthSeries, one: int, other: int) -> Any:  # noqa: ANN401
    def by_seed(depth: int) -> dict[int, Row]:
        return {row.seed: row for row in series.rows if row.layers == depth}

    first, second = by_seed(one), by_seed(other)
    pairs = [(first[s].value("loss"), second[s].value("loss")) for s in sorted(set(first) & set(second))]
    return effect([(a, b) for a, b in pairs if a and b])


def _width_or_depth(series: DepthSeries) -> str:
    shallow, deep = series.depths[0], series.depths[-1]
    found = _over_depth(series, shallow, deep)
    if found is None or not found.significant:
        return f"Width and depth are not told apart between {shallow} and {deep} layers."
    return f"{'Width' if found.ratio > 1 else 'Depth'} wins between {shallow} and {deep} layers."


def _depth_words(series: DepthSeries, depth: int, best: int) -> str:
    if depth == best:
        return f"{depth} are best"
    found = _over_depth(series, best, depth)
    return (
        f"with {depth} layers {found.words('test loss')}"
        if found
        else f"{depth} layers share no seed with it"
    )


def _description(law: Law) -> str:
    assert law.fit is not None
    total = law.fit.spread.total
    if law.fit.seed_spread is None:
        return f"Points scatter by {total:.1%} about the law; there are no seeds to tell noise from it."
    words = (
        f"settings deviate from it by {law.fit.spread.settings:.1%} beyond their seeds: it is not exact, and "
        "the bands count that"
        if law.fit.spread.settings
        else "settings no more than their seeds do"
    )
    return f"Points scatter by {total:.1%} about the law, {words} (seeds: {law.fit.seed_spread:.1%})."


def _on_law(found: Comparison) -> str:
    """What a family does to the laws, or how far the points are from telling."""
    words = [_shift_words(each) for each in found.shifts]
    shifted = {each.law.slice.variables[0] for each in found.shifts}
    for tilt in found.tilts:
        if tilt.variable in shifted:
            continue
        needed = settings_needed(1)
        few = (
            f"{tilt.values} different {tilt.variable}, and a law needs {needed}: no exponent of its own"
            if tilt.values < needed
            else f"no law in {tilt.variable} with a trend to compare"
        )
        size = abs(tilt.exponent)
        verdict = (
            f"its local exponent is {'greater' if tilt.exponent > 0 else 'smaller'} by {size:.2g}"
            if tilt.significant
            else "its local exponent is not told apart from the base's"
        )
        words.append(f"{few}; {verdict} ({_span(tilt.exponent, tilt.low, tilt.high, sign=True)})")
    return "; ".join(words) or "no law to compare, and too few sizes or amounts of data in pairs for a slope"


def _briefly(row: Row) -> str:
    data = "" if row.data_fraction == 1 else f", {row.data_fraction:g} of the data"
    return f"width {row.width}{data}, {row.steps} steps, seed {row.seed}"


def _mean_size(found: Sequence[tuple[Law, Foretold]]) -> str:
    return f"{np.mean([abs(each.error) for _, each in found]):.1%}"


def _shift_words(found: LawShift) -> str:
    value, low, high = found.exponent
    verdict = "changes" if found.exponent_significant else "is not told apart"
    return (
        f"the exponent in {found.law.slice.variables[0]} {verdict} ({_span(value, low, high, sign=True)}), "
        f"the floor is {found.offset_ratio[0]:.2f} times the base's ({found.offset_ratio[1]:.2f} to "
        f"{found.offset_ratio[2]:.2f})"
    )


def _ratio(found: Effect) -> str:
    return _span(found.ratio, found.low, found.high) if found.pairs > 1 else f"{found.ratio:.3g}"


def _span(value: float, low: float, high: float, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{value:{plus}.3g} ({low:{plus}.3g} to {high:{plus}.3g})"


def _note(note: str) -> str:
    return f" [{note}]" if note else ""


def _fixed(law: Law) -> str:
    return ", ".join(f"{name} {value}" for name, value in law.slice.fixed)


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""
