"""What becomes of memory that was freed: glibc keeps it, unless told otherwise."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

_M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


def share_one() -> None:
    """Lets all threads have one heap; for a process that has one thread as yet.

    Else each has one of its own, of whose end nothing goes back before it is as long as the largest block
    ever freed, twice: some ten MB each that nobody uses.
    """
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Returns pages that nothing lies on, for a few milliseconds or some ten if they are many."""
    # Tensors below malloc's sliding threshold lie on heaps that keep their size by themselves.
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
