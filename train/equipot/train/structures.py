"""Many structures and their labels as flat arrays, as a store holds them. Knows no files and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Structures:
    """S structures of N atoms in all, one behind the other; what is absent is NaN."""

    n_atoms: NDArray[np.int64]
    """(S,)"""
    cell: NDArray[np.float64]
    """(S, 3, 3) Å, rows are lattice vectors"""
    pbc: NDArray[np.bool_]
    """(S, 3)"""
    charge: NDArray[np.int32]
    """(S,) e"""
    spin_multiplicity: NDArray[np.int32]
    """(S,) 0 where not stated"""
    energy: NDArray[np.float64]
    """(S,) eV"""
    stress: NDArray[np.float64]
    """(S, 3, 3) eV/Å³"""
    atomic_numbers: NDArray[np.uint8]
    """(N,)"""
    positions: NDArray[np.float64]
    """(N, 3) Å"""
    forces: NDArray[np.float64]
    """(N, 3) eV/Å"""

    def __len__(self) -> int:
        return len(self.n_atoms)

    @property
    def first_atoms(self) -> NDArray[np.int64]:
        """(S,) where each structure's atoms begin."""
        first: NDArray[np.int64] = np.cumsum(self.n_atoms) - self.n_atoms
        return first

    def take(self, rows: NDArray[np.int64]) -> Structures:
        """These structures, in this order."""
        atoms = flat_index(self.first_atoms[rows], self.n_atoms[rows])
        values: dict[str, NDArray[Any]] = {
            name: getattr(self, name).take(atoms if name in PER_ATOM_NAMES else rows, axis=0)
            for name in NAMES
        }
        return Structures(**values)

    @staticmethod
    def joined(parts: Sequence[Structures]) -> Structures:
        """All structures of all parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        return Structures(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in NAMES})


NAMES = tuple(field.name for field in fields(Structures))
PER_ATOM_NAMES = ("atomic_numbers", "positions", "forces")
PER_STRUCTURE_NAMES = ("cell", "pbc", "charge", "spin_multiplicity", "energy", "stress")


def flat_index(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers starts[k], …, starts[k] + lengths[k] − 1 of every k, one after the other."""
    before = np.cumsum(lengths) - lengths
    index: NDArray[np.int64] = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return index
