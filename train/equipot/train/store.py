"""The packed store, read: flat arrays, one structure is one slice. `store_writer` writes it.

Where the arrays lie is a `storage.base.Storage`'s business; by default they are memory-mapped files.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipot.model.batch import System
from equipot.train.arrays import per_atom, per_structure
from equipot.train.errors import DataError
from equipot.train.manifest import Manifest
from equipot.train.storage.base import Arrays, Storage, chunks
from equipot.train.storage.memory_map import MemoryMap
from equipot.train.storage.opening import RAY, open_storage
from equipot.train.structures import Structures

N_ELEMENTS = 119
"""Atomic numbers 0 to 118."""
_GATHER_BLOCK = 65536


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Labels of one structure: energy in eV, forces (n_atoms, 3) in eV/Å, stress (3, 3) in eV/Å³ or None.

    What is absent is NaN (energy, forces) or None (stress).
    """

    energy: float
    forces: NDArray[np.float64]
    stress: NDArray[np.float64] | None


class Origin(NamedTuple):
    """Where a structure comes from: file name, and frame number in it."""

    file: str
    frame: int


class Store:
    """A packed store, read-only.

    Attributes:
        path: its folder, also of one that is served from elsewhere.
        manifest: what it says of itself.
    """

    def __init__(self, path: Path, manifest: Manifest, storage: Storage | None = None) -> None:
        """Use `open`; this takes the folder as it is, by default one of memory-mapped files."""
        self.path = path
        self.manifest = manifest
        self._address: str | Path = path
        self._storage = storage or MemoryMap(path, manifest)
        self._starts = [0]
        for entry in manifest.shards:
            self._starts.append(self._starts[-1] + entry.structures)
        self._first_rows = np.array(self._starts, dtype=np.int64)

    @staticmethod
    def open(address: str | Path) -> "Store":
        """Opens a store; reads its manifest and the size of its files, not the data.

        Args:
            address: folder of a store, an ADIOS2 file that `convert` wrote, or "ray:" and either of these.

        Raises:
            DataError: not a store, an unfinished one, of a newer version, or damaged.
        """
        store = Store(*open_storage(address))
        store._address = address
        return store

    def kept_in(self, memory: Literal["map", "ray"]) -> "Store":
        """This store, or the same one with its structures held by the nodes of a Ray cluster.

        Raises:
            DataError: ray is not installed, or no cluster runs here.
        """
        return self if memory == "map" else Store.open(f"{RAY}{self.path.resolve()}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the store for itself: maps and connections cannot be sent.
        return Store.open, (self._address,)

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"structure {index} of {self.path}, which holds {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _find(self, index: int) -> tuple[Arrays, int]:
        return self._storage.find(*self._place(int(index)))

    def _value(self, index: int, name: str) -> Any:  # noqa: ANN401 - a scalar of the array's type
        shard, row = self._place(int(index))
        return self._storage.rows(shard, name, row, row + 1)[0]

    def system(self, index: int) -> System:
        """Structure `index` (copied out of the map); its level of theory is 0."""
        arrays, i = self._find(index)
        start, stop = arrays["atom_offsets"][i : i + 2]
        return System(
            atomic_numbers=arrays["atomic_numbers"][start:stop].astype(np.int64),
            positions=np.array(arrays["positions"][start:stop]),
            cell=np.array(arrays["cell"][i]),
            pbc=np.array(arrays["pbc"][i]),
            charge=int(arrays["charge"][i]),
            spin_multiplicity=int(arrays["spin_multiplicity"][i]),
            level_of_theory=0,
        )

    def labels(self, index: int) -> Labels:
        """Labels of structure `index`."""
        arrays, i = self._find(index)
        start, stop = arrays["atom_offsets"][i : i + 2]
        stress = np.array(arrays["stress"][i])
        return Labels(
            energy=float(arrays["energy"][i]),
            forces=np.array(arrays["forces"][start:stop]),
            stress=None if np.isnan(stress).any() else stress,
        )

    def read(self, indices: ArrayLike) -> Structures:
        """Many structures with their labels at once, at least one, in the order given; copied.

        The quickest way to get many: served from other nodes, a thousand take as many round trips as one.

        Raises:
            DataError: the offsets of a structure's atoms make no sense.
        """
        wanted = np.asarray(indices, dtype=np.int64).ravel()
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        if len(wanted) and not 0 <= ascending[0] <= ascending[-1] < len(self):
            raise IndexError(f"structures {ascending[0]} to {ascending[-1]} of {len(self)} in {self.path}")
        places = np.empty((len(wanted), 2), dtype=np.int64)
        places[:, 0] = self._first_rows.searchsorted(ascending, side="right") - 1
        places[:, 1] = ascending - self._first_rows[places[:, 0]]
        found = self._storage.gather(places)
        return found if (order[:-1] <= order[1:]).all() else found.take(np.argsort(order))

    def origin(self, index: int) -> Origin:
        """File and frame that structure `index` was read from."""
        source = self.manifest.sources[int(self._value(index, "source"))]
        return Origin(source.file, int(self._value(index, "frame")))

    def name(self, index: int) -> str:
        """The source's own identifier of structure `index`, "" if it has none."""
        if "name" not in self.manifest.columns:
            return ""
        return bytes(self._value(index, "name")).decode("utf-8", "replace")

    def extra(self, index: int, name: str) -> NDArray[Any] | None:
        """A further per-atom array (n_atoms,) of structure `index`, as tags; None if the store has none."""
        if name not in self.manifest.columns:
            return None
        shard, row = self._place(int(index))
        start, stop = self._storage.rows(shard, "atom_offsets", row, row + 2)
        return np.array(self._storage.rows(shard, name, int(start), int(stop)))

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """One per-structure array, shard by shard."""
        for k, entry in enumerate(self.manifest.shards):
            yield self._storage.rows(k, name, 0, entry.structures)

    def column(self, name: str) -> NDArray[Any]:
        """One per-structure array over all shards, (n_structures, …), copied into memory."""
        parts = list(self.blocks(name))
        field = per_structure(self.manifest.columns)[name]
        return np.concatenate(parts) if parts else np.empty((0, *field.row), field.dtype)

    def chunks(self) -> Iterator[tuple[int, NDArray[np.int64], Arrays]]:
        """All arrays piece by piece in the store's order, some 32 MiB at a time.

        Yields:
            The shard, the structures' numbers of atoms (n,), and their arrays by name without atom_offsets.
        """
        columns = self.manifest.columns
        for k, entry in enumerate(self.manifest.shards):
            for start, stop, offsets in chunks(self._storage, k, entry.structures):
                first, last = int(offsets[0]), int(offsets[-1])
                arrays = {name: self._storage.rows(k, name, start, stop) for name in per_structure(columns)}
                for name in per_atom(columns):
                    arrays[name] = self._storage.rows(k, name, first, last)
                yield k, np.diff(offsets), arrays

    def values(self, name: str, indices: ArrayLike) -> NDArray[Any]:
        """(len(indices), …) rows of one per-structure array, without reading the others."""
        wanted = np.asarray(indices, dtype=np.int64).ravel()
        field = per_structure(self.manifest.columns)[name]
        found = np.empty((len(wanted), *field.row), field.dtype)
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for k in np.unique(shard_of).tolist():
            rows = np.flatnonzero(shard_of == k)
            rows = rows[np.argsort(wanted[rows], kind="stable")]
            found[rows] = self._storage.take(k, name, wanted[rows] - self._starts[k])
        return found

    @cached_property
    def n_atoms(self) -> NDArray[np.int64]:
        """(n_structures,) number of atoms of each; kept in memory."""
        sizes = np.empty(len(self), np.int64)
        first = 0
        for block in self.size_blocks():
            sizes[first : first + len(block)] = block
            first += len(block)
        return sizes

    def size_blocks(self) -> Iterator[NDArray[np.int64]]:
        """Numbers of atoms of all structures, shard by shard."""
        for k, entry in enumerate(self.manifest.shards):
            yield np.diff(self._storage.rows(k, "atom_offsets", 0, entry.structures + 1)).astype(
                np.int64, copy=False
            )

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """(n_structures,) group of each: frames of one group never end up in different splits."""
        return self.column("group").astype(np.int64)

    @cached_property
    def energies(self) -> NDArray[np.float64]:
        """(n_structures,) total energy in eV, NaN where absent."""
        return self.column("energy").astype(np.float64)

    def element_counts(self, indices: ArrayLike) -> NDArray[np.float64]:
        """(len(indices), 119) how many atoms of each atomic number."""
        wanted = np.asarray(indices, dtype=np.int64).ravel()
        counts = np.zeros((len(wanted), N_ELEMENTS))
        for rows, numbers, owner in self._gather("atomic_numbers", wanted):
            flat = np.bincount(owner * N_ELEMENTS + numbers, minlength=len(rows) * N_ELEMENTS)
            counts[rows] = flat.reshape(len(rows), N_ELEMENTS)
        return counts

    def force_blocks(self, indices: ArrayLike) -> Iterator[NDArray[np.float64]]:
        """Forces (atoms, 3) in eV/Å of these structures, in blocks of bounded size, in no given order."""
        for _, forces, _ in self._gather("forces", np.asarray(indices, dtype=np.int64).ravel()):
            yield forces

    def _gather(
        self, name: str, wanted: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[Any], NDArray[np.int64]]]:
        """Yields (rows of `wanted`, their atoms' values, which of these rows each atom is of) by blocks."""
        order = np.argsort(wanted, kind="stable")
        if len(wanted) and (wanted[order[0]] < 0 or wanted[order[-1]] >= len(self)):
            raise IndexError(
                f"structures {wanted[order[0]]} to {wanted[order[-1]]} of {len(self)} in {self.path}"
            )
        bounds = np.searchsorted(wanted[order], self._starts)
        for k in range(len(self.manifest.shards)):
            of_shard = order[bounds[k] : bounds[k + 1]]
            for at in range(0, len(of_shard), _GATHER_BLOCK):
                rows = of_shard[at : at + _GATHER_BLOCK]
                local = wanted[rows] - self._starts[k]
                starts = self._storage.take(k, "atom_offsets", local)
                lengths = self._storage.take(k, "atom_offsets", local + 1) - starts
                owner = np.repeat(np.arange(len(rows)), lengths)
                before = np.cumsum(lengths) - lengths
                atoms = np.arange(len(owner)) + (starts - before)[owner]
                yield rows, self._storage.take(k, name, atoms), owner

    def verify(self) -> None:
        """Reads everything and compares with the manifest's checksum; DataError if a byte has changed."""
        chain, columns = b"", self.manifest.columns
        for _, counts, arrays in self.chunks():
            whole = [arrays[name] for name in chained(columns)]
            atoms = [arrays[name] for name in per_atom(columns)]
            ends = [0, *np.cumsum(counts).tolist()]
            for i, (begin, end) in enumerate(pairwise(ends)):
                chain = link(chain, [a[i : i + 1] for a in whole] + [a[begin:end] for a in atoms])
        if chain.hex() != self.manifest.chain:
            raise DataError(f"{self.path}: its content has changed since the import; import the data again")


def chained(columns: Sequence[str]) -> list[str]:
    """Per-structure arrays that the running checksum covers; a frame is the same frame in whatever file."""
    return [name for name in per_structure(columns) if name not in ("source", "frame", "fingerprint")]


def link(chain: bytes, arrays: Sequence[NDArray[Any]]) -> bytes:
    """The next link of the running checksum: SHA-256 of the one before and a structure's bytes.

    A chain, unlike one long hash, can be taken up again from 32 bytes after a kill, and does not depend on
    how the structures are cut into shards.
    """
    return hashlib.sha256(
        chain + b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    ).digest()
