"""Gives memory that was freed back to the system, and knows when there was none. Knows nothing of models."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is for want of memory, on a processor or a GPU."""
    # On the CPU torch raises a plain RuntimeError from its allocator.
    words = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "allocate memory" in words
        or "bad_alloc" in words
    )
