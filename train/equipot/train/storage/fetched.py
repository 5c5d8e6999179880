"""Keeps the structures that were fetched last, for storages where fetching one alone is dear."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from equipot.train.storage.base import Arrays
from equipot.train.structures import PER_ATOM_NAMES, PER_STRUCTURE_NAMES, Structures

_BUDGET = 64 * 2**20
_LONGEST_READ_AHEAD = 512

Gather = Callable[[NDArray[np.int64]], Structures]
"""A storage's `gather`."""


class Fetched:
    """Structures by shard and row; whole fetches are dropped, oldest first, when they pass the budget.

    Structures asked for one after the other in the store's order are fetched ahead, in growing spans.
    """

    def __init__(self, gather: Gather, structures: Sequence[int]) -> None:
        """Takes what fetches, and the number of structures of each shard."""
        self._gather = gather
        self._structures = structures
        self._parts: OrderedDict[int, tuple[NDArray[np.int64], Arrays, int]] = OrderedDict()
        self._index: dict[tuple[int, int], tuple[int, int]] = {}
        self._bytes = 0
        self._counter = 0
        self._expected = (-1, -1)
        self._span = 1
        self._lock = threading.Lock()

    def find(self, shard: int, row: int) -> tuple[Arrays, int]:
        """The arrays that hold a structure, and its row in them."""
        with self._lock:
            if (shard, row) not in self._index:
                self._fetch(self._wanted(shard, row))
            part, at = self._index[shard, row]
            return self._parts[part][1], at

    def _wanted(self, shard: int, row: int) -> NDArray[np.int64]:
        in_order = (shard, row) == self._expected
        self._span = min(2 * self._span, _LONGEST_READ_AHEAD) if in_order else 1
        stop = min(row + self._span, self._structures[shard])
        self._expected = (shard, stop) if stop < self._structures[shard] else (shard + 1, 0)
        rows = [k for k in range(row, stop) if (shard, k) not in self._index]
        return np.array([(shard, k) for k in rows], dtype=np.int64)

    def _fetch(self, places: NDArray[np.int64]) -> None:
        found = self._gather(places)
        arrays = {name: getattr(found, name) for name in (*PER_STRUCTURE_NAMES, *PER_ATOM_NAMES)}
        arrays["atom_offsets"] = np.concatenate([[0], np.cumsum(found.n_atoms)])
        size = sum(array.nbytes for array in arrays.values())
        while self._parts and self._bytes + size > _BUDGET:
            self._drop()
        self._counter += 1
        self._parts[self._counter] = (places, arrays, size)
        self._bytes += size
        for at, (shard, row) in enumerate(places.tolist()):
            self._index[shard, row] = (self._counter, at)

    def _drop(self) -> None:
        _, (places, _, size) = self._parts.popitem(last=False)
        self._bytes -= size
        for shard, row in places.tolist():
            del self._index[shard, row]
