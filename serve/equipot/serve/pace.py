"""Learns how long batches take, and foretells it. Pure arithmetic: knows no engine and no clock.

Seconds are a fixed part and parts per structure, atom and edge, none below zero, fitted to means over batches
of like size. A mean's own deviation from the fit is kept, so that sizes that were seen are foretold as they
were seen (threads and caches bend the line), and others as the line says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MEMORY = 0.2
"""Weight of the newest batch in the mean over batches of its size."""

OUTLIER = 3.0
"""A batch that took so many times its like counts as this many: a machine has its moments."""

REFIT_AFTER = 16
"""Batches between two fits; the means move with every batch."""

ROUNDS = 60
"""Of coordinate descent over four numbers, far more than they need."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a batch holds."""

    structures: int
    atoms: int
    edges: int

    @property
    def terms(self) -> tuple[float, float, float, float]:
        """What each part of the time is multiplied by."""
        return 1.0, float(self.structures), float(self.atoms), float(self.edges)

    @property
    def cell(self) -> tuple[int, int]:
        """Batches of one cell are within a factor of two of each other."""
        return (self.edges + self.atoms).bit_length(), self.structures.bit_length()

    def __add__(self, other: Size) -> Size:
        return Size(self.structures + other.structures, self.atoms + other.atoms, self.edges + other.edges)


NOTHING = Size(0, 0, 0)


class _Mean:
    """Over batches of one cell: their terms and seconds."""

    __slots__ = ("ratio", "seconds", "terms")

    def __init__(self, terms: Sequence[float], seconds: float) -> None:
        self.terms = list(terms)
        self.seconds = seconds
        self.ratio = 1.0

    def add(self, terms: Sequence[float], seconds: float) -> None:
        self.terms = [old + MEMORY * (new - old) for old, new in zip(self.terms, terms, strict=True)]
        self.seconds += MEMORY * (min(seconds, OUTLIER * self.seconds) - self.seconds)


class Pace:
    """How long batches of one kind take."""

    def __init__(self) -> None:
        self._means: dict[tuple[int, int], _Mean] = {}
        self._parts = [0.0, 0.0, 0.0, 0.0]
        self._since_fit = REFIT_AFTER

    def __bool__(self) -> bool:
        """Whether it has seen a batch."""
        return bool(self._means)

    def learn(self, size: Size, seconds: float) -> None:
        """Takes a batch into account that took so long."""
        if not seconds > 0:
            return
        mean = self._means.get(size.cell)
        if mean is None:
            self._means[size.cell] = _Mean(size.terms, seconds)
            self._since_fit = REFIT_AFTER
            return
        mean.add(size.terms, seconds)
        self._since_fit += 1
        mean.ratio = mean.seconds / (_dot(self._parts, mean.terms) or mean.seconds)

    def seconds(self, size: Size) -> float:
        """How long a batch of this size will take.

        Raises:
            ValueError: nothing was learnt yet.
        """
        if not self._means:
            raise ValueError("no batch was seen yet")
        if self._since_fit >= REFIT_AFTER:
            self._fit()
        mean = self._means.get(size.cell)
        return _dot(self._parts, size.terms) * (mean.ratio if mean else 1.0)

    def _fit(self) -> None:
        """Least squares of relative errors; no part may be negative, so coordinate by coordinate."""
        rows = [[term / mean.seconds for term in mean.terms] for mean in self._means.values()]
        scales = [max(row[k] for row in rows) or 1.0 for k in range(4)]
        rows = [[row[k] / scales[k] for k in range(4)] for row in rows]
        products = [[sum(row[j] * row[k] for row in rows) for k in range(4)] for j in range(4)]
        targets = [sum(row[k] for row in rows) for k in range(4)]
        parts = [0.0] * 4
        for _ in range(ROUNDS):
            # Edges first: most of the time goes to them, and a lone mean cannot tell the parts apart.
            for k in (3, 2, 1, 0):
                if products[k][k] > 0:
                    rest = targets[k] - sum(products[k][j] * parts[j] for j in range(4) if j != k)
                    parts[k] = max(0.0, rest / products[k][k])
        self._parts = [part / scale for part, scale in zip(parts, scales, strict=True)]
        self._since_fit = 0
        for mean in self._means.values():
            fitted = _dot(self._parts, mean.terms)
            mean.ratio = mean.seconds / fitted if fitted > 0 else 1.0


def _dot(parts: Sequence[float], terms: Sequence[float]) -> float:
    return math.fsum(part * term for part, term in zip(parts, terms, strict=True))
