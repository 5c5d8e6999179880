"""Learns how long batches take, and foretells it. Pure arithmetic: knows no engine and no clock.

Seconds are a fixed part and parts per structure, atom and edge, none below zero, fitted to what batches of
like size take. Their own deviation from the fit is kept, so that sizes that were seen are foretold as they
were seen (threads and caches bend the line), and others as the line says. How fast the machine is now, beside
what all of that says, is learnt from the last batches of any size: others compute on it, too.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

RECENT = 15
"""Batches of like size of which the median counts: a machine has its moments, and they are long beside a
batch of a millisecond."""

MEMORY = 0.1
"""Weight of the newest batch in how large those of its like are, once there were some."""

MACHINE_MEMORY = 0.2
"""Weight of the newest batch in how fast the machine is now."""

QUICK = 0.01
"""Batches that take no longer, in seconds, are done in one go or two of the system's scheduler: others who
compute may put them off now and then, and slow most of them down by nothing."""

SURPRISE = 0.3
"""Logarithm of the factor by which the machine counts at most as faster or slower after one batch."""

FEW = 4
"""Sizes that were seen less often than this have little to say of the line."""

REFIT_AFTER = 16
"""Batches between two fits; what is known of each size moves with every batch."""

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


class _Like:
    """Batches of one cell: their terms, and the logarithm of the seconds for each edge and atom."""

    __slots__ = ("_last", "count", "pace", "ratio", "terms")

    def __init__(self, terms: Sequence[float], pace: float) -> None:
        self.terms = list(terms)
        self._last = deque([pace], maxlen=RECENT)
        self.pace = pace
        self.count = 1
        self.ratio = 1.0

    @property
    def seconds(self) -> float:
        """That a batch of these terms takes."""
        return math.exp(self.pace) * (self.terms[2] + self.terms[3])

    @property
    def weight(self) -> float:
        """In the fit."""
        return self.count / (self.count + FEW)

    def add(self, terms: Sequence[float], pace: float) -> None:
        self.count += 1
        weight = max(1.0 / self.count, MEMORY)
        self.terms = [old + weight * (new - old) for old, new in zip(self.terms, terms, strict=True)]
        self._last.append(pace)
        self.pace = statistics.median(self._last)

    def compare(self, parts: Sequence[float]) -> None:
        """Notes how it deviates from the line."""
        fitted = _dot(parts, self.terms)
        self.ratio = self.seconds / fitted if fitted > 0 else 1.0


class Pace:
    """How long batches of one kind take."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], _Like] = {}
        self._parts = [0.0, 0.0, 0.0, 0.0]
        self._machine = 0.0
        self._since_fit = 0

    def __bool__(self) -> bool:
        """Whether it has seen a batch."""
        return bool(self._seen)

    def learn(self, size: Size, seconds: float) -> None:
        """Takes a batch into account that took so long."""
        work = size.atoms + size.edges
        if not (seconds > 0 and work):
            return
        like = self._seen.get(size.cell)
        slowed = self._slowed(self._alone(size) if self._seen else seconds)
        pace = math.log(seconds / work) - slowed
        if like is None:
            self._seen[size.cell] = _Like(size.terms, pace)
            self._fit()
            return
        if self._alone(size) > QUICK:
            surprise = math.log(seconds / self.seconds(size))
            self._machine += MACHINE_MEMORY * max(-SURPRISE, min(SURPRISE, surprise))
        like.add(size.terms, pace)
        like.compare(self._parts)
        self._since_fit += 1
        if self._since_fit >= REFIT_AFTER:
            self._fit()

    def seconds(self, size: Size) -> float:
        """How long a batch of this size will take.

        Raises:
            ValueError: nothing was learnt yet.
        """
        if not self._seen:
            raise ValueError("no batch was seen yet")
        alone = self._alone(size)
        return alone * math.exp(self._slowed(alone))

    def _alone(self, size: Size) -> float:
        """Seconds on the machine as it is on the whole."""
        like = self._seen.get(size.cell)
        return _dot(self._parts, size.terms) * (like.ratio if like else 1.0)

    def _slowed(self, seconds: float) -> float:
        """Logarithm of the factor by which the machine is slower now, for what takes so long on the whole."""
        return self._machine if seconds > QUICK else 0.0

    def _fit(self) -> None:
        """Least squares of relative errors; no part may be negative, so coordinate by coordinate."""
        seen = list(self._seen.values())
        rows = [[term / like.seconds for term in like.terms] for like in seen]
        weights = [like.weight for like in seen]
        scales = [max(row[k] for row in rows) or 1.0 for k in range(4)]
        rows = [[row[k] / scales[k] for k in range(4)] for row in rows]
        products = [[_weighted(weights, rows, j, k) for k in range(4)] for j in range(4)]
        targets = [math.fsum(w * row[k] for w, row in zip(weights, rows, strict=True)) for k in range(4)]
        parts = [0.0] * 4
        for _ in range(ROUNDS):
            # Edges first: most of the time goes to them, and a lone size cannot tell the parts apart.
            for k in (3, 2, 1, 0):
                if products[k][k] > 0:
                    rest = targets[k] - sum(products[k][j] * parts[j] for j in range(4) if j != k)
                    parts[k] = max(0.0, rest / products[k][k])
        self._parts = [part / scale for part, scale in zip(parts, scales, strict=True)]
        self._since_fit = 0
        for like in seen:
            like.compare(self._parts)


def _weighted(weights: Sequence[float], rows: Sequence[Sequence[float]], j: int, k: int) -> float:
    return math.fsum(weight * row[j] * row[k] for weight, row in zip(weights, rows, strict=True))


def _dot(parts: Sequence[float], terms: Sequence[float]) -> float:
    return math.fsum(part * term for part, term in zip(parts, terms, strict=True))
