"""How long steps take, from those that are measured. Knows no points, only steps of so many FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STEP_SECONDS, _LAYER_SECONDS, _FLOPS_A_SECOND = 0.005, 0.005, 4e10
"""What a step and each of its layers take whatever the width, and what products take besides, on one core."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps of one kind that were timed, validations included."""

    step_flops: float
    layers: int
    step_seconds: float


class Speed:
    """Seconds of a step by its FLOPs: a core's usual ones, times how much longer measured steps took.

    That factor is interpolated between measured steps by the logarithm of FLOPs, and stays outside of them:
    small steps take as long as their layers do, large ones go at a rate.
    """

    def __init__(self, measured: Sequence[Measured]) -> None:
        self.is_measured = bool(measured)
        alike: dict[float, list[tuple[float, float]]] = {}
        for each in measured:
            at = math.log(each.step_flops)
            factor = math.log(each.step_seconds / _usual(each.step_flops, each.layers))
            alike.setdefault(round(at, 1), []).append((at, factor))
        self._points = np.array(sorted(np.mean(each, axis=0).tolist() for each in alike.values()))

    def step_seconds(self, step_flops: float, layers: int) -> float:
        """Of a step of so many FLOPs, through so many layers."""
        usual = _usual(step_flops, layers)
        if not self.is_measured:
            return usual
        factor = np.interp(math.log(step_flops), self._points[:, 0], self._points[:, 1])
        return usual * math.exp(float(factor))


def _usual(step_flops: float, layers: int) -> float:
    return _STEP_SECONDS + layers * _LAYER_SECONDS + step_flops / _FLOPS_A_SECOND
