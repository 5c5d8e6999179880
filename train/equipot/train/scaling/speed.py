"""How long points take, from those that are measured. Knows no points, only steps of so many FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_STEP_SECONDS = 0.04
_FLOPS_A_SECOND = 2e10
"""With the time of any step's overhead what is assumed of a core until something is measured."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps of one kind that were timed, all else that a point takes included."""

    step_flops: float
    step_seconds: float


class Speed:
    """Seconds of a step by its FLOPs, between measured ones in proportion on logarithmic axes.

    Below the smallest a step takes as long as that one: what it takes is overhead. Above the largest the rate
    stays.
    """

    def __init__(self, measured: Sequence[Measured]) -> None:
        self.is_measured = bool(measured)
        alike: dict[float, list[tuple[float, float]]] = {}
        for each in measured:
            logs = math.log(each.step_flops), math.log(each.step_seconds)
            alike.setdefault(round(logs[0], 1), []).append(logs)
        means = (
            tuple(sum(column) / len(column) for column in zip(*each, strict=True)) for each in alike.values()
        )
        self._points = sorted((flops, seconds) for flops, seconds in means)

    def step_seconds(self, step_flops: float) -> float:
        """Of a step of so many FLOPs."""
        if not self._points:
            return _STEP_SECONDS + step_flops / _FLOPS_A_SECOND
        at = math.log(max(step_flops, 1.0))
        (first, seconds), (last, most) = self._points[0], self._points[-1]
        if at <= first:
            return math.exp(seconds)
        if at >= last:
            return math.exp(most + at - last)
        for (x0, y0), (x1, y1) in zip(self._points, self._points[1:], strict=False):
            if at <= x1:
                return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
        raise AssertionError("between the first and the last")
