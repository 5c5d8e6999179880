"""Which width, and how many structures, a budget of compute is best spent on. Knows no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from equipot.train.scaling.bootstrap import Band, LawFit, TooFewPointsError
from equipot.train.scaling.laws import Array
from equipot.train.scaling.rows import Row

_LEAST_WIDTH, _MOST_WIDTH = 4, 65536
_WIDTHS = 400


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """Parameters, and model FLOPs of training a structure, by width: both are quadratic in it.

    Fitted to points of one family and depth, to which they are exact but for the rounding of a width's half.
    """

    parameters: Array
    """(3,) coefficients of width², width and 1"""
    flops: Array
    """(2,) coefficients of width² and width, a structure"""

    @staticmethod
    def of(rows: Sequence[Row]) -> Costs:
        """From points of one family and depth.

        Raises:
            TooFewPointsError: fewer than three widths.
        """
        width = np.array([row.width for row in rows], dtype=np.float64)
        if len(np.unique(width)) < 3:
            raise TooFewPointsError(
                f"{len(np.unique(width))} different width(s) at one depth, and costs by width need three"
            )
        powers = np.stack([width**2, width, np.ones_like(width)], axis=1)
        size = np.array([row.parameters for row in rows], dtype=np.float64)
        spent = np.array([row.flops / row.structures for row in rows], dtype=np.float64)
        # relative errors count: the widest would else decide alone
        parameters, *_ = np.linalg.lstsq(powers / size[:, None], np.ones(len(rows)), rcond=None)
        flops, *_ = np.linalg.lstsq(powers[:, :2] / spent[:, None], np.ones(len(rows)), rcond=None)
        return Costs(parameters.astype(np.float64), flops.astype(np.float64))

    def parameters_at(self, width: Array) -> Array:
        """Of models so wide."""
        value: Array = self.parameters[0] * width**2 + self.parameters[1] * width + self.parameters[2]
        return np.maximum(value, 1.0)

    def flops_at(self, width: Array) -> Array:
        """Of training one structure."""
        value: Array = self.flops[0] * width**2 + self.flops[1] * width
        return np.maximum(value, 1e-300)


@dataclass(frozen=True, slots=True, eq=False)
class Optimum:
    """The best use of a budget by a law in parameters and structures seen, and how well it is known."""

    budget: float
    width: int
    width_interval: tuple[int, int]
    parameters: float
    structures: float
    """Seen in training."""
    structures_interval: tuple[float, float]
    band: Band
    at_end: bool
    """No width within reach was too small (or too large): the optimum is beyond."""
    within: Optimum | None = None
    """The best use that sees no more structures than a point has; None if no width trains so few."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "budget_flops": self.budget,
            "width": self.width,
            "width_interval": list(self.width_interval),
            "parameters": self.parameters,
            "structures_seen": self.structures,
            "structures_seen_interval": list(self.structures_interval),
            "loss": float(self.band.fitted[0]),
            "law_interval": [float(self.band.low[0]), float(self.band.high[0])],
            "run_interval": [float(self.band.run_low[0]), float(self.band.run_high[0])],
            "beyond_reach": self.at_end,
            "within_what_was_seen": None if self.within is None else self.within.to_json(),
        }


def best_use(fit: LawFit, costs: Costs, budget: float, batch: int, most_seen: float) -> Optimum:
    """Minimise the law along all models that the budget can train.

    Args:
        fit: of (parameters, structures seen).
        costs: by width.
        budget: model FLOPs.
        batch: structures per step: fewer are not seen.
        most_seen: structures that a point has seen: the best use within it is given, too.

    Raises:
        TooFewPointsError: the budget does not train the narrowest model for a step.
    """
    widths = np.unique(np.geomspace(_LEAST_WIDTH, _MOST_WIDTH, _WIDTHS).round())
    structures = budget / costs.flops_at(widths)
    paid = structures >= batch
    if not paid.any():
        raise TooFewPointsError(f"a budget of {budget:.3g} FLOPs does not pay for a single step of {batch}")
    whole = _best(fit, costs, budget, widths[paid], structures[paid])
    few = paid & (structures <= most_seen)
    return replace(
        whole, within=_best(fit, costs, budget, widths[few], structures[few]) if few.any() else None
    )


def _best(fit: LawFit, costs: Costs, budget: float, widths: Array, structures: Array) -> Optimum:
    x = np.stack([costs.parameters_at(widths), structures], axis=1)
    best = int(fit.best.curve(x)[0].argmin())
    tail = 100 * (1 - fit.level) / 2
    found = fit.replicates.curve(x).argmin(axis=1)
    low, high = np.percentile(widths[found], (tail, 100 - tail))
    low_seen, high_seen = np.percentile(structures[found], (tail, 100 - tail))
    return Optimum(
        budget=budget,
        width=int(widths[best]),
        width_interval=(round(low), round(high)),
        parameters=float(x[best, 0]),
        structures=float(x[best, 1]),
        structures_interval=(float(low_seen), float(high_seen)),
        band=fit.band(x[best : best + 1]),
        at_end=best in (0, len(widths) - 1),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Valley:
    """Losses of models that were trained for equal compute, as a parabola in the logarithm of their size."""

    flops: float
    rows: tuple[Row, ...]
    coefficients: Array
    """(3,) of log loss in log parameters, highest power first"""
    best: float | None
    """Parameters at its bottom; None if it has none between the smallest and the largest model."""


def valley(rows: Sequence[Row]) -> Valley:
    """Fit one budget's models; at least three sizes."""
    size = np.log([row.parameters for row in rows])
    loss = np.log([row.value("loss") for row in rows])  # type: ignore[arg-type]
    coefficients = np.polyfit(size, loss, 2)
    bottom = -coefficients[1] / (2 * coefficients[0]) if coefficients[0] > 0 else np.inf
    inside = size.min() <= bottom <= size.max()
    flops = float(np.exp(np.mean(np.log([row.flops for row in rows]))))
    return Valley(flops, tuple(rows), coefficients, float(np.exp(bottom)) if inside else None)
