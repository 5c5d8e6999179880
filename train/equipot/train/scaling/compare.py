"""Families of points against the base family: paired by setting and seed, and law against law."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from equipot.train.scaling.fit import DATA, SIZE, Fits, Law
from equipot.train.scaling.rows import METRICS, Row
from equipot.train.scaling.slices import VARIABLES, Family, by_setting, least_validated

SIGNIFICANT = 0.05
"""A smaller probability tells an effect from none; intervals of effects leave out so much."""
_LEAST_PAIRS = 4
"""Of a line through them: two degrees of freedom."""
_CLOSE = 1.1
"""Compute whose ratio is less is equal, where widths are chosen for it."""


@dataclass(frozen=True, slots=True)
class Effect:
    """How many times a metric of the base a family's is, over pairs."""

    ratio: float
    low: float
    high: float
    """Of 95 % confidence, by Student's t over the pairs' log ratios; infinite for one pair."""
    probability: float
    """Of pairs so different without any effect; 1 for one pair."""
    pairs: int
    ratios: tuple[float, ...]

    @property
    def significant(self) -> bool:
        """Whether pairs (seeds) agree on it."""
        return self.pairs > 1 and self.probability < SIGNIFICANT

    def words(self, what: str) -> str:
        """A verdict."""
        change = f"{abs(self.ratio - 1):.1%} {'higher' if self.ratio > 1 else 'lower'}"
        if self.pairs == 1:
            return f"{what} {change} in the one pair there is: no verdict without more seeds"
        span = f"{self.low - 1:+.1%} to {self.high - 1:+.1%}, {self.pairs} pairs"
        if self.significant:
            return f"{what} {change} ({span}, p = {self.probability:.2g})"
        return f"{what} not told apart ({change}; {span}, p = {self.probability:.2g})"


@dataclass(frozen=True, slots=True, eq=False)
class LawShift:
    """A law's parameters beside the base's law over the same variable at the same everything else."""

    law: Law
    base: Law
    exponent: tuple[float, float, float]
    """Difference, and its interval."""
    offset_ratio: tuple[float, float, float]

    @property
    def exponent_significant(self) -> bool:
        """Whether the interval of the difference leaves out zero."""
        return not self.exponent[1] <= 0 <= self.exponent[2]


@dataclass(frozen=True, slots=True)
class Tilt:
    """How the base's lead over a family changes along a variable, whatever form their laws have.

    The difference of local exponents, d log L / d log x with its sign turned, of the family less the base, by
    least squares of the pairs' log ratios; the interval is Student's t over the pairs.
    """

    variable: str
    values: int
    """Different ones."""
    pairs: int
    exponent: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A family against the base."""

    family: Family
    label: str
    changes: Mapping[str, tuple[str, str]]
    how: str
    """What pairs have in common."""
    pairs: tuple[tuple[Row, Row], ...]
    """(base, family)"""
    effects: Mapping[str, Effect]
    shifts: tuple[LawShift, ...]
    tilts: tuple[Tilt, ...]


_Key = Callable[[Row], Hashable]
_PAIRINGS: Sequence[tuple[str, bool, _Key]] = (
    (
        "same width, depth, data, steps and seed",
        False,
        lambda row: (row.width, row.layers, row.data_fraction, row.steps, row.structures_per_step, row.seed),
    ),
    (
        "same width, depth, data and seed, equal compute",
        True,
        lambda row: (row.width, row.layers, row.data_fraction, row.structures_per_step, row.seed),
    ),
)
"""What pairs have in common, whether compute is, and all else that is."""
_OF_BUDGETS = "same data and seed, equal compute, the best width of each"


def compare_families(rows: Sequence[Row], fits: Fits) -> list[Comparison]:
    """Every family against the base, those that differ in one thing first."""
    usable = [row for row in rows if row.usable]
    families = {Family.of(row) for row in usable} - {fits.base}
    found = [compare(usable, fits, family) for family in families]
    return sorted(found, key=lambda each: (len(each.changes), sorted(each.changes.items()), each.label))


def compare(rows: Sequence[Row], fits: Fits, family: Family) -> Comparison:
    """One family against the base."""
    mine = [row for row in rows if Family.of(row) == family]
    theirs = [row for row in rows if Family.of(row) == fits.base]
    how = ""
    pairs: list[tuple[Row, Row]] = []
    backbone = family.architecture != fits.base.architecture
    # of other architectures it is the budget that has to be the same, not the width
    budgets = (_OF_BUDGETS, lambda: _best_of_budgets(theirs, mine))
    ways = [
        (words, lambda key=key, equal=equal: _paired(theirs, mine, key, equal_compute=equal))
        for words, equal, key in _PAIRINGS
    ]
    for how, pair in [budgets, *reversed(ways)] if backbone else [*ways, budgets]:  # noqa: B007 - it is told
        if pairs := pair():
            break
    usual = Counter(row.layers for row in theirs).most_common(1)[0][0]
    pairs = [pair for pair in pairs if pair[1].layers == usual] or pairs
    return Comparison(
        family=family,
        label=family.label(fits.base),
        changes=family.changes(fits.base),
        how=how if pairs else "",
        pairs=tuple(pairs),
        effects={metric: effect for metric in METRICS if (effect := effect_of(pairs, metric))},
        shifts=tuple(_shifts(fits, family)),
        tilts=tuple(_tilts(pairs)) if how == _PAIRINGS[0][0] else (),
    )


def effect_of(pairs: Sequence[tuple[Row, Row]], metric: str) -> Effect | None:
    """The ratio of a metric over pairs; None where no pair has it."""
    values = [(base.value(metric), other.value(metric)) for base, other in pairs]
    return effect([(a, b) for a, b in values if a and b])


def effect(values: Sequence[tuple[float, float]]) -> Effect | None:
    """The geometric mean of second over first; None of nothing."""
    if not values:
        return None
    logs = np.log([b / a for a, b in values])
    mean, n = float(logs.mean()), len(logs)
    low, high, probability = 0.0, np.inf, 1.0
    if n > 1:
        error = max(float(logs.std(ddof=1)), 1e-12) / np.sqrt(n)
        half = float(stats.t.ppf(1 - SIGNIFICANT / 2, n - 1)) * error
        low, high = float(np.exp(mean - half)), float(np.exp(mean + half))
        probability = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Effect(float(np.exp(mean)), low, high, probability, n, tuple(np.exp(logs).tolist()))


def _paired(
    theirs: Sequence[Row], mine: Sequence[Row], key: _Key, *, equal_compute: bool
) -> list[tuple[Row, Row]]:
    by_key: dict[Hashable, list[Row]] = defaultdict(list)
    for row in theirs:
        by_key[key(row)].append(row)
    pairs = []
    for row in mine:
        near = by_key[key(row)]
        if equal_compute:
            near = [other for other in near if 1 / _CLOSE < row.flops / other.flops < _CLOSE]
        near = [other for other in near if set(other.group) & set(row.group)] or near
        if near:
            best = min(near, key=lambda other: abs(np.log(other.flops / row.flops)))
            pairs.append((best, row))
    return pairs


def _best_of_budgets(theirs: Sequence[Row], mine: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Of each budget that both were given, the setting of least validation loss of both, seed by seed.

    So no point has a part in two pairs, which would pass for two seeds.
    """
    pairs: list[tuple[Row, Row]] = []
    left = sorted(by_setting(mine), key=lambda each: each[0].flops)
    while left:
        first = left[0][0]
        equal = [each for each in left if _same_budget(each[0], first)]
        left = [each for each in left if not _same_budget(each[0], first)]
        best = least_validated(equal)
        rivals = [each for each in by_setting(theirs) if _same_budget(each[0], best[0])]
        names = {name for row in best for name in row.group}
        rivals = [each for each in rivals if any(names & set(row.group) for row in each)] or rivals
        if rivals:
            by_seed = {row.seed: row for row in least_validated(rivals)}
            pairs += [(by_seed[row.seed], row) for row in best if row.seed in by_seed]
    return pairs


