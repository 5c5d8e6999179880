"""How many operations a second this rank's matrix product makes: what a step is measured by."""

from __future__ import annotations

import functools
import time

import torch

_SIDE = 768  # of the matrices: near the best rate, and a hundredth of a second on a core
_GOES = 4


@functools.cache
def matrix_product_rate(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """Floating-point operations a second of a product of square matrices; the best of a few goes.

    On a CPU the time that was computed counts, not that of the clock on the wall, so that others on the
    machine take nothing off it. Draws no random numbers.

    Args:
        dtype: of the matrices.
        device: where they are.
        threads: that torch uses now.
    """
    left, right = (torch.full((_SIDE, _SIDE), 0.5, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    left @ right
    for _ in range(_GOES):
        start = _clock(device, threads)
        left @ right
        best = min(best, _clock(device, threads) - start)
    return 2.0 * _SIDE**3 / best


def _clock(device: torch.device, threads: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() / threads
