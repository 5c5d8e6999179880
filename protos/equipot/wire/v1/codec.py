"""Turns flat arrays into wire messages and back, checking that they fit. Knows no physics and no gRPC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from equipot.wire.v1 import potential_pb2 as pb

FloatArray = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MAX_ATOMS = 2**31 - 1
"""Most atoms of one message: what a signed 32-bit index reaches."""

REQUEST_BYTES_PER_ATOM = 4 + 24
REQUEST_BYTES_PER_STRUCTURE = 5 + 72 + 3 + 4 + 4
RESPONSE_BYTES_PER_ATOM = 24
RESPONSE_BYTES_PER_STRUCTURE = 8 + 72

_WIRE_DTYPES: Mapping[type[np.generic], np.dtype[Any]] = MappingProxyType(
    {np.float64: np.dtype("<f8"), np.int32: np.dtype("<i4"), np.uint8: np.dtype("u1")}
)

_FEW = 1024
"""Defaults of no more rows are arrays of zeros; of more, one zero seen from everywhere."""


class CodecError(ValueError):
    """Arrays that do not fit together: names the field, what was expected and what came.

    Attributes:
        field: the field at fault, as named in the .proto.
        message: what is wrong, with the values.
        remedy: what the caller can do about it.
    """

    def __init__(self, field: str, message: str, remedy: str) -> None:
        super().__init__(f"{field}: {message}; {remedy}")
        self.field = field
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[CodecError], tuple[str, str, str]]:
        return type(self), (self.field, self.message, self.remedy)


class FailureReason(StrEnum):
    """Why one structure could not be answered; a newer server's unknown reason becomes UNSPECIFIED."""

    UNSPECIFIED = "unspecified"
    INVALID_STRUCTURE = "invalid_structure"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too_large"
    NOT_FINITE = "not_finite"
    INTERNAL = "internal"
    UNSTABLE = "unstable"


_REASON_TO_WIRE: Mapping[FailureReason, pb.FailureReason.ValueType] = MappingProxyType(
    {reason: pb.FailureReason.Value(f"FAILURE_REASON_{reason.name}") for reason in FailureReason}
)
_REASON_FROM_WIRE: Mapping[int, FailureReason] = MappingProxyType(
    {number: reason for reason, number in _REASON_TO_WIRE.items()}
)


