"""The embedded default: every array of a shard is a .npy file, mapped on first use."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.arrays import OFFSETS, Field, array_bytes, map_rows, per_atom, per_structure
from equipot.train.errors import DataError
from equipot.train.manifest import Manifest, ShardEntry
from equipot.train.storage.base import Arrays
from equipot.train.structures import PER_ATOM_NAMES, PER_STRUCTURE_NAMES, Structures, flat_index

SHARDS = "shards"


class MemoryMap:
    """The arrays of a store's folder; a `Storage`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._shards = [
            _Shard(folder / SHARDS / entry.name, entry, manifest.columns) for entry in manifest.shards
        ]

    def check(self) -> None:
        """Compares the sizes of the files with the manifest."""
        for shard in self._shards:
            shard.check()

    def find(self, shard: int, row: int) -> tuple[Arrays, int]:
        """The shard's whole arrays: what is not touched is not read."""
        return self._shards[shard].arrays, row

    def gather(self, places: NDArray[np.int64]) -> Structures:
        """Copied out of the map."""
        if places[0, 0] == places[-1, 0]:
            return self._shards[int(places[0, 0])].gather(places[:, 1])
        # of a large store, most structures of a batch are alone in their shard: joining copies views once
        cuts = [0, *(np.flatnonzero(np.diff(places[:, 0])) + 1).tolist(), len(places)]
        shards = [self._shards[k] for k in places[cuts[:-1], 0].tolist()]
        return Structures.joined(
            [
                shard.view(int(places[start, 1]))
                if stop == start + 1
                else shard.gather(places[start:stop, 1])
                for shard, (start, stop) in zip(shards, pairwise(cuts), strict=True)
            ]
        )

    def rows(self, shard: int, name: str, start: int, stop: int) -> NDArray[Any]:
        """A view of the map."""
        return self._shards[shard].arrays[name][start:stop]

    def take(self, shard: int, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Copied out of the map."""
        taken: NDArray[Any] = self._shards[shard].arrays[name][rows]
        return taken


class _Shard:
    """The arrays of one folder, mapped on first use."""

    def __init__(self, folder: Path, entry: ShardEntry, columns: Sequence[str]) -> None:
        self.folder = folder
        self.entry = entry
        self._columns = columns

    def files(self) -> Iterator[tuple[str, Field, int]]:
        yield "atom_offsets", OFFSETS, self.entry.structures + 1
        for name, field in per_structure(self._columns).items():
            yield name, field, self.entry.structures
        for name, field in per_atom(self._columns).items():
            yield name, field, self.entry.atoms

    def check(self) -> None:
        for name, field, rows in self.files():
            path = self.folder / f"{name}.npy"
            size = path.stat().st_size if path.exists() else 0
            if size < array_bytes(field, rows):
                what = "is missing" if not size else f"is cut short ({size} bytes)"
                raise DataError(f"{path}: {what}, the store is damaged; import the data again")

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        found = {}
        for name, _, rows in self.files():
            path = self.folder / f"{name}.npy"
            try:
                found[name] = map_rows(path, rows)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: {error}; the store is damaged, import the data again") from None
        return found

    def gather(self, rows: NDArray[np.int64]) -> Structures:
        arrays = self.arrays
        starts = arrays["atom_offsets"][rows]
        lengths = arrays["atom_offsets"][rows + 1] - starts
        bad = (starts < 0) | (lengths < 1) | (starts + lengths > self.entry.atoms)
        if bad.any():
            raise self._damaged(int(rows[bad][0]))
        atoms = flat_index(starts, lengths)
        # `take` copies a row in half the time of an index array in brackets
        values = {name: arrays[name].take(rows, axis=0) for name in PER_STRUCTURE_NAMES}
        values |= {name: arrays[name].take(atoms, axis=0) for name in PER_ATOM_NAMES}
        return Structures(n_atoms=lengths, **values)

    def view(self, row: int) -> Structures:
        arrays = self.arrays
        start, stop = arrays["atom_offsets"][row : row + 2].tolist()
        if not 0 <= start < stop <= self.entry.atoms:
            raise self._damaged(row)
        values = {name: arrays[name][row : row + 1] for name in PER_STRUCTURE_NAMES}
        values |= {name: arrays[name][start:stop] for name in PER_ATOM_NAMES}
        return Structures(n_atoms=np.array([stop - start]), **values)

    def _damaged(self, row: int) -> DataError:
        return DataError(
            f"{self.folder}: the atoms of its structure {row} cannot be found, the store is damaged; "
            "import the data again"
        )
