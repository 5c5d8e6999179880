"""A law fitted to losses, with what is not known of it: bands of confidence and of prediction, intervals.

Bands come from a residual bootstrap: new losses are the fitted ones times resampled residuals, whose spread
is drawn anew for each replicate from what its n − p degrees of freedom leave open, so that bands of a dozen
points are wide enough. A pairs bootstrap (settings drawn with replacement, then the seeds of each) stands
beside it for the parameters' intervals: it takes nothing for granted of the residuals.
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


@dataclass(frozen=True, slots=True, eq=False)
class LawFit:
    """A fitted law and its replicates."""

    best: Parameters
    replicates: Parameters
    by_pairs: Parameters
    spread: float
    """Of the residuals, in log loss: seeds, and what the law does not describe."""
    seed_spread: float | None
    """Of the seeds about the mean of their setting, in log loss."""
    noise: Array
    """(R,) the residuals' spread in each replicate"""
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
        runs = (curves * np.exp(deviates)).reshape(-1, curves.shape[1])
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
            return np.exp(np.clip(column, -700, 700)) if kind == "log_scale" else column

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
    _check(len(numbers), x, p)
    problem, log_y = Problem.of(x), np.log(losses)
    theta, delta = fit_once(problem, log_y)
    left, leverage = residuals(problem, theta, log_y)
    free = n - p
    spread = math.sqrt(float(np.square(left).sum()) / free)
    random = np.random.default_rng(seed)
    noise = spread * np.sqrt(free / random.chisquare(free, replicates))
    freed = left / np.sqrt(np.maximum(1 - leverage, 0.05))  # as large as if they had no part in the fit
    drawn = random.choice(freed - freed.mean(), (replicates, n))
    fitted = log_y - left
    again = fitted + drawn * (noise / max(spread, 1e-300))[:, None]
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
        noise=noise,
        points=n,
        settings=len(numbers),
        trend=_trend(log_y, left, p),
        level=level,
    )


def pooled_spread(values: Array, group: Array | Any) -> float | None:  # noqa: ANN401 - labels of any type
    """Standard deviation within groups, pooled; None if no group has two values."""
    square, free = 0.0, 0
    for each in np.unique(group):
        mine = values[group == each]
        square += float(np.square(mine - mine.mean()).sum())
        free += len(mine) - 1
    return math.sqrt(square / free) if free else None


def _check(settings: int, x: Array, p: int) -> None:
    n, k = x.shape
    if settings < p + 1:
        raise TooFewPointsError(
            f"{settings} different setting(s), and a law of {p} parameters needs at least {p + 1}"
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


def _trend(log_y: Array, left: Array, p: int) -> float:
    free = len(log_y) - p
    without = float(np.square(log_y - log_y.mean()).sum())
    within = max(float(np.square(left).sum()), 1e-300)
    ratio = max(without - within, 0.0) / (p - 1) / (within / free)
    return float(stats.f.sf(ratio, p - 1, free))