@dataclass(frozen=True, slots=True, eq=False)
class StructureArrays:
    """S structures of N atoms in all, flat; units as in the .proto (Å, elementary charges, 2S+1).

    Attributes:
        n_atoms: (S,) int64, atoms in each structure.
        atomic_numbers: (N,) int32, structure after structure.
        positions: (N, 3) float64 in Å.
        cell: (S, 3, 3) float64 in Å, rows are lattice vectors; zeros where there is none.
        pbc: (S, 3) bool.
        charge: (S,) int32.
        spin_multiplicity: (S,) int32, 0 where it is not stated.

    Raises:
        CodecError: an array of another shape or dtype. Nothing is converted silently.
    """

    n_atoms: Int64Array
    atomic_numbers: Int32Array
    positions: FloatArray
    cell: FloatArray
    pbc: BoolArray
    charge: Int32Array
    spin_multiplicity: Int32Array

    def __post_init__(self) -> None:
        if self.n_atoms.ndim != 1:
            raise _wrong_shape("n_atoms", self.n_atoms.shape, "(S,)")
        n_structures, n_atoms = len(self.n_atoms), _count_atoms(self.n_atoms)
        expected: tuple[tuple[str, type[np.generic], tuple[int, ...]], ...] = (
            ("n_atoms", np.int64, (n_structures,)),
            ("atomic_numbers", np.int32, (n_atoms,)),
            ("positions", np.float64, (n_atoms, 3)),
            ("cell", np.float64, (n_structures, 3, 3)),
            ("pbc", np.bool_, (n_structures, 3)),
            ("charge", np.int32, (n_structures,)),
            ("spin_multiplicity", np.int32, (n_structures,)),
        )
        for field, dtype, shape in expected:
            _check_array(field, getattr(self, field), dtype, shape)

    def __len__(self) -> int:
        """Number of structures S."""
        return len(self.n_atoms)

    @property
    def offsets(self) -> Int64Array:
        """(S+1,) int64: structure i's atoms are `offsets[i]:offsets[i + 1]`."""
        return offsets_of(self.n_atoms)

    def slice(self, start: int, stop: int) -> StructureArrays:
        """Structures `start:stop`, as views; the bounds are as in any Python slice."""
        start, stop, _ = slice(start, stop).indices(len(self))
        stop = max(start, stop)
        first = int(self.n_atoms[:start].sum())
        last = first + int(self.n_atoms[start:stop].sum())
        return StructureArrays(
            n_atoms=self.n_atoms[start:stop],
            atomic_numbers=self.atomic_numbers[first:last],
            positions=self.positions[first:last],
            cell=self.cell[start:stop],
            pbc=self.pbc[start:stop],
            charge=self.charge[start:stop],
            spin_multiplicity=self.spin_multiplicity[start:stop],
        )


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the structure at `index` of a batch could not be answered, and what to do about it."""

    index: int
    reason: FailureReason
    field: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True, eq=False)
class PredictionArrays:
    """Answers for S structures of N atoms in all; NaN in the slots of the structures that failed.

    Attributes:
        energy: (S,) float64 in eV.
        forces: (N, 3) float64 in eV/Å; None if not asked for.
        stress: (S, 3, 3) float64 in eV/Å³, positive in tension; None if not asked for.
        failures: one entry for each structure that could not be answered.

    Raises:
        CodecError: an array of another shape or dtype, or a failure of a structure that is not there.
    """

    energy: FloatArray
    forces: FloatArray | None
    stress: FloatArray | None
    failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        if self.energy.ndim != 1:
            raise _wrong_shape("energy", self.energy.shape, "(S,)")
        _check_array("energy", self.energy, np.float64, self.energy.shape)
        if self.forces is not None:
            _check_array("forces", self.forces, np.float64, (len(self.forces), 3))
        if self.stress is not None:
            _check_array("stress", self.stress, np.float64, (len(self.energy), 3, 3))
        for failure in self.failures:
            if not 0 <= failure.index < len(self.energy):
                raise CodecError(
                    "failures",
                    f"a failure of structure {failure.index} in an answer to {len(self.energy)} structures",
                    "number the structures of a request from 0",
                )


def offsets_of(n_atoms: Int64Array) -> Int64Array:
    """(S+1,) int64: where each structure's atoms begin in the flat arrays, and where the last one's end."""
    offsets = np.zeros(len(n_atoms) + 1, dtype=np.int64)
    np.cumsum(n_atoms, out=offsets[1:])
    return offsets


def encode_structures(arrays: StructureArrays) -> pb.Structures:
    """The wire form of a batch. Optional arrays that hold only their default are left out."""
    return pb.Structures(
        n_atoms=arrays.n_atoms.tolist(),
        atomic_numbers=_to_bytes(arrays.atomic_numbers, np.int32),
        positions=_to_bytes(arrays.positions, np.float64),
        cell=_unless_zero(_to_bytes(arrays.cell, np.float64)),
        pbc=_unless_zero(_to_bytes(arrays.pbc, np.uint8)),
        charge=_unless_zero(_to_bytes(arrays.charge, np.int32)),
        spin_multiplicity=_unless_zero(_to_bytes(arrays.spin_multiplicity, np.int32)),
    )


def decode_structures(message: pb.Structures) -> StructureArrays:
    """The arrays of a batch, read-only: views of the message's bytes where it has them.

    Lengths are checked before anything is allocated, so a hostile `n_atoms` costs nothing. A structure of
    zero atoms passes: it is one bad structure among others, which the server answers by a Failure.

    Raises:
        CodecError: a length that does not fit `n_atoms`, or a `pbc` other than 0 and 1.
    """
    # Sliced first: numpy would ask the message for one number after the other.
    counts = np.array(message.n_atoms[:], dtype=np.int64)
    counts.setflags(write=False)
    n_structures, n_atoms = len(counts), _count_atoms(counts)
    pbc = _from_bytes("pbc", message.pbc, np.uint8, (n_structures, 3), optional=True)
    if message.pbc.translate(None, b"\0\1"):
        raise CodecError("pbc", f"holds {max(message.pbc)}", "send one byte per direction, 0 or 1")
    return StructureArrays(
        n_atoms=counts,
        atomic_numbers=_from_bytes("atomic_numbers", message.atomic_numbers, np.int32, (n_atoms,)),
        positions=_from_bytes("positions", message.positions, np.float64, (n_atoms, 3)),
        cell=_from_bytes("cell", message.cell, np.float64, (n_structures, 3, 3), optional=True),
        pbc=pbc.view(np.bool_),
        charge=_from_bytes("charge", message.charge, np.int32, (n_structures,), optional=True),
        spin_multiplicity=_from_bytes(
            "spin_multiplicity", message.spin_multiplicity, np.int32, (n_structures,), optional=True
        ),
    )


def decode_step(step: pb.SessionStep, before: StructureArrays) -> StructureArrays:
    """The structures of a session with a step's positions and, if it has one, its cell.

    Raises:
        CodecError: a length that does not fit the session's structures.
    """
    cell = _from_bytes("cell", step.cell, np.float64, before.cell.shape) if step.cell else before.cell
    positions = _from_bytes("positions", step.positions, np.float64, before.positions.shape)
    return replace(before, positions=positions, cell=cell)


def decode_flags(field: str, raw: bytes, n_atoms: int) -> BoolArray:
    """(n_atoms,) bool from bytes of 0 and 1, also of anything but atoms; all False where there are none.

    Raises:
        CodecError: another length, or another number.
    """
    flags = _from_bytes(field, raw, np.uint8, (n_atoms,), optional=True)
    if raw and int(flags.max(initial=0)) > 1:
        raise CodecError(field, f"holds {int(flags.max())}", "send one byte for each, 0 or 1")
    return flags.view(np.bool_)


def decode_floats(field: str, raw: bytes, shape: tuple[int, ...]) -> FloatArray:
    """float64 of this shape.

    Raises:
        CodecError: another length.
    """
    return _from_bytes(field, raw, np.float64, shape)


def encode_predictions(arrays: PredictionArrays, response: pb.PredictResponse) -> None:
    """Writes energy, forces, stress and failures into the response; its other fields are left alone."""
    response.energy = _to_bytes(arrays.energy, np.float64)
    response.forces = b"" if arrays.forces is None else _to_bytes(arrays.forces, np.float64)
    response.stress = b"" if arrays.stress is None else _to_bytes(arrays.stress, np.float64)
    del response.failures[:]
    response.failures.extend(encode_failures(arrays.failures))


def encode_failures(failures: Iterable[Failure]) -> list[pb.Failure]:
    """The wire form of failures."""
    return [
        pb.Failure(
            index=failure.index,
            reason=_REASON_TO_WIRE[failure.reason],
            field=failure.field,
            message=failure.message,
            remedy=failure.remedy,
        )
        for failure in failures
    ]


def decode_failures(failures: Iterable[pb.Failure]) -> tuple[Failure, ...]:
    """Failures as they came."""
    return tuple(
        Failure(
            index=failure.index,
            reason=_REASON_FROM_WIRE.get(failure.reason, FailureReason.UNSPECIFIED),
            field=failure.field,
            message=failure.message,
            remedy=failure.remedy,
        )
        for failure in failures
    )


def decode_predictions(response: pb.PredictResponse, n_atoms: Sequence[int] | Int64Array) -> PredictionArrays:
    """The answer to a request whose structures had `n_atoms` (S,) atoms; the arrays are read-only views.

    Raises:
        CodecError: a length that does not fit `n_atoms`, or a failure of a structure that is not there.
    """
    counts = np.asarray(n_atoms, dtype=np.int64)
    n_structures, total = len(counts), _count_atoms(counts)
    return PredictionArrays(
        energy=_from_bytes("energy", response.energy, np.float64, (n_structures,)),
        forces=_from_bytes("forces", response.forces, np.float64, (total, 3)) if response.forces else None,
        stress=_from_bytes("stress", response.stress, np.float64, (n_structures, 3, 3))
        if response.stress
        else None,
        failures=decode_failures(response.failures),
    )


def _count_atoms(n_atoms: Int64Array) -> int:
    if n_atoms.dtype != np.int64:
        raise CodecError("n_atoms", f"is {n_atoms.dtype}", "give it as int64")
    # Python's numbers do not overflow, whatever the message says, and of a few of them the sum is quicker.
    counts: list[int] = n_atoms.tolist()
    if counts and min(counts) < 0:
        raise CodecError("n_atoms", f"holds {min(counts)}", "give each structure its number of atoms")
    total = sum(counts)
    if total > MAX_ATOMS:
        raise CodecError(
            "n_atoms",
            f"counts {total} atoms, the limit of one message is {MAX_ATOMS}",
            "send the structures in several messages",
        )
    return total


def _check_array(
    field: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    if array.shape != shape:
        raise _wrong_shape(field, array.shape, str(shape))
    if array.dtype != dtype:
        raise CodecError(field, f"is {array.dtype}", f"give it as {np.dtype(dtype)}")


def _wrong_shape(field: str, shape: tuple[int, ...], expected: str) -> CodecError:
    return CodecError(field, f"has shape {shape}, expected {expected}", "make it fit n_atoms")


def _to_bytes(array: npt.NDArray[Any], dtype: type[np.generic]) -> bytes:
    return array.astype(_WIRE_DTYPES[dtype], copy=False).tobytes()


def _unless_zero(raw: bytes) -> bytes:
    return raw if raw.strip(b"\0") else b""


def _from_bytes(
    field: str, raw: bytes, dtype: type[np.generic], shape: tuple[int, ...], *, optional: bool = False
) -> npt.NDArray[Any]:
    if optional and not raw:
        return _zeros(dtype, shape)
    wire = _WIRE_DTYPES[dtype]
    expected = wire.itemsize
    for length in shape:
        expected *= length
    if len(raw) != expected:
        raise CodecError(
            field,
            f"has {len(raw)} bytes, expected {expected}: {wire.name} of shape {shape}",
            "make it fit n_atoms, little-endian and C-ordered",
        )
    array = np.frombuffer(raw, dtype=wire).reshape(shape)
    return array if wire.isnative else array.astype(dtype)


def _zeros(dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if shape[0] > _FEW:
        # A default must cost no memory, whatever the message claims.
        return np.broadcast_to(np.zeros((), dtype=dtype), shape)
    zeros = np.zeros(shape, dtype=dtype)
    zeros.setflags(write=False)
    return zeros
