"""Trajectories of one molecule or cell as .npz, as MD17, rMD17 and sGDML ship them; streamed row by row.

Nothing is unpickled. The unit of energy is taken from the file (`e_unit`), else from the option, else from
the energies themselves: total energies of all electrons are known well enough from the atomic numbers alone
to tell eV from kcal/mol, Hartree and kJ/mol, which differ by factors of three and more. If they fit none, the
unit has to be named.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.sources.ani1x import HARTREE
from equipot.train.sources.base import (
    Frame,
    FrameError,
    Note,
    ReadOptions,
    Reason,
    Rejected,
    Source,
    require_file,
)
from equipot.train.sources.labelled import ISOLATED, NO_CELL, PERIODIC, labelled_frame

KJ_PER_MOL = 1.0 / 96.48533212331
"""eV, CODATA 2018 (e · N_A / 1000)."""
UNITS = {"eV": 1.0, "kcal/mol": 4.184 * KJ_PER_MOL, "kJ/mol": KJ_PER_MOL, "Hartree": HARTREE, "meV": 1e-3}
_SPELLINGS = {
    "ev": "eV",
    "kcal/mol": "kcal/mol",
    "kcal": "kcal/mol",
    "kj/mol": "kJ/mol",
    "hartree": "Hartree",
}
_SPELLINGS |= {"ha": "Hartree", "eh": "Hartree", "mev": "meV"}
_ANGSTROM = ("ang", "angstrom", "a", "å", "aa")
_POSITIONS = ("R", "coords", "pos", "positions", "coordinates")
_ENERGIES = ("E", "energies", "energy")
_FORCES = ("F", "forces", "force")
_NUMBERS = ("z", "nuclear_charges", "atomic_numbers", "numbers", "Z")
_SMALL = 2**20


class _Rows:
    """One member of the archive, read row by row."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._stream: IO[bytes] = archive.open(name + ".npy")
        version = np.lib.format.read_magic(self._stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(self._stream)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(self._stream)
        else:
            raise ValueError(f"{name} is of .npy version {version}")
        if dtype.hasobject or dtype.kind not in "biufSU":
            raise ValueError(f"{name} holds Python objects, which are pickled; they are not read")
        if fortran and len(shape) > 1:
            raise ValueError(f"{name} is stored column by column; save it again in C order")
        self.shape, self.dtype = shape, dtype

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def next(self) -> NDArray[Any]:
        """The next row. EOFError if the member ends."""
        return self._read(self.shape[1:])

    def skip(self, rows: int) -> None:
        """Passes over rows. EOFError if the member ends."""
        left = rows * int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        while left:
            piece = len(self._stream.read(min(left, _SMALL)))
            if not piece:
                raise EOFError("the array is cut short")
            left -= piece

    def all(self) -> NDArray[Any]:
        """The whole array, if it is small."""
        if int(np.prod(self.shape, dtype=np.int64)) > _SMALL:
            raise ValueError(f"an array of shape {self.shape} where a small one should be")
        return self._read(self.shape)

    def _read(self, shape: tuple[int, ...]) -> NDArray[Any]:
        size = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError("the array is cut short")
        return np.frombuffer(data, self.dtype).reshape(shape)


class NpzTrajectory:
    """One file as a `Reader`."""

    format = "npz"

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path = path
        self._done = 0.0
        self._options = options
        require_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                self._look(archive)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.error) as error:
            raise DataError(f"{path}: cannot be read as .npz ({error}); get it again") from None

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def count(self) -> int | None:
        """Number of frames: passing over a row costs little beside making a frame of it."""
        return self._count

    def fraction(self) -> float | None:
        """Share of the frames read so far."""
        return self._done

    def _look(self, archive: zipfile.ZipFile) -> None:
        """Finds the arrays, checks that they fit each other, and settles the unit of energy."""
        names = {member.removesuffix(".npy") for member in archive.namelist()}
        options = self._options
        self._positions = _one_of(names, _POSITIONS, "positions")
        self._energies = options.energy_key or _one_of(names, _ENERGIES, "energies")
        self._forces = options.forces_key or next((key for key in _FORCES if key in names), None)
        numbers = _Rows(archive, _one_of(names, _NUMBERS, "atomic numbers"))
        self._numbers_vary = len(numbers.shape) == 2 and numbers.shape[0] > 1
        self._numbers_key = next(key for key in _NUMBERS if key in names)
        positions = _Rows(archive, self._positions)
        count = len(positions)
        energies = _Rows(archive, self._energies)
        if len(positions.shape) != 3 or count == 0:
            raise ValueError(f"{self._positions} has shape {positions.shape}, expected (frames, atoms, 3)")
        if energies.shape not in ((count,), (count, 1)):
            raise ValueError(f"{self._energies} has shape {energies.shape} for {count} frames")
        if self._forces is not None and _Rows(archive, self._forces).shape != positions.shape:
            raise ValueError(f"{self._forces} has another shape than {self._positions}")
        self._count = count
        first = numbers.next() if self._numbers_vary else np.reshape(numbers.all(), -1)
        self._numbers = None if self._numbers_vary else first
        self._cell = np.reshape(_Rows(archive, "cell").all(), (3, 3)) if "cell" in names else NO_CELL
        self._pbc = PERIODIC if "cell" in names else ISOLATED
        if "pbc" in names:
            self._pbc = np.reshape(_Rows(archive, "pbc").all(), 3).astype(np.bool_)
        length = _text(archive, names, "r_unit")
        if length is not None and length.lower() not in _ANGSTROM:
            raise ValueError(f"r_unit is {length!r}, only Å is read; convert the file")
        self._unit, self._note = self._energy_unit(
            archive, names, first, float(np.reshape(energies.next(), ()))
        )

    def _energy_unit(
        self, archive: zipfile.ZipFile, names: set[str], numbers: NDArray[Any], energy: float
    ) -> tuple[float, Note | None]:
        stated = _text(archive, names, "e_unit")
        if stated is not None:
            if stated.lower() not in _SPELLINGS:
                raise ValueError(f"e_unit is {stated!r}, which is none of {', '.join(UNITS)}")
            return UNITS[_SPELLINGS[stated.lower()]], None
        if self._options.energy_unit is not None:
            return UNITS[self._options.energy_unit], None
        expected = all_electron_energy(numbers)
        for name, unit in UNITS.items():
            if abs(energy * unit / expected - 1) < 0.1:
                note = f"{energy:.6g} {name}, expected of free atoms {expected / unit:.6g}"
                return unit, Note(f"energy: unit not stated, {name} by its size", note)
        raise ValueError(
            f"it states no unit of energy, and {energy:.6g} is no total energy of these atoms in "
            f"{', '.join(UNITS)}; name it with --energy-unit"
        )

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields frame `start` and those after it."""
        with zipfile.ZipFile(self._path) as archive:
            names = [self._positions, self._energies]
            names += [self._forces] if self._forces is not None else []
            names += [self._numbers_key] if self._numbers_vary else []
            members = {name: _Rows(archive, name) for name in names}
            for index in range(start, self._count):
                self._done = index / self._count
                try:
                    if index == start:
                        for member in members.values():
                            member.skip(start)
                    rows = {name: member.next() for name, member in members.items()}
                except (EOFError, OSError, ValueError, zipfile.BadZipFile, zipfile.error) as error:
                    yield Rejected(index, Reason.UNREADABLE, f"{error}; the rest of the file is lost")
                    return
                yield self._frame(index, rows)
            self._done = 1.0

    def _frame(self, index: int, rows: dict[str, NDArray[Any]]) -> Frame | Rejected:
        numbers = rows[self._numbers_key] if self._numbers is None else self._numbers
        taken = numbers > 0  # shorter molecules are padded with zeros
        forces = None if self._forces is None else np.asarray(rows[self._forces], np.float64) * self._unit
        energy = float(np.reshape(rows[self._energies], ())) * self._unit
        try:
            return labelled_frame(
                index,
                atomic_numbers=numbers[taken],
                positions=rows[self._positions][taken],
                cell=self._cell,
                pbc=self._pbc,
                energy=energy * (len(numbers) if self._options.energy_per_atom else 1),
                forces=None if forces is None else forces[taken],
                notes=() if self._note is None else (self._note,),
            )
        except FrameError as error:
            return Rejected(index, error.reason, error.detail)


def all_electron_energy(atomic_numbers: NDArray[Any]) -> float:
    """Sum of the free atoms' total energies in eV, to about 2 %.

    Thomas-Fermi with Scott's and Schwinger's corrections: Schwinger, Phys. Rev. A 22, 1827 (1980).
    """
    z = atomic_numbers.astype(np.float64)
    return float(np.sum(-0.768745 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3)) * HARTREE)


def _one_of(names: set[str], keys: tuple[str, ...], what: str) -> str:
    found = next((key for key in keys if key in names), None)
    if found is None:
        raise ValueError(f"it holds no {what} ({', '.join(keys)}); arrays there: {', '.join(sorted(names))}")
    return found


def _text(archive: zipfile.ZipFile, names: set[str], key: str) -> str | None:
    if key not in names:
        return None
    value = np.reshape(_Rows(archive, key).all(), -1)[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


SOURCE = Source(name="npz", open=NpzTrajectory, files=("*.npz",))
