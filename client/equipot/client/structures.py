"""What a caller may call a structure, made into checked arrays. Knows no gRPC and does not import ASE."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from equipot.client.errors import InvalidRequest, InvalidStructure
from equipot.wire.v1.codec import BoolArray, FloatArray, Int32Array, StructureArrays

_INT32_MAX = 2**31 - 1


class AtomsLike(Protocol):
    """The part of `ase.Atoms` that is read here."""

    info: dict[str, Any]
    cell: Any
    pbc: Any

    def get_atomic_numbers(self) -> npt.NDArray[Any]:
        """(n,) integers."""

    def get_positions(self) -> npt.NDArray[Any]:
        """(n, 3) in Å."""


@dataclass(init=False, frozen=True, slots=True, eq=False)
class Structure:
    """One structure of plain arrays, checked on construction.

    Attributes:
        atomic_numbers: (n,) int32, 1 to 118.
        positions: (n, 3) float64 in Å.
        cell: (3, 3) float64 in Å, rows are lattice vectors; zeros if there is none.
        pbc: (3,) bool.
        charge: in elementary charges.
        spin_multiplicity: 2S+1; 0: not stated.

    Raises:
        InvalidStructure: names the field, what is wrong with it, and the remedy.
    """

    atomic_numbers: Int32Array
    positions: FloatArray
    cell: FloatArray
    pbc: BoolArray
    charge: int
    spin_multiplicity: int

    def __init__(
        self,
        atomic_numbers: npt.ArrayLike,
        positions: npt.ArrayLike,
        cell: npt.ArrayLike | None = None,
        pbc: npt.ArrayLike = False,
        charge: int = 0,
        spin_multiplicity: int = 0,
    ) -> None:
        numbers = _atomic_numbers(atomic_numbers)
        set_field = object.__setattr__
        set_field(self, "atomic_numbers", numbers)
        set_field(self, "positions", _finite("positions", positions, (len(numbers), 3)))
        set_field(self, "cell", np.zeros((3, 3)) if cell is None else _finite("cell", cell, (3, 3)))
        set_field(self, "pbc", _three_bools("pbc", pbc))
        set_field(self, "charge", _integer("charge", charge, -_INT32_MAX))
        set_field(self, "spin_multiplicity", _integer("spin_multiplicity", spin_multiplicity, 0))

    def __len__(self) -> int:
        """Number of atoms."""
        return len(self.atomic_numbers)


StructureLike: TypeAlias = Structure | AtomsLike | Mapping[str, Any]
"""One structure: an `ase.Atoms`, a `Structure`, or a mapping of its fields."""
StructuresLike: TypeAlias = StructureLike | StructureArrays | Iterable[StructureLike]
"""A batch, or a batch of one."""


def each_structure(structures: StructuresLike) -> Iterator[object]:
    """One object per structure, not yet checked.

    Raises:
        InvalidRequest: nothing that holds structures.
    """
    if isinstance(structures, StructureArrays):
        return _unpack(structures)
    if isinstance(structures, Structure | Mapping) or _is_atoms(structures):
        return iter((structures,))
    if isinstance(structures, str | bytes) or not isinstance(structures, Iterable):
        raise InvalidRequest(
            f"structures is {type(structures).__name__}; give ase.Atoms, Structure, a dict of arrays, "
            "or any iterable of these",
            field="structures",
        )
    return iter(structures)


def as_structure(item: object) -> Structure:
    """The checked form of one structure.

    Raises:
        InvalidStructure: it cannot be one; the error names the field and the remedy.
    """
    if isinstance(item, Structure):
        return item
    if isinstance(item, Mapping):
        return _from_mapping(item)
    if _is_atoms(item):
        return from_atoms(item)
    raise InvalidStructure(
        "structures", f"is {type(item).__name__}", "give ase.Atoms, Structure or a dict of arrays"
    )


def from_atoms(atoms: AtomsLike) -> Structure:
    """An `ase.Atoms` as a structure; charge and spin multiplicity come from `atoms.info`."""
    charge, spin_multiplicity = charge_and_spin(atoms.info)
    return Structure(
        atoms.get_atomic_numbers(),
        atoms.get_positions(),
        np.asarray(atoms.cell),
        atoms.pbc,
        charge,
        spin_multiplicity,
    )


def charge_and_spin(info: Mapping[str, Any]) -> tuple[int, int]:
    """Charge and spin multiplicity that `atoms.info` states; 0 where it states none.

    The multiplicity is "spin_multiplicity" or, as other potentials call it, "spin".

    Raises:
        InvalidStructure: not integers, or the two names of the multiplicity disagree.
    """
    charge = _integer("charge", info.get("charge", 0), -_INT32_MAX)
    names = [name for name in ("spin_multiplicity", "spin") if name in info]
    stated = {_integer("spin_multiplicity", info[name], 0) for name in names}
    if len(stated) > 1:
        raise InvalidStructure(
            "spin_multiplicity",
            f"atoms.info has spin_multiplicity {info['spin_multiplicity']} and spin {info['spin']}",
            "both mean 2S+1: keep one",
        )
    return charge, stated.pop() if stated else 0


def count_atoms(item: object) -> int:
    """How many atoms the caller meant, for a structure that is refused; 0 if that cannot be told."""
    numbers = item.get("atomic_numbers") if isinstance(item, Mapping) else None
    if _is_atoms(item):
        numbers = item.get_atomic_numbers()
    return len(numbers) if isinstance(numbers, Sized) else 0


def pack(structures: Sequence[Structure]) -> StructureArrays:
    """One flat batch of the structures, in their order."""
    return StructureArrays(
        n_atoms=np.array([len(structure) for structure in structures], dtype=np.int64),
        atomic_numbers=np.concatenate(
            [np.zeros(0, dtype=np.int32), *(structure.atomic_numbers for structure in structures)]
        ),
        positions=np.concatenate([np.zeros((0, 3)), *(structure.positions for structure in structures)]),
        cell=np.array([structure.cell for structure in structures], dtype=np.float64).reshape(-1, 3, 3),
        pbc=np.array([structure.pbc for structure in structures], dtype=np.bool_).reshape(-1, 3),
        charge=np.array([structure.charge for structure in structures], dtype=np.int32),
        spin_multiplicity=np.array([structure.spin_multiplicity for structure in structures], dtype=np.int32),
    )


def _is_atoms(item: object) -> TypeGuard[AtomsLike]:
    return hasattr(item, "get_atomic_numbers") and hasattr(item, "info")


def _unpack(arrays: StructureArrays) -> Iterator[dict[str, Any]]:
    offsets = arrays.offsets.tolist()
    for i in range(len(arrays)):
        atoms = slice(offsets[i], offsets[i + 1])
        yield {
            "atomic_numbers": arrays.atomic_numbers[atoms],
            "positions": arrays.positions[atoms],
            "cell": arrays.cell[i],
            "pbc": arrays.pbc[i],
            "charge": arrays.charge[i],
            "spin_multiplicity": arrays.spin_multiplicity[i],
        }


def _from_mapping(mapping: Mapping[str, Any]) -> Structure:
    known = [field.name for field in fields(Structure)]
    for name in mapping:
        if name not in known:
            raise InvalidStructure(str(name), "is no field of a structure", f"use {', '.join(known)}")
    for name in known[:2]:
        if name not in mapping:
            raise InvalidStructure(name, "is missing", "give one entry per atom")
    return Structure(**mapping)


def _array(field: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidStructure(field, f"is no array: {error}", "give rows of equal length") from error
    if array.dtype.kind not in "biuf":
        raise InvalidStructure(field, f"holds {array.dtype}", "give numbers")
    return array


def _atomic_numbers(value: npt.ArrayLike) -> Int32Array:
    array = _array("atomic_numbers", value)
    if array.ndim != 1:
        raise InvalidStructure("atomic_numbers", f"has shape {array.shape}", "give one integer per atom")
    if len(array) == 0:
        raise InvalidStructure("atomic_numbers", "is empty: there are no atoms", "leave the structure out")
    wrong = np.flatnonzero((array < 1) | (array > 118) | (array != np.floor(array)))
    if len(wrong):
        atom = int(wrong[0])
        raise InvalidStructure(
            "atomic_numbers", f"is {array[atom]} for atom {atom}", "give integers from 1 to 118"
        )
    return array.astype(np.int32)


def _finite(field: str, value: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    array = _array(field, value)
    if array.shape != shape:
        raise InvalidStructure(field, f"has shape {array.shape}", f"give shape {shape}")
    # A copy: the caller's array may change while requests are still being sent.
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        of = f"atom {row}" if field == "positions" else f"row {row}"
        raise InvalidStructure(field, f"is not finite for {of}: {array[row].tolist()}", "give finite numbers")
    return array


def _three_bools(field: str, value: npt.ArrayLike) -> BoolArray:
    array = _array(field, value)
    if array.shape not in ((), (3,)) or ((array != 0) & (array != 1)).any():
        raise InvalidStructure(field, f"is {value!r}", "give one bool or three")
    return np.broadcast_to(array.astype(np.bool_), (3,))


def _integer(field: str, value: object, least: int) -> int:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidStructure(field, f"is {value!r}", "give an integer") from None
    if not least <= number <= _INT32_MAX:
        raise InvalidStructure(field, f"is {number}", f"give an integer from {least} to {_INT32_MAX}")
    return number
