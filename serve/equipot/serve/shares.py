"""Who may have how much of the engine, and how urgent a request is. Knows no queue."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """How urgent a request is; a higher one goes first, until a lower one has waited for long."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one client identity may have.

    Attributes:
        weight: of the engine's time, while others want it too: twice the weight, twice the time.
        highest: a request that asks for more is treated as this. Anybody may step back, but only those whom
            the operator lets step forward.

    Raises:
        ValueError: a weight that is not a positive number.
    """

    weight: float = 1.0
    highest: Priority = Priority.NORMAL

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight is {self.weight}, allowed are positive numbers")


EQUAL_SHARE = Share()


class Backlog:
    """Amounts of work that wait, sorted by size so that a sum over those below a size costs no walk."""

    def __init__(self) -> None:
        self.total = 0.0
        self._counts: defaultdict[int, int] = defaultdict(int)
        self._sums: defaultdict[int, float] = defaultdict(float)

    def add(self, work: float) -> None:
        """One more request has so much to do."""
        self._change(work, 1)

    def remove(self, work: float) -> None:
        """A request that had so much to do has gone, or has another amount now."""
        self._change(work, -1)

    def ahead_of(self, work: float) -> float:
        """What is done before a new request of so much work, if all take turns: as much for each at most.

        Requests within a factor of two of its size count whole or as its size, whichever is less in all.
        """
        own = _octave(work)
        return sum(
            self._sums[octave] if octave < own else min(self._sums[octave], count * work)
            for octave, count in self._counts.items()
        )

    def _change(self, work: float, by: int) -> None:
        if work <= 0:
            return
        octave = _octave(work)
        self._counts[octave] += by
        self._sums[octave] += by * work
        self.total += by * work
        if not self._counts[octave]:
            # Differences of floats leave dust, which must not add up over months.
            self.total -= self._sums.pop(octave)
            del self._counts[octave]
            if not self._counts:
                self.total = 0.0


def _octave(work: float) -> int:
    return math.frexp(work)[1]
