"""Distributions of unbounded streams in bounded memory: logarithmic histograms, and the largest few."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_PER_DECADE = 128
_LOWEST, _HIGHEST = -9, 9
_HALF = (_HIGHEST - _LOWEST) * _PER_DECADE
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)


class Sketch:
    """Histogram of both signs on a logarithmic scale: quantiles to 1 %, between 1e-9 and 1e9 in size.

    Attributes:
        n: number of finite values seen.
        low, high: smallest and largest.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(2 * _HALF + 1, np.int64)
        self.n = 0
        self.low, self.high = np.inf, -np.inf
        self._sum = self._squares = 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Takes values in; those that are not finite are not counted."""
        there = values[np.isfinite(values)]
        if not len(there):
            return
        self._counts += np.bincount(_bin(there), minlength=len(self._counts))
        self.n += len(there)
        self.low, self.high = min(self.low, float(there.min())), max(self.high, float(there.max()))
        self._sum += float(there.sum())
        self._squares += float(np.square(there).sum())

    @property
    def rms(self) -> float:
        """Root of the mean square, NaN of nothing."""
        return float(np.sqrt(self._squares / self.n)) if self.n else np.nan

    def quantile(self, q: float) -> float:
        """Value below which a share q lies, NaN of nothing."""
        return _weighted_quantile(_CENTRES, self._counts, q, self.low, self.high)

    @property
    def median(self) -> float:
        """The 0.5 quantile."""
        return self.quantile(0.5)

    @property
    def spread(self) -> float:
        """Robust standard deviation: 1.4826 × median distance from the median."""
        if not self.n:
            return np.nan
        distance = np.abs(_CENTRES - self.median)
        order = np.argsort(distance)
        return 1.4826 * _weighted_quantile(distance[order], self._counts[order], 0.5, 0.0, np.inf)

    def beyond(self, low: float, high: float) -> int:
        """How many values lie outside, to a bin."""
        return int(self._counts[(low > _CENTRES) | (high < _CENTRES)].sum())

    def histogram(self, edges: NDArray[np.float64]) -> NDArray[np.float64]:
        """Number of values between edges; each bin's share is spread evenly over its width."""
        cumulative = np.concatenate([[0], np.cumsum(self._counts)])
        return np.diff(np.interp(edges, _EDGES, cumulative))

    def summary(self) -> dict[str, Any]:
        """As JSON: None of nothing."""
        if not self.n:
            return {"n": 0}
        mean = self._sum / self.n
        std = float(np.sqrt(max(self._squares / self.n - mean * mean, 0.0)))
        return {
            "n": self.n,
            "mean": mean,
            "std": std,
            "min": self.low,
            "max": self.high,
            "robust_std": self.spread,
            "quantiles": {str(q): self.quantile(q) for q in QUANTILES},
        }


class Extremes:
    """The places of the largest few values of a stream."""

    def __init__(self, keep: int = 20) -> None:
        self._keep = keep
        self._values = np.empty(0)
        self._indices = np.empty(0, np.int64)

    def add(self, values: NDArray[np.float64], indices: NDArray[np.int64]) -> None:
        """Takes values in with their places."""
        there = np.isfinite(values)
        values = np.concatenate([self._values, values[there]])
        indices = np.concatenate([self._indices, indices[there]])
        order = np.lexsort((indices, -values))[: self._keep]
        self._values, self._indices = values[order], indices[order]

    def largest(self) -> list[tuple[float, int]]:
        """(value, place), largest first."""
        return list(zip(self._values.tolist(), self._indices.tolist(), strict=True))


def _bin(values: NDArray[np.float64]) -> NDArray[np.int64]:
    size = np.abs(values)
    scaled = (np.log10(np.maximum(size, 10.0**_LOWEST)) - _LOWEST) * _PER_DECADE
    k = np.clip(scaled.astype(np.int64), 0, _HALF - 1) + 1
    return np.where(size < 10.0**_LOWEST, _HALF, np.where(values > 0, _HALF + k, _HALF - k))


def _weighted_quantile(
    centres: NDArray[np.float64], counts: NDArray[np.int64], q: float, low: float, high: float
) -> float:
    total = int(counts.sum())
    if not total:
        return np.nan
    k = int(np.searchsorted(np.cumsum(counts), max(q * total, 1)))
    return float(np.clip(centres[min(k, len(centres) - 1)], low, high))


_POSITIVE = 10.0 ** (_LOWEST + np.arange(_HALF + 1) / _PER_DECADE)
_EDGES = np.concatenate([-_POSITIVE[::-1], _POSITIVE])
_CENTRES = np.concatenate(
    [-np.sqrt(_POSITIVE[1:] * _POSITIVE[:-1])[::-1], [0.0], np.sqrt(_POSITIVE[1:] * _POSITIVE[:-1])]
)
