"""What a reader hands to the importer, and the first look at its file. Knows nothing of ASE or the store."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from equipot.train.errors import DataError


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
    DUPLICATE = "duplicate"
    LARGE_FORCE = "force over the limit"
    NO_COMPANION = "not in the companion file"
    OTHER_LEVEL = "another level of theory"
    REFUSED = "refused: not plain data"


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
        name: the source's own identifier of the frame, or "".
        extras: further per-atom arrays by name, those of `EXTRAS` that the source has.
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
    name: str = ""
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)


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
        level: which of a release's labels to take, one of `Source.levels`; None for the default.
        energy_unit: unit of the energies (and of the forces, per Å) where a file does not state it.
    """

    format: str | None = None
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    energy_per_atom: bool = False
    group_keys: tuple[str, ...] = ()
    level: str | None = None
    energy_unit: str | None = None


EXTRAS: Mapping[str, str] = {"tags": "|i1", "fixed": "|b1", "magmoms": "<f4"}
"""Per-atom arrays that a source may have beside positions and forces, and their types in the store.

tags: 0 below the surface, 1 surface, 2 adsorbate (OC20, OC22). fixed: held in place in a relaxation; such
atoms carry forces that no relaxation removed. magmoms: magnetic moment in μB.
"""


class Reader(Protocol):
    """One open source file."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def format(self) -> str:
        """Name of the format the file is read as."""

    @property
    def count(self) -> int | None:
        """Number of frames if `frames` gets to any of them at little cost, so that several processes may read
        the file; None if it has to be read from the beginning."""

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields frame `start` and those after it, in order, each index once."""

    def fraction(self) -> float | None:
        """Share of the file read so far, 0 to 1; None when the format does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One release or container that can be imported by name.

    Attributes:
        name: the word on the command line.
        open: opens one file; DataError if it is not of this source.
        levels: word of `--level` → level of theory as the store states it; the first is the default.
            Empty for a container, which can hold anything.
        licence: of the release; empty for a container.
        files: patterns that find its files in a folder.
        extras: those of `EXTRAS` that its frames have.
        default_level: the level to take for a file if none is asked for, where that depends on the file.
    """

    name: str
    open: Callable[[Path, ReadOptions], Reader]
    levels: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    files: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    default_level: Callable[[Path], str] | None = None


def require_file(path: Path) -> None:
    """Raises DataError if there is no such file, or if it is a folder."""
    if not path.is_file():
        raise DataError(f"{path}: not a file" if path.exists() else f"{path}: no such file")