def _same_budget(one: Row, other: Row) -> bool:
    alike = (one.data_fraction, one.structures_per_step) == (other.data_fraction, other.structures_per_step)
    return alike and 1 / _CLOSE < one.flops / other.flops < _CLOSE


def _tilts(pairs: Sequence[tuple[Row, Row]]) -> Iterator[Tilt]:
    """In parameters at equal data, and in data at equal size, along the longest series of each."""
    held: Mapping[str, _Key] = {
        SIZE[0]: lambda row: (row.layers, row.steps, row.data_fraction),
        DATA[0]: lambda row: (row.layers, row.steps, row.width),
    }
    for variable, key in held.items():
        alike: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
        for base, other in pairs:
            one, two = base.value("loss"), other.value("loss")
            if one and two:
                alike[key(base)].append((float(np.log(VARIABLES[variable](base))), float(np.log(two / one))))
        longest = max(alike.values(), key=lambda each: (len(set(dict(each))), len(each)), default=[])
        values = len(set(dict(longest)))
        if values < 2 or len(longest) < _LEAST_PAIRS:
            continue
        x, y = np.array(longest).T
        found = stats.linregress(x, y)
        half = float(stats.t.ppf(1 - SIGNIFICANT / 2, len(x) - 2)) * float(found.stderr)
        slope = -float(found.slope)
        yield Tilt(variable, values, len(x), slope, slope - half, slope + half)


def _shifts(fits: Fits, family: Family) -> list[LawShift]:
    found = []
    for kind in (SIZE, DATA):
        for law in fits.of(kind, family=family):
            for base in fits.of(kind):
                if not (law.has_trend and base.has_trend) or law.slice.fixed != base.slice.fixed:
                    continue
                found.append(shift(base, law))
                break
    return found


def shift(base: Law, law: Law) -> LawShift:
    """How two fitted single-variable laws differ; their replicates are independent."""
    assert base.fit is not None
    assert law.fit is not None
    tails = ((1 - law.fit.level) / 2, (1 + law.fit.level) / 2)
    difference = law.fit.replicates.exponent[:, 0] - base.fit.replicates.exponent[:, 0]
    ratio = law.fit.replicates.offset / np.maximum(base.fit.replicates.offset, 1e-300)
    best = float(law.fit.best.exponent[0, 0] - base.fit.best.exponent[0, 0])
    offset = float(law.fit.best.offset[0] / max(base.fit.best.offset[0], 1e-300))
    low, high = np.quantile(difference, tails)
    ratio_low, ratio_high = np.quantile(ratio, tails)
    return LawShift(law, base, (best, float(low), float(high)), (offset, float(ratio_low), float(ratio_high)))
