"""What a storage of a store's arrays can do. Knows no labels, and no place where arrays may lie.

A store's arrays are cut into shards (`manifest.shards`), each with the flat arrays that `arrays` names. A
storage hands them out; `Store` puts structures together from them and cares not where they lie.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from equipot.train.structures import Structures

Arrays = Mapping[str, NDArray[Any]]
"""Flat arrays of some structures, by name: `atom_offsets` and per-structure and per-atom ones."""

CHUNK_STRUCTURES = 8192
CHUNK_ATOMS = 2**19
"""What `chunks` reads at once at most, some 32 MiB; a single larger structure is a chunk of its own."""
_GAP = 4096


class Storage(Protocol):
    """The arrays of a store, wherever they lie. Safe to use from several threads."""

    def check(self) -> None:
        """Raises DataError if something is missing or cut short. Reads no data."""

    def find(self, shard: int, row: int) -> tuple[Arrays, int]:
        """Arrays with a structure of a shard, at least those of `Structures`, and its row in them."""

    def gather(self, places: NDArray[np.int64]) -> Structures:
        """Structures (n, 2), each shard and row, ascending, n ≥ 1; copied."""

    def rows(self, shard: int, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop of one array of a shard; read-only."""

    def take(self, shard: int, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """These rows of one array of a shard, which must ascend; copied."""


def take_by_spans(storage: Storage, shard: int, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """`Storage.take` by reading spans of rows, for storages that can read nothing but spans."""
    if not len(rows):
        return storage.rows(shard, name, 0, 0)
    cuts = np.flatnonzero(np.diff(rows) > _GAP) + 1
    parts = [
        storage.rows(shard, name, int(part[0]), int(part[-1]) + 1)[part - part[0]]
        for part in np.split(rows, cuts)
    ]
    return np.concatenate(parts)


def chunks(storage: Storage, shard: int, structures: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Cuts a shard: yields start, stop and the atom offsets of these structures, (stop − start + 1,)."""
    start = 0
    while start < structures:
        stop = min(structures, start + CHUNK_STRUCTURES)
        offsets = np.asarray(storage.rows(shard, "atom_offsets", start, stop + 1))
        fit = int(np.searchsorted(offsets, offsets[0] + CHUNK_ATOMS, side="right")) - 1
        stop = start + max(1, min(stop - start, fit))
        yield start, stop, offsets[: stop - start + 1]
        start = stop
