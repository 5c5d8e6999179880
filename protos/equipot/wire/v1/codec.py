"""Turns flat arrays into wire messages and back, checking that they fit. Knows no physics and no gRPC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.arrays import (
    BoolArray,
    CodecError,
    FloatArray,
    Int32Array,
    Int64Array,
    array_from,
    bytes_of,
    check_array,
    wrong_shape,
)
from equipot.wire.v1.certainty import UncertaintyArrays, decode_uncertainty, encode_uncertainty

__all__ = [
    "MAX_ATOMS",
    "REQUEST_BYTES_PER_ATOM",
    "REQUEST_BYTES_PER_STRUCTURE",
    "RESPONSE_BYTES_PER_ATOM",
    "RESPONSE_BYTES_PER_STRUCTURE",
    "BoolArray",
    "CodecError",
    "Failure",
    "FailureReason",
    "FloatArray",
    "Int32Array",
    "Int64Array",
    "PredictionArrays",
    "StructureArrays",
    "decode_failures",
    "decode_flags",
    "decode_predictions",
    "decode_step",
    "decode_structures",
    "encode_failures",
    "encode_predictions",
    "encode_structures",
    "offsets_of",
]

MAX_ATOMS = 2**31 - 1
"""Most atoms of one message: what a signed 32-bit index reaches."""

REQUEST_BYTES_PER_ATOM = 4 + 24
REQUEST_BYTES_PER_STRUCTURE = 5 + 72 + 3 + 4 + 4
RESPONSE_BYTES_PER_ATOM = 24
RESPONSE_BYTES_PER_STRUCTURE = 8 + 72


class FailureReason(StrEnum):
    """Why one structure could not be answered; a newer server's unknown reason becomes UNSPECIFIED."""

    UNSPECIFIED = "unspecified"
    INVALID_STRUCTURE = "invalid_structure"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too_large"
    NOT_FINITE = "not_finite"
    INTERNAL = "internal"
    OUTSIDE_DOMAIN = "outside_domain"
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
            raise wrong_shape("n_atoms", self.n_atoms.shape, "(S,)")
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
            check_array(field, getattr(self, field), dtype, shape)

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
        uncertainty: None if not asked for.

    Raises:
        CodecError: an array of another shape or dtype, or a failure of a structure that is not there.
    """

    energy: FloatArray
    forces: FloatArray | None
    stress: FloatArray | None
    failures: tuple[Failure, ...] = ()
    uncertainty: UncertaintyArrays | None = None

    def __post_init__(self) -> None:
        if self.energy.ndim != 1:
            raise wrong_shape("energy", self.energy.shape, "(S,)")
        check_array("energy", self.energy, np.float64, self.energy.shape)
        if self.forces is not None:
            check_array("forces", self.forces, np.float64, (len(self.forces), 3))
        if self.stress is not None:
            check_array("stress", self.stress, np.float64, (len(self.energy), 3, 3))
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
        atomic_numbers=bytes_of(arrays.atomic_numbers, np.int32),
        positions=bytes_of(arrays.positions, np.float64),
        cell=_unless_zero(bytes_of(arrays.cell, np.float64)),
        pbc=_unless_zero(bytes_of(arrays.pbc, np.uint8)),
        charge=_unless_zero(bytes_of(arrays.charge, np.int32)),
        spin_multiplicity=_unless_zero(bytes_of(arrays.spin_multiplicity, np.int32)),
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
    pbc = array_from("pbc", message.pbc, np.uint8, (n_structures, 3), optional=True)
    if message.pbc.translate(None, b"\0\1"):
        raise CodecError("pbc", f"holds {max(message.pbc)}", "send one byte per direction, 0 or 1")
    return StructureArrays(
        n_atoms=counts,
        atomic_numbers=array_from("atomic_numbers", message.atomic_numbers, np.int32, (n_atoms,)),
        positions=array_from("positions", message.positions, np.float64, (n_atoms, 3)),
        cell=array_from("cell", message.cell, np.float64, (n_structures, 3, 3), optional=True),
        pbc=pbc.view(np.bool_),
        charge=array_from("charge", message.charge, np.int32, (n_structures,), optional=True),
        spin_multiplicity=array_from(
            "spin_multiplicity", message.spin_multiplicity, np.int32, (n_structures,), optional=True
        ),
    )


def decode_step(step: pb.SessionStep, before: StructureArrays) -> StructureArrays:
    """The structures of a session with a step's positions and, if it has one, its cell.

    Raises:
        CodecError: a length that does not fit the session's structures.
    """
    cell = array_from("cell", step.cell, np.float64, before.cell.shape) if step.cell else before.cell
    positions = array_from("positions", step.positions, np.float64, before.positions.shape)
    return replace(before, positions=positions, cell=cell)


def decode_flags(field: str, raw: bytes, n_atoms: int) -> BoolArray:
    """(n_atoms,) bool from bytes of 0 and 1, also of anything but atoms; all False where there are none.

    Raises:
        CodecError: another length, or another number.
    """
    flags = array_from(field, raw, np.uint8, (n_atoms,), optional=True)
    if raw and int(flags.max(initial=0)) > 1:
        raise CodecError(field, f"holds {int(flags.max())}", "send one byte for each, 0 or 1")
    return flags.view(np.bool_)


def decode_floats(field: str, raw: bytes, shape: tuple[int, ...]) -> FloatArray:
    """float64 of this shape.

    Raises:
        CodecError: another length.
    """
    return array_from(field, raw, np.float64, shape)


def encode_predictions(arrays: PredictionArrays, response: pb.PredictResponse) -> None:
    """Writes predictions, how sure they are, and failures into the response; other fields are left alone."""
    response.energy = bytes_of(arrays.energy, np.float64)
    response.forces = b"" if arrays.forces is None else bytes_of(arrays.forces, np.float64)
    response.stress = b"" if arrays.stress is None else bytes_of(arrays.stress, np.float64)
    del response.failures[:]
    response.failures.extend(encode_failures(arrays.failures))
    if arrays.uncertainty is not None:
        response.uncertainty.CopyFrom(encode_uncertainty(arrays.uncertainty))


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
        energy=array_from("energy", response.energy, np.float64, (n_structures,)),
        forces=array_from("forces", response.forces, np.float64, (total, 3)) if response.forces else None,
        stress=array_from("stress", response.stress, np.float64, (n_structures, 3, 3))
        if response.stress
        else None,
        failures=decode_failures(response.failures),
        uncertainty=decode_uncertainty(response.uncertainty, counts)
        if response.HasField("uncertainty")
        else None,
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


def _unless_zero(raw: bytes) -> bytes:
    return raw if raw.strip(b"\0") else b""
