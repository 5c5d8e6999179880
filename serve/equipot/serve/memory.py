"""Gives memory that was freed back to the system. Knows nothing of models."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Frees what only cycles hold, and lets glibc return the pages of tensors that are gone.

    Takes some ten milliseconds, so it is for a model that leaves and for no request.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        # Tensors below glibc's sliding threshold lie on a heap that keeps its size by itself.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
