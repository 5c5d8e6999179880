"""The laws of a study: which can be fitted, what they say, and whether they foretell points left out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from equipot.train.scaling.bootstrap import LEVEL, REPLICATES, LawFit, TooFewPointsError, fit_law
from equipot.train.scaling.laws import Array
from equipot.train.scaling.optimal import Costs, Optimum, Valley, best_use, valley
from equipot.train.scaling.rows import METRICS, Row, StudyResults
from equipot.train.scaling.slices import (
    Family,
    Slice,
    base_family,
    frontier,
    setting_of,
    slices,
    trend_of_frontier,
    variables_of,
)

FORMAT, VERSION = "equipot-scaling-fits", 1
LETTERS = {
    "parameters": "N",
    "training structures": "D",
    "structures seen": "S",
    "model FLOPs": "C",
}
SIZE, DATA, COMPUTE = ("parameters",), ("training structures",), ("model FLOPs",)
SIZE_AND_DATA, SIZE_AND_SEEN = ("parameters", "training structures"), ("parameters", "structures seen")
_KINDS = (SIZE, DATA, SIZE_AND_DATA, SIZE_AND_SEEN)
NO_TREND = 0.05
"""Losses that would look as they do with a greater probability without any trend follow no law."""
_OF_BASE = 4
"""Curves of one kind that are fitted of the base family, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Foretold:
    """A point that was left out of a law, and what the law said of it."""

    row: Row
    observed: float
    fitted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was observed."""
        return self.fitted / self.observed - 1

    @property
    def inside(self) -> bool:
        """Whether it lies within the band of another run."""
        return self.low <= self.observed <= self.high

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "point": self.row.name,
            "observed": self.observed,
            "predicted": self.fitted,
            "run_interval": [self.low, self.high],
            "relative_error": self.error,
            "inside": self.inside,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """One metric along one slice: fitted, or refused."""

    metric: str
    slice: Slice
    fit: LawFit | None
    refused: str
    """What is missing, if it is not fitted."""
    foretold: tuple[Foretold, ...]

    @property
    def has_trend(self) -> bool:
        """Whether it was fitted, and the losses depend on its variables at all."""
        return self.fit is not None and self.fit.trend <= NO_TREND

    @property
    def letters(self) -> tuple[str, ...]:
        """Of its variables."""
        return tuple(LETTERS[name] for name in self.slice.variables)

    def to_json(self, base: Family) -> dict[str, Any]:
        """As plain values; single-variable laws with a grid of the curve."""
        body: dict[str, Any] = {
            "metric": self.metric,
            "family": self.slice.family.label(base),
            "variables": list(self.slice.variables),
            "fixed": dict(self.slice.fixed),
            "points": [row.name for row in self.slice.rows],
            "refused": self.refused or None,
            "held_out": [each.to_json() for each in self.foretold],
        }
        if self.fit is not None:
            body |= {
                "parameters": {
                    name: each.to_json() for name, each in self.fit.intervals(self.letters).items()
                },
                "settings": self.fit.settings,
                "level": self.fit.level,
                "residual_spread": self.fit.spread.total,
                "setting_spread": self.fit.spread.settings,
                "seed_spread": self.fit.seed_spread,
                "probability_without_trend": self.fit.trend,
            }
            if len(self.letters) == 1:
                grid = self.grid()
                body["curve"] = {"x": grid[:, 0].tolist(), **self.fit.band(grid).to_json()}
        return body

    def grid(self, beyond: float = 3.0) -> Array:
        """(60, 1) values of the one variable, over the points and some way beyond them."""
        x = self.slice.x[:, 0]
        held = variables_of(self.slice.held_out, self.slice.variables)[:, 0]
        low, high = x.min(), x.max()
        most = max(high * beyond, *held * 1.2) if len(held) else high * beyond
        return np.geomspace(low / 1.3, most, 60)[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Fits:
    """All laws of a study."""

    base: Family
    laws: tuple[Law, ...]
    valleys: tuple[Valley, ...]
    optima: tuple[Optimum, ...]
    no_optimum: str
    """Why there is none, if so."""
    epoch_structures: int
    """Training structures of the full data."""
    most_epochs: float
    """That a point of the base family was trained for."""
    layers: int
    """Of the optima."""
    left_out: Mapping[str, int]
    """How many points have no part in any fit, by how they ended, or "unfinished"."""

    def of(self, kind: tuple[str, ...], metric: str = "loss", family: Family | None = None) -> list[Law]:
        """Laws of a kind, of a family or of the base, that with the most settings first."""
        wanted = family or self.base
        return [
            law
            for law in self.laws
            if law.slice.variables == kind and law.metric == metric and law.slice.family == wanted
        ]

    @property
    def foretold(self) -> list[tuple[Law, Foretold]]:
        """Every held-out prediction."""
        return [(law, each) for law in self.laws for each in law.foretold]

    def growth(self) -> float | None:
        """Exponent of the best size in compute, from the valleys; None from fewer than two."""
        there = [(each.flops, each.best) for each in self.valleys if each.best is not None]
        if len(there) < 2:
            return None
        flops, size = np.log(there).T
        return float(np.polyfit(flops, size, 1)[0])

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        inside = [each.inside for law, each in self.foretold if law.metric == "loss"]
        return {
            "format": FORMAT,
            "version": VERSION,
            "base": {name: getattr(self.base, name) for name in Family.__slots__},
            "laws": [law.to_json(self.base) for law in self.laws],
            "held_out_inside": sum(inside),
            "held_out": len(inside),
            "valleys": [
                {"flops": each.flops, "points": [row.name for row in each.rows], "best_parameters": each.best}
                for each in self.valleys
            ],
            "best_size_grows_as_compute_to": self.growth(),
            "optima": [
                each.to_json() | {"layers": self.layers, "epochs": each.structures / self.epoch_structures}
                for each in self.optima
            ],
            "no_optimum": self.no_optimum or None,
            "left_out": dict(self.left_out),
        }


def fit_study(
    results: StudyResults,
    *,
    budgets: Sequence[float] = (),
    replicates: int = REPLICATES,
    level: float = LEVEL,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> Fits:
    """Fit everything that a study's finished points allow.

    Args:
        results: of the study.
        budgets: model FLOPs to find the best use of; by default the dearest point's, and ten times as many.
        replicates: of each bootstrap.
        level: of bands and intervals.
        on_progress: told what is done, and how much of everything.

    Raises:
        TooFewPointsError: no point is finished.
    """
    rows = results.usable
    if not rows:
        raise TooFewPointsError("no point of the study has ended with a loss yet")
    base = base_family(rows)
    wanted = list(_wanted(rows, base))
    laws = []
    for k, (metric, each) in enumerate(wanted):
        on_progress(f"{metric} over {each.title}", k / len(wanted))
        law = _law(metric, each, replicates, level)
        if law.fit is not None and each.variables == COMPUTE:
            family = [row for row in rows if Family.of(row) == each.family]
            law = replace(law, fit=replace(law.fit, trend=trend_of_frontier(family)))
        laws.append(law)
    mine = [row for row in rows if Family.of(row) == base]
    dearest = max(row.flops for row in mine)
    optima, problem, layers = _optima(laws, base, budgets or (dearest, 10 * dearest))
    full = [row for row in mine if row.data_fraction == max(r.data_fraction for r in mine)]
    return Fits(
        base=base,
        laws=tuple(laws),
        valleys=tuple(_valleys(rows, base)),
        optima=tuple(optima),
        no_optimum=problem,
        epoch_structures=max(row.train_structures for row in full),
        most_epochs=max(row.epochs for row in full),
        layers=layers,
        left_out=results.left_out,
    )


def _wanted(rows: Sequence[Row], base: Family) -> Iterator[tuple[str, Slice]]:
    families = sorted({Family.of(row) for row in rows}, key=lambda family: (family != base, family))
    for kind in _KINDS:
        # of models of equal compute the larger see less: their losses are no law, but a valley
        found = [each for each in slices(rows, kind) if kind == DATA or "FLOPs" not in dict(each.fixed)]
        usual = next((each.fixed for each in found if each.family == base), ())
        for family in families:
            mine = [each for each in found if each.family == family]
            if family == base:
                chosen = [each for each in mine if each.distinct > 2 * len(kind) + 1][:_OF_BASE] or mine[:1]
            else:  # as the base's, so that the laws can be compared; or else its best
                enough = [each for each in mine if each.distinct > 2 * len(kind) + 1]
                chosen = [each for each in enough if each.fixed == usual] or enough[:1]
            for each in chosen:
                yield from ((metric, each) for metric in (METRICS if len(kind) == 1 else ("loss",)))
    for family in families:
        best = frontier([row for row in rows if Family.of(row) == family])
        if family == base or len({setting_of(row) for row in best}) > 3:
            fixed = (("settings", "on the frontier"),)
            yield "loss", Slice(family, COMPUTE, fixed, tuple(best), ())


def _law(metric: str, each: Slice, replicates: int, level: float) -> Law:
    there = [row for row in each.rows if row.value(metric) is not None]
    losses = np.array([row.value(metric) for row in there], dtype=np.float64)
    x = variables_of(there, each.variables)
    try:
        # the compute of a setting's seeds differs a little, by the structures that they met
        settings = [setting_of(row) for row in there] if each.variables == COMPUTE else None
        # of each law by itself: laws are compared by their replicates, as if those were independent
        seed = zlib.crc32(repr((metric, each.family, each.title)).encode())
        fit = fit_law(x, losses, settings=settings, replicates=replicates, level=level, seed=seed)
    except TooFewPointsError as error:
        return Law(metric, each, None, str(error), ())
    held = [row for row in each.held_out if row.value(metric) is not None]
    foretold = []
    if held:
        band = fit.band(variables_of(held, each.variables))
        foretold = [
            Foretold(row, float(row.value(metric) or 0), *map(float, numbers))
            for row, *numbers in zip(held, band.fitted, band.run_low, band.run_high, strict=True)
        ]
    return Law(metric, each, fit, "", tuple(foretold))


def _optima(laws: Sequence[Law], base: Family, budgets: Sequence[float]) -> tuple[list[Optimum], str, int]:
    problems = []
    for law in laws:
        if law.slice.variables != SIZE_AND_SEEN or law.slice.family != base:
            continue
        layers = law.slice.rows[0].layers if law.slice.rows else 0
        if law.fit is None:
            problems.append(f"{law.slice.title}: {law.refused}")
            continue
        try:
            costs = Costs.of(law.slice.rows)
            batch = min(row.structures_per_step for row in law.slice.rows)
            seen = max(row.structures for row in law.slice.rows)
            return [best_use(law.fit, costs, budget, batch, seen) for budget in budgets], "", layers
        except TooFewPointsError as error:
            problems.append(str(error))
    advice = "; train models of several sizes for several lengths (in steps or FLOPs) on the full data"
    return [], (problems[0] if problems else "no points differ in size and length") + advice, 0


def _valleys(rows: Sequence[Row], base: Family) -> Iterator[Valley]:
    for each in slices(rows, SIZE):
        lengths = dict(each.fixed)
        if each.family == base and "FLOPs" in lengths and each.distinct >= 3:
            yield valley(each.rows)
