"""Who may have how much of the engine, and how urgent a request is. Knows no queue."""

from __future__ import annotations

import math
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
