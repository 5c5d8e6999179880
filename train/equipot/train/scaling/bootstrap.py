"""A law fitted to losses, with what is not known of it: bands of confidence and of prediction, intervals.

Losses differ from a law by the seed and by the setting: what the law does not describe moves all seeds of a
setting together. Bands therefore come from a bootstrap of two levels, in which settings and seeds deviate by
themselves; taking seeds of one setting for independent would make bands the narrower, the more seeds there
are. Both spreads are drawn anew for each replicate from what their degrees of freedom leave open, so that
bands of a dozen points are wide enough: to a linear law they would be those of Student's t. A pairs bootstrap
(settings drawn with replacement, then the seeds of each) stands beside it for the parameters' intervals: it
takes nothing for granted of the residuals.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from equipot.train.scaling.laws import (
    EXPONENTS,
    LEAST_OFFSET,
    Array,
    Parameters,
    Problem,
    fit_once,
    residuals,
)

REPLICATES = 400
LEVEL = 0.95
_AT_BOUND = 0.02  # in log α
_RUNS = 8
_FREE = 2  # degrees of freedom at least
_NO_MISFIT = 0.25  # a greater probability of settings that deviate so by their seeds alone: one level
_LARGE = 700.0  # in logarithms: few degrees of freedom leave spreads open that no number holds


class TooFewPointsError(Exception):
    """A law cannot be fitted; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A parameter, its intervals, and whether the data determine it."""

    value: float
    low: float
    high: float
    low_by_pairs: float
    high_by_pairs: float
    note: str
    """Empty if it is determined; else in what sense it is not."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Losses at some x: fitted, and within which the law, or another run, lies."""

    fitted: Array
    low: Array
    high: Array
    run_low: Array
    run_high: Array

    def to_json(self) -> dict[str, list[float]]:
        """As lists."""
        return {name: getattr(self, name).tolist() for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the residuals about a law, in log loss, at two levels."""

    seeds: float
    """Standard deviation of a run about its setting."""
    settings: float
    """Of a setting about the law; 0 where its seeds alone explain how it deviates, or it has none."""
    seeds_free: int
    """Degrees of freedom."""
    settings_free: int
    """Of the settings' means about the law; 0 if one level is told."""
    a_setting: float
    """Seeds of a setting, as they count for the spread of its mean."""
    mean_square: float
    """What the law's own mean square is to be measured by, with the degrees of freedom of the level."""

    @staticmethod
    def of(left: Array, setting_of: Array, p: int) -> Spread:
        """Of residuals (n,) about a law of p parameters."""
        n, size = len(left), np.bincount(setting_of)
        square, settings = float(np.square(left).sum()), len(size)
        pooled = square / (n - p)
        one = Spread(math.sqrt(pooled), 0.0, n - p, 0, 1.0, pooled)
        if n == settings:
            return one
        means = np.bincount(setting_of, left) / size
        between = float((size * np.square(means)).sum()) / (settings - p)
        within = max(float(np.square(left - means[setting_of]).sum()) / (n - settings), 1e-300)
        if stats.f.sf(between / within, settings - p, n - settings) > _NO_MISFIT:
            return one
        usual = (n - float(np.square(size).sum()) / n) / (settings - 1)
        misfit = math.sqrt(max(between - within, 0.0) / usual)
        return Spread(math.sqrt(within), misfit, n - settings, settings - p, usual, between)

    @property
    def total(self) -> float:
        """Standard deviation of a run about the law."""
        return math.hypot(self.seeds, self.settings)

    @property
    def free(self) -> int:
        """Degrees of freedom of `mean_square`."""
        return self.settings_free or self.seeds_free

    def drawn(self, replicates: int, random: np.random.Generator) -> tuple[Array, Array]:
        """(R,) spreads of seeds and of settings that these residuals leave open."""
        seeds = np.square(self.seeds) * self.seeds_free / random.chisquare(self.seeds_free, replicates)
        if not self.settings_free:
            return np.sqrt(seeds), np.zeros(replicates)
        means = self.mean_square * self.settings_free / random.chisquare(self.settings_free, replicates)
        return np.sqrt(seeds), np.sqrt(np.maximum(means - seeds, 0.0) / self.a_setting)


@dataclass(frozen=True, slots=True, eq=False)
class LawFit:
    """A fitted law and its replicates."""

    best: Parameters
    replicates: Parameters
    by_pairs: Parameters
    spread: Spread
    """Of the residuals."""
    seed_spread: float | None
    """Of the seeds about the mean of their setting, in log loss."""
    noise: Array
    """(R,) the spread of a run about the law in each replicate"""
    points: int
    settings: int
    trend: float
    """Probability that losses without any trend would follow a law this well (F-test)."""
    level: float

    def band(self, x: Array) -> Band:
        """At x (m, K)."""
        curves = self.replicates.curve(x)
        random = np.random.default_rng(1)
        # the same deviate at every x, several for each replicate: smooth bands
        deviates = random.standard_normal((_RUNS, len(curves), 1)) * self.noise[:, None]
        runs = np.exp(np.clip(np.log(curves) + deviates, -_LARGE, _LARGE)).reshape(-1, curves.shape[1])
        tail = (1 - self.level) / 2
        low, high = np.quantile(curves, (tail, 1 - tail), axis=0)
        run_low, run_high = np.quantile(runs, (tail, 1 - tail), axis=0)
        return Band(self.best.curve(x)[0], low, high, run_low, run_high)

    def intervals(self, names: Sequence[str]) -> dict[str, Interval]:
        """E, and A and the exponent of each variable; `names` are the variables' letters."""
        found = {"E": self._interval("offset", ...)}
        for k, name in enumerate(names):
            suffix = "" if len(names) == 1 else f"_{name}"
            found[f"A{suffix}"] = self._interval("log_scale", k)
            found[f"exponent{suffix}"] = self._interval("exponent", k)
        return found

    def _interval(self, kind: str, k: Any) -> Interval:  # noqa: ANN401 - an index of an array
        def values(of: Parameters) -> Array:
            column: Array = getattr(of, kind)[:, k] if kind != "offset" else of.offset
            return np.exp(np.clip(column, -_LARGE, _LARGE)) if kind == "log_scale" else column

        tail = (1 - self.level) / 2
        mine, pairs = values(self.replicates), values(self.by_pairs)
        low, high = np.quantile(mine, (tail, 1 - tail))
        low_pairs, high_pairs = np.quantile(pairs, (tail, 1 - tail))
        value = float(values(self.best)[0])
        return Interval(
            value, float(low), float(high), float(low_pairs), float(high_pairs), self._note(kind, mine)
        )

    def _note(self, kind: str, values: Array) -> str:
        tail = (1 - self.level) / 2
        if kind == "exponent":
            bounds = np.log(EXPONENTS)
            logs = np.log(values)
            if (logs < bounds[0] + _AT_BOUND).mean() > tail:
                return "not bounded from below: the points may as well follow a logarithm"
            if (logs > bounds[1] - _AT_BOUND).mean() > tail:
                return "not bounded from above: the loss may have reached its floor at once"
        if kind == "offset":
            least = float(np.quantile(self.best.offset, 0))
            if np.quantile(values, tail) < max(LEAST_OFFSET * 10, 0.01 * least):
                return "not told apart from 0: no floor is seen within these points"
        if kind == "log_scale" and np.quantile(values, 1 - tail) > 1e4 * max(
            np.quantile(values, tail), 1e-300
        ):
            return "not determined to four orders of magnitude; it moves together with the exponent"
        return ""


def fit_law(
    x: Array,
    losses: Array,
    *,
    settings: Sequence[Hashable] | None = None,
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = 0,
) -> LawFit:
    """Fit a saturating power law.

    Args:
        x: (n, K) positive variables.
        losses: (n,) positive.
        settings: (n,) which points are seeds of one setting; by default those of equal variables.
        replicates: of each bootstrap.
        level: of bands and intervals.
        seed: of the bootstrap.

    Raises:
        TooFewPointsError: fewer different settings than a law of so many parameters needs.
    """
    n, k = x.shape
    p = 1 + 2 * k
    numbers = {each: number for number, each in enumerate(dict.fromkeys(settings or map(tuple, x.tolist())))}
    setting_of = np.array([numbers[each] for each in settings or map(tuple, x.tolist())])
    _check(len(numbers), x)
    problem, log_y = Problem.of(x), np.log(losses)
    theta, delta = fit_once(problem, log_y)
    left = residuals(problem, theta, log_y)
    spread = Spread.of(left, setting_of, p)
    random = np.random.default_rng(seed)
    by_seed, by_setting = spread.drawn(replicates, random)
    drawn = by_seed[:, None] * random.standard_normal((replicates, n))
    drawn += by_setting[:, None] * random.standard_normal((replicates, len(numbers)))[:, setting_of]
    again = log_y - left + drawn
    begin = np.broadcast_to(theta, (replicates, p))
    found, _ = problem.solve(again, begin, delta)
    weight = _pairs(setting_of, replicates, random)
    by_pairs, _ = problem.solve(np.broadcast_to(log_y, weight.shape), begin, delta, weight)
    return LawFit(
        best=problem.parameters(theta[None]),
        replicates=problem.parameters(found),
        by_pairs=problem.parameters(by_pairs),
        spread=spread,
        seed_spread=pooled_spread(log_y, setting_of),
        noise=np.hypot(by_seed, by_setting),
        points=n,
        settings=len(numbers),
        trend=_trend(log_y, left, p, spread),
        level=level,
    )


def settings_needed(variables: int) -> int:
    """Different settings that a law of so many variables has to be fitted to, at least."""
    return 2 + 2 * variables


def pooled_spread(values: Array, group: Array | Any) -> float | None:  # noqa: ANN401 - labels of any type
    """Standard deviation within groups, pooled; None if no group has two values."""
    square, free = 0.0, 0
    for each in np.unique(group):
        mine = values[group == each]
        square += float(np.square(mine - mine.mean()).sum())
        free += len(mine) - 1
    return math.sqrt(square / free) if free else None


def _check(settings: int, x: Array) -> None:
    n, k = x.shape
    p, needed = 1 + 2 * k, settings_needed(k)
    if settings < needed:
        raise TooFewPointsError(
            f"{settings} different setting(s), and a law of {p} parameters needs at least {needed}"
        )
    if n < p + _FREE:
        raise TooFewPointsError(
            f"{n} points, and what a law of {p} parameters leaves of fewer than {p + _FREE} tells no noise; "
            "train other seeds, or more settings"
        )
    for column in range(k):
        distinct = len(np.unique(x[:, column]))
        if distinct < 3:
            raise TooFewPointsError(f"only {distinct} different value(s) of variable {column + 1} of {k}")


def _pairs(setting_of: Any, replicates: int, random: np.random.Generator) -> Array:  # noqa: ANN401
    members = [np.flatnonzero(setting_of == each) for each in np.unique(setting_of)]
    weight = np.zeros((replicates, len(setting_of)))
    for row in weight:
        for each in random.integers(len(members), size=len(members)):
            np.add.at(row, random.choice(members[each], len(members[each])), 1.0)
    return weight


def _trend(log_y: Array, left: Array, p: int, spread: Spread) -> float:
    without = float(np.square(log_y - log_y.mean()).sum())
    gained = max(without - float(np.square(left).sum()), 0.0) / (p - 1)
    return float(stats.f.sf(gained / max(spread.mean_square, 1e-300), p - 1, spread.free))
