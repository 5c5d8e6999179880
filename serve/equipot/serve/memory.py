"""Gives memory that was freed back to the system, and knows when there was none. Knows nothing of models."""

from __future__ import annotations

import gc

import torch

from equipot.serve.heap import trim


def give_back() -> None:
    """Frees what only cycles hold, and returns the pages of tensors that are gone.

    Takes some ten milliseconds, so it is for a model that leaves and for no request.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim()


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is for want of memory, on a processor or a GPU."""
    # On the CPU torch raises a plain RuntimeError from its allocator.
    words = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "allocate memory" in words
        or "bad_alloc" in words
    )
