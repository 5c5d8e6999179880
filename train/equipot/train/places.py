"""Lists of structures that may name a structure more than once, or only some, without being written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.columns import Column

BLOCK = 2**15
"""Structures looked at together: bounds the memory of every pass over a data set."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Structures of one store, each seen `weight` times on average.

    Entry j of `indices` is drawn ⌊(j+1)·weight⌋ − ⌊j·weight⌋ times: with weight 2 every one twice, with 0.5
    every second one. What is drawn of an entry does not depend on the length of the list, so the draws of a
    shorter list are the first draws of a longer one.

    Attributes:
        store: index of the store.
        indices: of structures, in any integer type; may be memory-mapped.
        weight: positive.
    """

    store: int
    indices: NDArray[Any]
    weight: Fraction = Fraction(1)

    def __len__(self) -> int:
        return len(self.indices) * self.weight.numerator // self.weight.denominator

    def draw(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Structure indices of draws `rows`, which lie between 0 and the length."""
        p, q = self.weight.numerator, self.weight.denominator
        # the first entry j with ⌊(j+1)·p/q⌋ > row
        entries = rows if p == q else ((rows + 1) * q + p - 1) // p - 1
        return self.indices[entries].astype(np.int64)


class Places:
    """(store, structure) pairs, segment by segment: `places[rows]` is (n, 2) int64, made when asked for."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        lengths = [len(segment) for segment in self.segments]
        self._ends = np.cumsum(np.array(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.int64]:
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)} places")
        pairs = np.empty((len(wanted), 2), dtype=np.int64)
        of_segment = np.searchsorted(self._ends, wanted, side="right")
        for k, segment in enumerate(self.segments):
            mine = np.flatnonzero(of_segment == k)
            if len(mine):
                pairs[mine, 0] = segment.store
                pairs[mine, 1] = segment.draw(wanted[mine] - (self._ends[k] - len(segment)))
        return pairs

    def of_store(self, store: int) -> Places:
        """Those of one store."""
        return Places([segment for segment in self.segments if segment.store == store])


def in_blocks(keys: Column) -> Iterator[NDArray[np.integer]]:
    """All rows in their order, a bounded number at a time."""
    for start in range(0, len(keys), BLOCK):
        yield keys[np.arange(start, min(start + BLOCK, len(keys)))]
