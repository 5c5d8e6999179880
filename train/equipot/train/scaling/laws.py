"""Saturating power laws, and their least squares for many sets of losses at once. Knows no files.

A law is L(x) = E + Σ_k A_k·x_k^(−α_k), as of parameters and data in arXiv 2203.15556 (eq. 2), and is fitted
in its form log L = logsumexp(e, a_k − α_k·log x_k) to log losses under a Huber penalty (its appendix D.3).
The problems are small and many: starts, and replicates of a bootstrap. They are solved together by
Levenberg-Marquardt steps on stacked arrays, some hundred times faster than one after the other by a general
solver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST_DELTA = 1e-3
"""Where the Huber penalty of a log loss turns linear, at least: the value of arXiv 2203.15556."""
EXPONENTS = (1e-3, 5.0)
"""Within which an exponent is sought. One that ends there is not determined by the data."""
LEAST_OFFSET = 1e-6
"""Of the smallest loss: below it E is as good as none."""

_ROBUST = 2.5  # × the spread: as good as least squares without outliers, and no more pulled by one than so
_STARTS = (0.1, 0.35, 1.0)
_OFFSETS = (0.05, 0.6, 0.95)
_ITERATIONS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """Of R fits of one law of K variables, by row."""

    offset: Array
    """(R,) E, in the unit of the loss"""
    log_scale: Array
    """(R, K) log A"""
    exponent: Array
    """(R, K) α"""

    def curve(self, x: Array) -> Array:
        """(R, m) losses at x (m, K)."""
        powers = self.log_scale[:, None, :] - self.exponent[:, None, :] * np.log(x)[None]
        total: Array = self.offset[:, None] + np.exp(powers).sum(axis=2)
        return total

    def at(self, row: int) -> Parameters:
        """One fit alone."""
        return Parameters(*(getattr(self, name)[row : row + 1] for name in self.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Points of one law, ready for repeated fits.

    Attributes:
        log_x: (n, K) logarithms, less their means.
        centre: (K,) those means.
        weight: (n,) of each point.
    """

    log_x: Array
    centre: Array
    weight: Array

    @staticmethod
    def of(x: Array, weight: Array | None = None) -> Problem:
        """From x (n, K), all positive."""
        log_x = np.log(x)
        centre = log_x.mean(axis=0)
        return Problem(log_x - centre, centre, np.ones(len(x)) if weight is None else weight)

    def solve(
        self, log_y: Array, starts: Array, delta: float, weight: Array | None = None
    ) -> tuple[Array, Array]:
        """Fits by rows.

        Args:
            log_y: (R, n) log losses.
            starts: (R, 1 + 2K).
            delta: of the Huber penalty.
            weight: (R, n), if not the problem's own: how often a replicate holds each point.

        Returns:
            (R, 1 + 2K) parameters as e, a_k, log α_k about the centre; (R,) penalties.
        """
        weights = np.broadcast_to(self.weight if weight is None else weight, log_y.shape)
        theta = self._within(starts, log_y)
        residual, slopes = self._residual(theta, log_y)
        cost = _cost(residual, weights, delta)
        damping = np.full(len(theta), 1e-2)
        identity = np.eye(theta.shape[1])
        for _ in range(_ITERATIONS):
            inner = weights / np.maximum(1.0, np.abs(residual) / delta)
            gradient = np.einsum("rnp,rn->rp", slopes, inner * residual)
            normal = np.einsum("rnp,rnq,rn->rpq", slopes, slopes, inner)
            scale = np.maximum(np.einsum("rpp->rp", normal), 1e-9)
            step = np.linalg.solve(
                normal + (damping[:, None] * scale)[..., None] * identity, gradient[..., None]
            )[..., 0]
            trial = self._within(theta - np.clip(step, -2.0, 2.0), log_y)
            found, found_slopes = self._residual(trial, log_y)
            found_cost = _cost(found, weights, delta)
            better = found_cost < cost
            gained = np.where(better, cost - found_cost, 0.0)
            settled = (gained <= 1e-8 * (cost + 1e-30)) & (better | (damping > 1e6))
            theta = np.where(better[:, None], trial, theta)
            residual = np.where(better[:, None], found, residual)
            slopes = np.where(better[:, None, None], found_slopes, slopes)
            cost = np.where(better, found_cost, cost)
            damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-12, 1e8)
            if settled.all():
                break
        return theta, cost

    def starts(self, log_y: Array) -> Array:
        """(S, 1 + 2K) places to begin at, for one set of log losses (n,)."""
        k = self.log_x.shape[1]
        rows = []
        least, middle = np.exp(log_y.min()), np.exp(np.median(log_y))
        for offset in _OFFSETS:
            for exponent in np.stack(np.meshgrid(*[_STARTS] * k), axis=-1).reshape(-1, k):
                left = max(middle - offset * least, 0.05 * middle) / k
                rows.append([np.log(offset * least), *np.full(k, np.log(left)), *np.log(exponent)])
        return np.array(rows)

    def parameters(self, theta: Array) -> Parameters:
        """In the units of x and the loss."""
        k = self.log_x.shape[1]
        exponent = np.exp(theta[:, 1 + k :])
        return Parameters(np.exp(theta[:, 0]), theta[:, 1 : 1 + k] + exponent * self.centre, exponent)

    def _residual(self, theta: Array, log_y: Array) -> tuple[Array, Array]:
        k = self.log_x.shape[1]
        exponent = np.exp(theta[:, 1 + k :])
        terms = np.empty((*log_y.shape, 1 + k))
        terms[..., 0] = theta[:, :1]
        terms[..., 1:] = theta[:, None, 1 : 1 + k] - exponent[:, None, :] * self.log_x
        top = terms.max(axis=2, keepdims=True)
        share = np.exp(terms - top)
        total = share.sum(axis=2, keepdims=True)
        share /= total
        fitted = (top + np.log(total))[..., 0]
        by_exponent = -share[..., 1:] * exponent[:, None, :] * self.log_x
        return fitted - log_y, np.concatenate([share, by_exponent], axis=2)

    def _within(self, theta: Array, log_y: Array) -> Array:
        k = self.log_x.shape[1]
        least = log_y.min(axis=1, keepdims=True)
        bounded = theta.copy()
        bounded[:, :1] = np.clip(
            theta[:, :1], least + np.log(LEAST_OFFSET) - 1, log_y.max(axis=1, keepdims=True)
        )
        bounded[:, 1 : 1 + k] = np.clip(theta[:, 1 : 1 + k], least - 20, least + 20)
        bounded[:, 1 + k :] = np.clip(theta[:, 1 + k :], *np.log(EXPONENTS))
        return bounded


