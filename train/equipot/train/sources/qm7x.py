"""QM7-X: `1000.hdf5` to `8000.hdf5`, a group per molecule and in it a group per geometry, in eV and Å.

Hoja et al., Sci. Data 8, 43 (2021), doi:10.1038/s41597-021-00812-2. ePBE0 goes with pbe0FOR, ePBE0+MBD with
totFOR. The geometries of a molecule ("Geom-m1-i1-c1-opt", and -1 to -100 displaced from it) stay together in
a split. The release lists conformers that are in it twice in DupMols.dat; they are left out if that file lies
beside the HDF5 file or one folder above.
"""

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.sources.base import (
    Frame,
    FrameError,
    Note,
    ReadOptions,
    Reason,
    Rejected,
    Source,
)
from equipot.train.sources.hdf5_file import HDF5_ERRORS, array_of, group_of, open_hdf5
from equipot.train.sources.labelled import labelled_frame

DUPLICATES = "DupMols.dat"
_NUMBERS, _POSITIONS = "atNUM", "atXYZ"


@dataclass(frozen=True, slots=True)
class _Level:
    """What a level is called, and its data sets; the parts are added up where the sum itself is not there."""

    text: str
    energy: str
    energy_parts: tuple[str, ...]
    forces: str
    forces_parts: tuple[str, ...]


LEVELS: Mapping[str, _Level] = {
    "pbe0+mbd": _Level(
        "PBE0+MBD/tight (FHI-aims)", "ePBE0+MBD", ("ePBE0", "eMBD"), "totFOR", ("pbe0FOR", "vdwFOR")
    ),
    "pbe0": _Level("PBE0/tight (FHI-aims)", "ePBE0", ("ePBE0",), "pbe0FOR", ("pbe0FOR",)),
}


class Qm7x:
    """One file as a `Reader`."""

    format = "qm7x"

    def __init__(self, path: Path, level: str) -> None:
        self._path = path
        self._level = LEVELS[level]
        self._done = 0.0
        self._duplicates = _read_duplicates(path)
        there = _first_keys(path)
        if not _has(there, self._level):
            words = [name for name, known in LEVELS.items() if _has(there, known)]
            raise DataError(
                f"{path}: holds no {self._level.energy} for --level {level}; "
                f"there are {', '.join(words) or ', '.join(sorted(there))}"
            )

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def count(self) -> int | None:
        """Number of geometries; a molecule that cannot be read counts as one."""
        return self._starts[-1]

    def fraction(self) -> float | None:
        """Share of the molecules read so far."""
        return self._done

    @cached_property
    def _starts(self) -> list[int]:
        """Number in the file of each molecule's first geometry, and at last of all."""
        with open_hdf5(self._path) as file:
            return [0, *accumulate(_count_geometries(file, molecule) for molecule in file)]

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields geometry `start` and those after it, molecule by molecule."""
        with open_hdf5(self._path) as file:
            molecules = list(file)
            for k in range(bisect.bisect_right(self._starts, start) - 1, len(molecules)):
                molecule, index = molecules[k], self._starts[k]
                self._done = k / len(molecules)
                try:
                    geometries = list(group_of(file, molecule))
                except (FrameError, *HDF5_ERRORS) as error:
                    if index >= start:
                        yield Rejected(index, Reason.UNREADABLE, f"{molecule}: {error}; it is lost"[:200])
                    continue
                for index, geometry in enumerate(geometries, self._starts[k]):
                    if index >= start:
                        yield self._frame(file, molecule, geometry, index)
            self._done = 1.0

    def _frame(self, file: h5py.File, molecule: str, geometry: str, index: int) -> Frame | Rejected:
        name = f"{molecule}/{geometry}"
        conformer = geometry.rpartition("-")[0]
        if self._duplicates is not None and conformer in self._duplicates:
            return Rejected(index, Reason.DUPLICATE, f"{name}: {conformer} is listed in {DUPLICATES}")
        notes = []
        if self._duplicates is None:
            notes.append(Note(f"duplicates: no {DUPLICATES} beside the file, none is left out", name))
        try:
            group = group_of(group_of(file, molecule), geometry)
            return labelled_frame(
                index,
                atomic_numbers=array_of(group, _NUMBERS),
                positions=array_of(group, _POSITIONS),
                energy=_sum(group, self._level.energy, self._level.energy_parts),
                forces=_sum(group, self._level.forces, self._level.forces_parts),
                group=("molecule", f"qm7x {molecule}"),
                name=name,
                notes=notes,
            )
        except FrameError as error:
            return Rejected(index, error.reason, f"{name}: {error.detail}")
        except HDF5_ERRORS as error:
            return Rejected(index, Reason.UNREADABLE, f"{name}: {error}"[:200])


def _count_geometries(file: h5py.File, molecule: str) -> int:
    try:
        return len(group_of(file, molecule))
    except (FrameError, *HDF5_ERRORS):
        return 1


def _sum(group: h5py.Group, whole: str, parts: tuple[str, ...]) -> NDArray[np.float64]:
    names = (whole,) if whole in group else parts
    arrays = [array_of(group, name) for name in names]
    return np.asarray(sum(arrays[1:], arrays[0]))


def _has(keys: set[str], level: _Level) -> bool:
    return level.energy in keys or set(level.energy_parts) <= keys


def _first_keys(path: Path) -> set[str]:
    """Names of the first molecule's data sets, over all its geometries; DataError if laid out otherwise."""
    with open_hdf5(path) as file:
        try:
            for molecule in file:
                keys: set[str] = set()
                for geometry in group_of(file, molecule):
                    if isinstance(file[molecule].get(geometry, getlink=True), h5py.HardLink):
                        keys |= set(group_of(file[molecule], geometry))
                if {_NUMBERS, _POSITIONS} <= keys:
                    return keys
                break
        except FrameError:
            pass
        except HDF5_ERRORS as error:
            raise DataError(f"{path}: damaged ({error}); get it again") from None
    raise DataError(
        f"{path}: is not laid out as QM7-X (molecule, geometry, and there {_NUMBERS} and {_POSITIONS}); "
        "give another file, or import it by its own format"
    )


def _read_duplicates(path: Path) -> frozenset[str] | None:
    for folder in (path.parent, path.parent.parent):
        listed = folder / DUPLICATES
        if listed.is_file():
            words = listed.read_text(encoding="utf-8", errors="replace").split()
            return frozenset(word.removesuffix("-opt") for word in words)
    return None


def default_level(path: Path) -> str:
    """PBE0+MBD, the release's own level; plain PBE0 for a file that holds only that."""
    there = _first_keys(path)
    return next((name for name, level in LEVELS.items() if _has(there, level)), next(iter(LEVELS)))


def open_qm7x(path: Path, options: ReadOptions) -> Qm7x:
    """Opens a file of the release. DataError if it is not one, or lacks the level."""
    return Qm7x(path, options.level or default_level(path))


SOURCE = Source(
    name="qm7x",
    open=open_qm7x,
    levels={name: level.text for name, level in LEVELS.items()},
    licence="CC-BY-4.0",
    files=("*.hdf5", "*.h5"),
    default_level=default_level,
)
