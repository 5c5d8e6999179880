"""JSON lists of pymatgen structures with their outputs, as mlearn and maml ship them; streamed.

An entry is {"structure": …, "outputs": {"energy", "forces", "stress" or "virial_stress"}}. Stresses are
VASP's in kbar, as six numbers xx yy zz xy yz zx. Entries of PyXtal_FF (formula, coords, lattice, elements,
energy, force) are read too.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.model.elements import MAX_ATOMIC_NUMBER, symbol
from equipot.train.errors import DataError
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
from equipot.train.sources.json_stream import JsonDamage, JsonStream
from equipot.train.sources.labelled import PERIODIC, labelled_frame
from equipot.train.sources.pymatgen_structure import read_structure, stress_from_kbar

_STRESS_KEYS = ("stress", "virial_stress")
_NUMBERS = {symbol(z): z for z in range(1, MAX_ATOMIC_NUMBER + 1)}
STRESS_NOTE = "stress: read as VASP's, kbar, positive in compression, xx yy zz xy yz zx"


class PymatgenJson:
    """One file as a `Reader`."""

    format = "pymatgen-json"
    count = None

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path = path
        self._group_keys = options.group_keys
        self._per_atom = options.energy_per_atom
        self._fraction = 0.0
        require_file(path)
        try:
            first = next(self._entries(), None)
        except JsonDamage as error:
            raise DataError(f"{path}: cannot be read as a JSON list ({error}); get it again") from None
        if not is_entry(first):
            raise DataError(
                f"{path}: its first entry is neither {{structure, outputs}} nor "
                "{coords, lattice, elements}; convert it to extended xyz"
            )

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def fraction(self) -> float | None:
        """Share of the file read so far."""
        return self._fraction

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields entry `start` and those after it."""
        index = 0
        try:
            for body in self._entries():
                if index >= start:
                    yield self._take(index, body)
                index += 1
        except JsonDamage as error:
            if index >= start:
                yield Rejected(index, Reason.UNREADABLE, f"{error}; the rest of the file is lost")
        self._fraction = 1.0

    def _entries(self) -> Iterator[object]:
        with JsonStream(self._path) as stream:
            if stream.peek() != "[":
                raise JsonDamage(f"it begins with {stream.peek()!r}, not with a list")
            for _ in stream.entries():
                body = stream.value()
                self._fraction = stream.fraction
                yield body

    def _take(self, index: int, body: object) -> Frame | Rejected:
        try:
            if not isinstance(body, Mapping) or not is_entry(body):
                raise FrameError(Reason.UNREADABLE, f"not an entry with a structure: {body!r:.80}")
            return (
                self._from_structure(index, body) if "structure" in body else self._from_arrays(index, body)
            )
        except FrameError as error:
            return Rejected(index, error.reason, error.detail)
        except (KeyError, TypeError, ValueError) as error:
            return Rejected(index, Reason.UNREADABLE, f"{type(error).__name__}: {error}"[:200])

    def _from_structure(self, index: int, body: Mapping[str, Any]) -> Frame:
        structure = read_structure(body["structure"])
        outputs = body["outputs"]
        if not isinstance(outputs, Mapping):
            raise FrameError(Reason.NO_LABEL, "outputs are not named values")
        stress_key = next((key for key in _STRESS_KEYS if outputs.get(key) is not None), None)
        stress = None if stress_key is None else stress_from_kbar(outputs[stress_key])
        return labelled_frame(
            index,
            atomic_numbers=structure.atomic_numbers,
            positions=structure.positions,
            cell=structure.cell,
            pbc=structure.pbc,
            energy=self._energy(outputs.get("energy"), len(structure.atomic_numbers)),
            forces=outputs.get("forces"),
            stress=stress,
            charge=structure.charge,
            group=self._group(body),
            notes=() if stress_key is None else (Note(STRESS_NOTE, f"{stress_key} {outputs[stress_key]}"),),
        )

    def _from_arrays(self, index: int, body: Mapping[str, Any]) -> Frame:
        cell = _plain(body["lattice"])
        unknown = [element for element in body["elements"] if element not in _NUMBERS]
        if unknown:
            raise FrameError(Reason.INVALID, f"{unknown[0]!r} is no element")
        return labelled_frame(
            index,
            atomic_numbers=np.array([_NUMBERS[element] for element in body["elements"]], dtype=np.int64),
            positions=_plain(body["coords"]) @ cell,
            cell=cell,
            pbc=PERIODIC,
            energy=self._energy(body.get("energy"), len(body["elements"])),
            forces=body.get("force"),
            group=self._group(body),
        )

    def _energy(self, value: Any, n_atoms: int) -> Any:  # noqa: ANN401 - checked with the frame
        return value * n_atoms if self._per_atom and value is not None else value

    def _group(self, body: Mapping[str, Any]) -> tuple[str, str] | None:
        for key in self._group_keys:
            if key not in _CLASSES and isinstance(body.get(key), str | int):
                return key, str(body[key])
        return None


_CLASSES = ("group", "group_id")
"""Keys of these lists that name a class of structures or a single entry, not a trajectory."""


def _plain(value: object) -> NDArray[np.float64]:
    """A nested list, or monty's way of writing an array."""
    data = value["data"] if isinstance(value, Mapping) else value
    return np.array(data, dtype=np.float64)


def is_entry(body: object) -> bool:
    """Whether a JSON value is an entry of such a list."""
    return isinstance(body, Mapping) and (
        {"structure", "outputs"} <= set(body) or {"coords", "lattice", "elements"} <= set(body)
    )


SOURCE = Source(name="pymatgen-json", open=PymatgenJson, files=("*.json",))