def fit_once(problem: Problem, log_y: Array) -> tuple[Array, float]:
    """The best fit (1 + 2K,) to one set of log losses (n,), from many starts; and the Huber delta used.

    The first fit is as robust as that of arXiv 2203.15556; its residuals' spread sets the penalty of the
    second, which wastes less of what noisy points say.
    """
    starts = problem.starts(log_y)
    many = np.broadcast_to(log_y, (len(starts), len(log_y)))
    theta, cost = problem.solve(many, starts, LEAST_DELTA)
    best = theta[cost.argmin()]
    left = residuals(problem, best, log_y)
    free = max(len(log_y) - len(best), 1)
    spread = 1.4826 * float(np.median(np.abs(left))) * math.sqrt(len(log_y) / free)
    delta = max(LEAST_DELTA, _ROBUST * spread)
    theta, cost = problem.solve(many, np.concatenate([starts[1:], best[None]]), delta)
    return theta[cost.argmin()], delta


def residuals(problem: Problem, theta: Array, log_y: Array) -> Array:
    """(n,) log of observed over fitted losses."""
    residual, _ = problem._residual(theta[None], log_y[None])
    found: Array = -residual[0]
    return found


def _cost(residual: Array, weight: Array, delta: float) -> Array:
    size = np.abs(residual)
    each = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    total: Array = (weight * each).sum(axis=1)
    return total
