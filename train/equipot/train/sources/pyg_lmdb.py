"""LMDB files of pickled torch_geometric records or dicts, read without unpickling. Knows no data set.

Keys are "0", "1", … in ascii, as fairchem (ocpmodels) writes them; "length", if there, says how many.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equipot.train.errors import DataError
from equipot.train.sources.base import Frame, FrameError, ReadOptions, Reason, Rejected, Source
from equipot.train.sources.labelled import ISOLATED, NO_CELL, PERIODIC, labelled_frame
from equipot.train.sources.lmdb_file import LmdbDamage, LmdbFile
from equipot.train.sources.restricted_pickle import PickleDamaged, PickleRefused, Record, loads

ENERGY_KEYS = ("y", "energy", "potential-energy", "potential_energy", "total_energy")
FORCES_KEYS = ("force", "forces")
POSITIONS_KEYS = ("pos", "positions")
NUMBERS_KEYS = ("atomic_numbers", "z", "numbers")


class PygLmdb:
    """One file as a `Reader`. Subclasses say how a record becomes a frame."""

    format = "lmdb"

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._options = options
        self._path = path
        self._done = 0.0
        self._count = self._open()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def count(self) -> int | None:
        """Number of records."""
        return self._count

    def fraction(self) -> float | None:
        """Share of the records read so far."""
        return self._done

    def _open(self) -> int:
        """How many records the file says it holds."""
        if not self._path.exists():
            raise DataError(f"{self._path}: no such file")
        file = LmdbFile(self._path)
        try:
            stated = file.get(b"length")
            numbered = (key for key in iter(file.keys()) if key.isdigit())
            count = loads(stated) if stated is not None else sum(1 for _ in numbered)
        except (LmdbDamage, PickleRefused):
            count = file.entries - 1  # all but "length" itself
        finally:
            file.close()
        if not isinstance(count, int) or not 0 < count <= file.entries:
            raise DataError(
                f"{self._path}: holds {file.entries} entries but none under 0, 1, …; an ASE database "
                "in LMDB has to be called .aselmdb"
            )
        return count

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields record `start` and those after it; what is no plain data comes as `Rejected`."""
        file = LmdbFile(self._path)
        try:
            for index in range(start, self._count):
                self._done = index / self._count
                try:
                    data = file.get(str(index).encode())
                    if data is None:
                        raise FrameError(Reason.UNREADABLE, f"there is no record {index}")
                    yield self.frame(index, _fields(data))
                except FrameError as error:
                    yield Rejected(index, error.reason, error.detail)
                except LmdbDamage as error:
                    missing = f"; the file is {file.missing_bytes} bytes short" if file.missing_bytes else ""
                    yield Rejected(index, Reason.UNREADABLE, f"record {index}: {error}{missing}")
            self._done = 1.0
        finally:
            file.close()

    def frame(self, index: int, fields: Mapping[str, Any]) -> Frame:
        """A record of any data set in eV and Å; keys are among the known ones or named in the options."""
        options = self._options
        energy = _pick(fields, (options.energy_key,) if options.energy_key else ENERGY_KEYS)
        forces = _pick(fields, (options.forces_key,) if options.forces_key else FORCES_KEYS)
        numbers, positions = _pick(fields, NUMBERS_KEYS), _pick(fields, POSITIONS_KEYS)
        if numbers is None or positions is None:
            raise FrameError(Reason.INVALID, f"no atoms; keys there: {', '.join(sorted(map(str, fields)))}")
        cell = fields.get("cell")
        pbc = fields.get("pbc")
        number = single_number(energy)
        if number is not None and options.energy_per_atom:
            number *= len(numbers)
        if number is None:
            raise FrameError(Reason.NO_LABEL, f"keys there: {', '.join(sorted(map(str, fields)))}")
        group = next(((key, str(fields[key])) for key in options.group_keys if key in fields), None)
        return labelled_frame(
            index,
            atomic_numbers=np.reshape(numbers, -1),
            positions=positions,
            cell=NO_CELL if cell is None else np.reshape(cell, (3, 3)),
            pbc=np.reshape(pbc, 3).astype(np.bool_)
            if pbc is not None
            else (ISOLATED if cell is None else PERIODIC),
            energy=number,
            forces=forces,
            group=group,
        )


def _fields(data: bytes) -> Mapping[str, Any]:
    """What a pickled record holds, by name."""
    try:
        value = loads(data)
    except PickleDamaged as error:
        raise FrameError(Reason.UNREADABLE, f"its pickle is damaged: {error}") from None
    except PickleRefused as error:
        raise FrameError(Reason.REFUSED, f"its pickle is not read: {error}") from None
    if isinstance(value, Record):
        state = value.state
        store = state.get("_store")  # torch_geometric ≥ 2; before, the values are the state itself
        if isinstance(store, Record):
            state = store.state.get("_mapping", {})
        value = state
    if not isinstance(value, dict):
        raise FrameError(Reason.UNREADABLE, f"the record is a {type(value).__name__}, not named values")
    return {str(key): item for key, item in value.items() if item is not None}


def single_number(value: Any) -> float | None:  # noqa: ANN401 - whatever a record holds
    """A number or an array of one; None if absent."""
    if value is None:
        return None
    try:
        return float(np.asarray(value, dtype=np.float64).reshape(()))
    except (TypeError, ValueError):
        raise FrameError(Reason.WRONG_SHAPE, f"{value!r:.60} is not one number") from None


def _pick(fields: Mapping[str, Any], keys: tuple[str, ...]) -> Any:  # noqa: ANN401 - whatever a record holds
    return next((fields[key] for key in keys if key in fields), None)


SOURCE = Source(name="lmdb", open=PygLmdb, files=("*.lmdb",))
