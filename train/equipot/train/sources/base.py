"""What a reader hands to the importer. Knows nothing of files, of ASE, or of the store."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Reason(StrEnum):
    """Why a frame was left out."""

    UNREADABLE = "unreadable"
    NO_ATOMS = "no atoms"
    INVALID = "invalid structure"
    NON_FINITE_POSITIONS = "non-finite positions"
    CELL = "impossible cell"
    OVERLAP = "overlapping atoms"
    NO_LABEL = "no energy"
    NON_FINITE_LABEL = "non-finite label"
    WRONG_SHAPE = "wrong shape of a label"
    UNIT = "unit other than eV and Å"
    CHARGE_OR_SPIN = "invalid charge or spin"
    NO_GROUP = "group key absent"


@dataclass(frozen=True, slots=True)
class Note:
    """Something about a kept frame that its owner should know: `code` is counted, `detail` shown once."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One labelled structure, in eV and Å, float64.

    Attributes:
        index: number of the frame in its file, from 0, counting frames that are left out.
        atomic_numbers: (n_atoms,) int64.
        positions: (n_atoms, 3) in Å.
        cell: (3, 3) in Å, rows are lattice vectors; zeros when there is none.
        pbc: (3,) bool.
        energy: total energy in eV.
        forces: (n_atoms, 3) in eV/Å, or None.
        stress: (3, 3) in eV/Å³, positive in tension, or None.
        charge: total charge in e.
        spin_multiplicity: 2S+1, 0 when not stated.
        group: (key, value) of the trajectory or molecule that the file says the frame belongs to, or None.
        notes: what the reader decided on its own about this frame.
    """

    index: int
    atomic_numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    energy: float
    forces: NDArray[np.float64] | None
    stress: NDArray[np.float64] | None
    charge: int = 0
    spin_multiplicity: int = 0
    group: tuple[str, str] | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A frame that is left out, with the reason and the values that show it."""

    index: int
    reason: Reason
    detail: str


class FrameError(Exception):
    """Raised inside a reader for one bad frame; becomes a `Rejected`, never reaches the user."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How to read a file.

    Attributes:
        format: name of ASE's format; None to tell it from the file's name and first bytes.
        energy_key: the one key that holds the energy; None to try the known ones.
        forces_key: the same for forces.
        stress_key: the same for stress (a key whose name holds "virial" is read as a virial).
        energy_per_atom: the energies are per atom: multiply by the number of atoms.
        group_keys: keys, in order, that name a frame's trajectory or molecule.
    """

    format: str | None = None
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    energy_per_atom: bool = False
    group_keys: tuple[str, ...] = ()


class Reader(Protocol):
    """One open source file."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def format(self) -> str:
        """Name of the format the file is read as."""

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields frame `start` and those after it, in order, each index once."""

    def fraction(self) -> float | None:
        """Share of the file read so far, 0 to 1; None when the format does not tell."""
