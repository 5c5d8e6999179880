"""The packed store, read: memory-mapped flat arrays, one structure is one slice. `store_writer` writes it."""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipot.model.batch import System
from equipot.train.arrays import OFFSETS, Field, array_bytes, map_rows, per_atom, per_structure
from equipot.train.errors import DataError
from equipot.train.manifest import Manifest, ShardEntry, read_json
from equipot.train.structures import PER_ATOM_NAMES, PER_STRUCTURE_NAMES, Structures, flat_index

MANIFEST = "manifest.json"
JOURNAL = "journal.json"
SHARDS = "shards"
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


class Store:
    """A packed store, read-only.

    Attributes:
        path: its folder.
        manifest: what it says of itself.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = [
            _Shard(path / SHARDS / entry.name, entry, manifest.columns) for entry in manifest.shards
        ]
        self._starts = [0]
        for entry in manifest.shards:
            self._starts.append(self._starts[-1] + entry.structures)

    @staticmethod
    def open(path: str | Path) -> "Store":
        """Opens a store; reads its manifest and the size of its files, not the data.

        Raises:
            DataError: not a store, an unfinished one, of a newer version, or damaged.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such store; make one with: equipot data import FILE… --out {folder}"
            )
        if not (folder / MANIFEST).exists():
            if (folder / JOURNAL).exists():
                raise DataError(f"{folder}: its import is not finished; run the same import command again")
            raise DataError(f"{folder}: is not an equipot store (no {MANIFEST})")
        manifest = Manifest.from_json(read_json(folder / MANIFEST), folder / MANIFEST)
        store = Store(folder, manifest)
        if store._starts[-1] != manifest.structures:
            raise DataError(f"{folder / MANIFEST}: damaged, its shards do not add up; import the data again")
        for shard in store._shards:
            shard.check()
        return store

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, index: int) -> tuple[dict[str, NDArray[Any]], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"structure {index} of {self.path}, which holds {len(self)}")
        k = bisect.bisect_right(self._starts, index) - 1
        return self._shards[k].arrays, index - self._starts[k]

    def system(self, index: int) -> System:
        """Structure `index` (copied out of the map); its level of theory is 0."""
        arrays, i = self._locate(int(index))
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
        arrays, i = self._locate(int(index))
        start, stop = arrays["atom_offsets"][i : i + 2]
        stress = np.array(arrays["stress"][i])
        return Labels(
            energy=float(arrays["energy"][i]),
            forces=np.array(arrays["forces"][start:stop]),
            stress=None if np.isnan(stress).any() else stress,
        )

    def read(self, indices: ArrayLike) -> Structures:
        """Many structures with their labels at once, in the order given, copied out of the map.

        Raises:
            DataError: the offsets of a structure's atoms make no sense.
        """
        wanted = np.asarray(indices, dtype=np.int64).ravel()
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        if len(wanted) and not 0 <= ascending[0] <= ascending[-1] < len(self):
            raise IndexError(f"structures {ascending[0]} to {ascending[-1]} of {len(self)} in {self.path}")
        bounds = np.searchsorted(ascending, self._starts)
        parts = [
            self._read_shard(k, ascending[bounds[k] : bounds[k + 1]])
            for k in np.flatnonzero(np.diff(bounds)).tolist()
        ]
        found = Structures.joined(parts)
        return found if (order[:-1] <= order[1:]).all() else found.take(np.argsort(order))

    def _read_shard(self, k: int, wanted: NDArray[np.int64]) -> Structures:
        # plain arrays: indexing numpy's memmap class costs microseconds more
        arrays = {name: np.asarray(array) for name, array in self._shards[k].arrays.items()}
        local = wanted - self._starts[k]
        starts = arrays["atom_offsets"][local]
        lengths = arrays["atom_offsets"][local + 1] - starts
        bad = (starts < 0) | (lengths < 1) | (starts + lengths > self._shards[k].entry.atoms)
        if bad.any():
            raise DataError(
                f"{self.path}[{wanted[bad][0]}]: its atoms cannot be found, the store is damaged; "
                "import the data again"
            )
        atoms = flat_index(starts, lengths)
        values = {name: arrays[name][local] for name in PER_STRUCTURE_NAMES}
        values |= {name: arrays[name][atoms] for name in PER_ATOM_NAMES}
        return Structures(n_atoms=lengths, **values)

    def origin(self, index: int) -> Origin:
        """File and frame that structure `index` was read from."""
        arrays, i = self._locate(int(index))
        return Origin(self.manifest.sources[int(arrays["source"][i])].file, int(arrays["frame"][i]))

    def name(self, index: int) -> str:
        """The source's own identifier of structure `index`, "" if it has none."""
        arrays, i = self._locate(int(index))
        return bytes(arrays["name"][i]).decode("utf-8", "replace") if "name" in arrays else ""

    def extra(self, index: int, name: str) -> NDArray[Any] | None:
        """A further per-atom array (n_atoms,) of structure `index`, as tags; None if the store has none."""
        if name not in self.manifest.columns:
            return None
        arrays, i = self._locate(int(index))
        start, stop = arrays["atom_offsets"][i : i + 2]
        return np.array(arrays[name][start:stop])

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """One per-structure array, shard by shard."""
        for shard in self._shards:
            yield shard.arrays[name]

    def column(self, name: str) -> NDArray[Any]:
        """One per-structure array over all shards, (n_structures, …), copied into memory."""
        parts = [shard.arrays[name] for shard in self._shards]
        field = per_structure(self.manifest.columns)[name]
        return np.concatenate(parts) if parts else np.empty((0, *field.row), field.dtype)

    @cached_property
    def n_atoms(self) -> NDArray[np.int64]:
        """(n_structures,) number of atoms of each."""
        parts = [np.diff(shard.arrays["atom_offsets"]) for shard in self._shards]
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

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
        for k, shard in enumerate(self._shards):
            of_shard = order[bounds[k] : bounds[k + 1]]
            for at in range(0, len(of_shard), _GATHER_BLOCK):
                rows = of_shard[at : at + _GATHER_BLOCK]
                local = wanted[rows] - self._starts[k]
                offsets = shard.arrays["atom_offsets"]
                starts, lengths = offsets[local], offsets[local + 1] - offsets[local]
                owner = np.repeat(np.arange(len(rows)), lengths)
                before = np.cumsum(lengths) - lengths
                atoms = np.arange(len(owner)) + (starts - before)[owner]
                yield rows, shard.arrays[name][atoms], owner

    def verify(self) -> None:
        """Reads everything and compares with the manifest's checksum; DataError if a byte has changed."""
        chain, columns = b"", self.manifest.columns
        for shard in self._shards:
            a = shard.arrays
            for i in range(shard.entry.structures):
                start, stop = a["atom_offsets"][i : i + 2]
                parts = [a[name][i : i + 1] for name in chained(columns)]
                parts += [a[name][start:stop] for name in per_atom(columns)]
                chain = link(chain, [np.asarray(part) for part in parts])
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
