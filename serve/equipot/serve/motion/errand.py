"""What a request that moves structures comes to: their algorithms, and what is told of them as messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from equipot.serve.errors import Fault, InvalidRequest
from equipot.serve.job import Work
from equipot.serve.motion.crew import Member
from equipot.serve.motion.notes import Kept
from equipot.serve.motion.state import BadState, Origin, digest_of, seal
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import CodecError, Failure, FailureReason, decode_flags, encode_failures

MessageT_co = TypeVar("MessageT_co", bound=Message, covariant=True)


class Errand(Protocol[MessageT_co]):
    """One understood request.

    Attributes:
        method: that it came by, in lower case.
    """

    method: ClassVar[str]

    @property
    def work(self) -> Work:
        """What it asks for at every step."""

    def opening(self) -> MessageT_co:
        """What is told at once."""

    @property
    def at_once(self) -> int:
        """How many structures `advance` takes in one go."""

    def begin(self, index: int) -> Member:
        """One structure, at its beginning or where its token says."""

    def advance(self, members: Sequence[Member]) -> None:
        """Takes these to their next questions, their ends or their faults; raises nothing."""

    def told(self, member: Member) -> Iterable[MessageT_co]:
        """What is to be told of a member now: its notes, and its result if it is done."""


def bad_token(error: BadState) -> Fault:
    """Of a structure whose token does not fit."""
    return Fault("invalid_structure", "tokens", f"its token {error}", error.remedy)


def structure_digest(work: Work, index: int, *more: npt.NDArray[Any]) -> str:
    """Over what does not change of a structure as it moves, and more of it."""
    arrays, atoms = work.structures, slice(work.offsets[index], work.offsets[index + 1])
    return digest_of(
        arrays.atomic_numbers[atoms],
        arrays.cell[index],
        arrays.pbc[index],
        [int(arrays.charge[index]), int(arrays.spin_multiplicity[index])],
        *more,
    )


def fixed_of(raw: bytes, work: Work) -> npt.NDArray[np.bool_]:
    """(N,) bool: which atoms stay.

    Raises:
        InvalidRequest: they are not those of the request's atoms.
    """
    try:
        return decode_flags("fixed", raw, len(work.structures.positions))
    except CodecError as error:
        raise InvalidRequest(str(error), field=error.field) from error


def one_each(name: str, values: Sequence[Any], count: int) -> None:
    """Checks that a field has no entries, or one for each of so many structures.

    Raises:
        InvalidRequest: it has another number.
    """
    if values and len(values) != count:
        raise InvalidRequest(
            f"{name} has {len(values)} entries for {count} structures: give each one, or none",
            field=name,
        )


def periodic(work: Work) -> None:
    """Checks that every cell may move.

    Raises:
        InvalidRequest: one is not periodic in all directions.
    """
    if not work.structures.pbc.all():
        index = int(np.flatnonzero(~work.structures.pbc.all(axis=1))[0])
        raise InvalidRequest(
            f"structure {index} is not periodic in all three directions, so its cell cannot move:"
            " move it with a fixed cell, or in a request of its own",
            field="cell",
        )


def word(kinds: Any, name: str, value: int) -> int:  # noqa: ANN401  # protobuf's enums
    """A value of one of protobuf's enums.

    Raises:
        InvalidRequest: it is none.
    """
    if value not in kinds.values():
        raise InvalidRequest(f"{value} is no {name} this server knows", field=name)
    return value


def token_of(index: int, note: Kept, origin: Origin) -> pb.MotionToken:
    """A state as the caller keeps it."""
    return pb.MotionToken(index=index, step=note.state.step, token=seal(note.state, origin))


def failure_of(member: Member) -> pb.Failure:
    """Why a member goes no further."""
    failure = member.fault
    assert failure is not None
    if isinstance(failure, Fault):
        failure = Failure(
            member.index, FailureReason(failure.reason), failure.field, failure.message, failure.remedy
        )
    (encoded,) = encode_failures([replace(failure, index=member.index)])
    return encoded


def as_bytes(array: npt.NDArray[Any]) -> bytes:
    """Little-endian float64."""
    return np.ascontiguousarray(array, dtype="<f8").tobytes()


def question(request: pb.RelaxRequest | pb.SimulateRequest, *, stress: bool) -> pb.PredictRequest:
    """What is asked at every step."""
    properties = [pb.PROPERTY_ENERGY, pb.PROPERTY_FORCES]
    properties += [pb.PROPERTY_STRESS] if stress else []
    return pb.PredictRequest(
        model=request.model,
        structures=request.structures if request.HasField("structures") else None,
        properties=properties,
        level_of_theory=request.level_of_theory,
        session=request.session,
        priority=request.priority,
        uncertainty=request.uncertainty if request.HasField("uncertainty") else None,
    )
