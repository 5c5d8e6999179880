"""ANI-1x and ANI-1ccx: `ani1x-release.h5`, one HDF5 group per molecular formula, in Hartree.

Smith et al., Sci. Data 7, 134 (2020), doi:10.1038/s41597-020-0473-z. A conformation that was not computed at
a level holds NaN there. A formula has many isomers and each has many conformations; the file does not say
which is which, so the formula is what stays together in a split.
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
from equipot.train.sources.hdf5_file import HDF5_ERRORS, array_of, group_of, open_hdf5, rows_of
from equipot.train.sources.labelled import labelled_frame

HARTREE = 27.211386245988
"""eV, CODATA 2018."""
_BLOCK = 1024
_NUMBERS, _POSITIONS = "atomic_numbers", "coordinates"


@dataclass(frozen=True, slots=True)
class _Level:
    """What a level is called, the data sets whose sum is its energy, and that of its forces."""

    text: str
    energies: tuple[str, ...]
    forces: str | None = None


def _correlated(text: str, name: str, basis: str) -> _Level:
    return _Level(f"{text}/cc-pV{basis[0].upper()}Z", (f"hf_{basis}.energy", f"{name}_{basis}.corr_energy"))


LEVELS: Mapping[str, _Level] = {
    "wb97x_dz": _Level("ωB97X/6-31G(d)", ("wb97x_dz.energy",), "wb97x_dz.forces"),
    "wb97x_tz": _Level("ωB97X/def2-TZVPP", ("wb97x_tz.energy",), "wb97x_tz.forces"),
    "ccsd(t)_cbs": _Level("CCSD(T)*/CBS", ("ccsd(t)_cbs.energy",)),
    **{
        f"hf_{basis}": _Level(f"HF/cc-pV{basis[0].upper()}Z", (f"hf_{basis}.energy",))
        for basis in ("dz", "tz", "qz")
    },
    **{f"mp2_{basis}": _correlated("MP2", "mp2", basis) for basis in ("dz", "tz", "qz")},
    "npno_ccsd(t)_dz": _correlated("NPNO-CCSD(T)", "npno_ccsd(t)", "dz"),
    "npno_ccsd(t)_tz": _correlated("NPNO-CCSD(T)", "npno_ccsd(t)", "tz"),
    "tpno_ccsd(t)_dz": _correlated("TightPNO-CCSD(T)", "tpno_ccsd(t)", "dz"),
}


@dataclass(frozen=True, slots=True, eq=False)
class _Formula:
    """One group of the file, its large arrays not read yet."""

    name: str
    group: h5py.Group
    numbers: NDArray[np.float64]
    positions: h5py.Dataset

    @property
    def count(self) -> int:
        return int(self.positions.shape[0])


def _open_formula(file: h5py.File, name: str, index: int) -> _Formula | Rejected:
    """The formula, or why all of it is left out, as frame `index`."""
    try:
        group = group_of(file, name)
        numbers, positions = array_of(group, _NUMBERS), rows_of(group, _POSITIONS)
        if positions.ndim != 3 or positions.shape[1:] != (numbers.size, 3):
            raise FrameError(
                Reason.INVALID, f"{_POSITIONS} has shape {positions.shape} for {numbers.size} {_NUMBERS}"
            )
        return _Formula(name, group, numbers, positions)
    except FrameError as error:
        return Rejected(index, error.reason, f"{name}: {error.detail}; the formula is left out")
    except HDF5_ERRORS as error:
        return Rejected(index, Reason.UNREADABLE, f"{name}: {error}; the formula is lost"[:200])


class Ani1x:
    """One file as a `Reader`."""

    format = "ani1x"

    def __init__(self, path: Path, level: str) -> None:
        self._path = path
        self._level = LEVELS[level]
        self._name = level
        self._done = 0.0
        self._check_start()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def count(self) -> int | None:
        """Number of conformations; a formula that cannot be read counts as one."""
        return self._starts[-1]

    def fraction(self) -> float | None:
        """Share of the formulas read so far."""
        return self._done

    @cached_property
    def _starts(self) -> list[int]:
        """Number in the file of each formula's first conformation, and at last of all."""
        with open_hdf5(self._path) as file:
            opened = (_open_formula(file, name, 0) for name in file)
            counts = [1 if isinstance(each, Rejected) else each.count for each in opened]
        return [0, *accumulate(counts)]

    def _check_start(self) -> None:
        with open_hdf5(self._path) as file:
            try:
                first = next(iter(file), None)
                group = group_of(file, first) if first is not None else {}
            except FrameError:
                group = {}
            except HDF5_ERRORS as error:
                raise DataError(f"{self._path}: damaged ({error}); get it again") from None
            if not {_NUMBERS, _POSITIONS} <= set(group):
                raise DataError(
                    f"{self._path}: is not laid out as ani1x-release.h5 (groups that hold {_NUMBERS} and "
                    f"{_POSITIONS}); give another file, or import it by its own format"
                )
            missing = [name for name in self._level.energies if name not in group]
            if missing:
                there = [name for name, level in LEVELS.items() if set(level.energies) <= set(group)]
                raise DataError(
                    f"{self._path}: holds no {missing[0]} for --level {self._name}; "
                    f"there are {', '.join(there)}"
                )

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields conformation `start` and those after it, formula by formula."""
        with open_hdf5(self._path) as file:
            formulas = list(file)
            for k in range(bisect.bisect_right(self._starts, start) - 1, len(formulas)):
                first = self._starts[k]
                self._done = k / len(formulas)
                opened = _open_formula(file, formulas[k], first)
                if isinstance(opened, Rejected):
                    if first >= start:
                        yield opened
                    continue
                for at in range(max(0, start - first) // _BLOCK * _BLOCK, opened.count, _BLOCK):
                    for item in self._block(opened, at, min(at + _BLOCK, opened.count), first):
                        if item.index >= start:
                            yield item
            self._done = 1.0

    def _block(self, formula: _Formula, at: int, stop: int, first: int) -> Iterator[Frame | Rejected]:
        """Conformations `at` to `stop` of a formula whose first has number `first` in the file."""
        try:
            coordinates = formula.positions[at:stop]
            parts = [rows_of(formula.group, name) for name in self._level.energies]
            if any(part.shape != (formula.count,) for part in parts):
                raise FrameError(Reason.WRONG_SHAPE, f"{self._level.energies[0]} has shape {parts[0].shape}")
            energies = np.zeros(stop - at)
            for part in parts:
                energies += HARTREE * np.asarray(part[at:stop], dtype=np.float64)
            forces = self._forces(formula, at, stop)
        except (FrameError, *HDF5_ERRORS) as error:
            reason = error.reason if isinstance(error, FrameError) else Reason.UNREADABLE
            for row in range(at, stop):
                yield Rejected(first + row, reason, f"{formula.name}: {error}"[:200])
            return
        for row in range(stop - at):
            index = first + at + row
            name = f"{formula.name}/{at + row}"
            try:
                if np.isnan(energies[row]):
                    what = self._level.energies[0]
                    raise FrameError(Reason.NON_FINITE_LABEL, f"{name}: {what} is NaN, not computed")
                notes: tuple[Note, ...] = ()
                label = None if forces is None else forces[row]
                if label is not None and np.isnan(label).all():
                    label = None
                    notes = (Note("forces: NaN, not computed at this level", name),)
                yield labelled_frame(
                    index,
                    atomic_numbers=formula.numbers,
                    positions=coordinates[row],
                    energy=energies[row],
                    forces=label,
                    group=("formula", formula.name),
                    name=name,
                    notes=notes,
                )
            except FrameError as error:
                yield Rejected(index, error.reason, error.detail)

    def _forces(self, formula: _Formula, at: int, stop: int) -> NDArray[np.float64] | None:
        name = self._level.forces
        if name is None or name not in formula.group:
            return None
        forces = rows_of(formula.group, name)
        if forces.shape != formula.positions.shape:
            raise FrameError(
                Reason.WRONG_SHAPE, f"{name} has shape {forces.shape}, not {formula.positions.shape}"
            )
        return np.asarray(forces[at:stop], dtype=np.float64) * HARTREE


def open_ani1x(path: Path, options: ReadOptions) -> Ani1x:
    """Opens a file of the release. DataError if it is not one, or lacks the level."""
    return Ani1x(path, options.level or next(iter(LEVELS)))


SOURCE = Source(
    name="ani1x",
    open=open_ani1x,
    levels={name: level.text for name, level in LEVELS.items()},
    licence="CC0-1.0",
    files=("*.h5", "*.hdf5"),
)
