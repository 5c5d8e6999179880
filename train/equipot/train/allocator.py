"""Makes the C library give memory back that a step no longer needs. Knows no torch."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_BYTES = 2**20


def give_memory_back() -> None:
    """Have every large tensor in pages of its own, which the system has again when it is dropped.

    Left to itself, glibc raises that limit to 32 MiB as soon as large tensors come and go, and puts what is
    smaller on its heap, where the holes between what still lives are lost: training then takes up to twice
    the memory of its tensors (benchmarks/memory.py). Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BYTES)
