"""What jobs do: requests cut into pieces, put together again, and read. Knows neither store nor queue.

A job is a request as any caller could make it, only larger: its pieces are requests of a few structures, and
what runs is a request of those that have not come to their end, each from where it was saved last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from equipot.serve.errors import InvalidRequest
from equipot.serve.jobs.records import Move, Piece
from equipot.wire.v1 import jobs_pb2, potential_pb2
from equipot.wire.v1.codec import (
    Int64Array,
    StructureArrays,
    decode_flags,
    decode_structures,
    encode_structures,
)

PIECE_ATOMS = 1_024
PIECE_STRUCTURES = 64
"""A piece is what is read and written at once; it holds one structure at least."""

RESULT_BYTES = 512
RESULT_BYTES_PER_ATOM = 24 + 24 + 4
"""Room that a result takes: positions, forces and atomic numbers."""

TOKEN_STEPS = 10
"""How many steps apart a structure's state is told; how often it is written is the clock's business."""

RELAX = "relax"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Structures of a job that move together.

    Attributes:
        request: for them, as a caller would ask.
        places: index in the job of each.
        structures: what they are.
        firsts: of the pieces that they are from.
    """

    request: potential_pb2.RelaxRequest
    places: tuple[int, ...]
    structures: StructureArrays
    firsts: tuple[int, ...]

    @property
    def n_atoms(self) -> int:
        """In all of them."""
        return len(self.structures.positions)


def settings_of(request: potential_pb2.RelaxRequest) -> potential_pb2.RelaxRequest:
    """The request without its structures, and without what may differ from one call to the next."""
    settings = potential_pb2.RelaxRequest()
    settings.CopyFrom(request)
    for name in ("structures", "fixed", "session", "progress_every", "token_every", "tokens"):
        settings.ClearField(name)
    if settings.priority == potential_pb2.PRIORITY_UNSPECIFIED:
        settings.priority = potential_pb2.PRIORITY_LOW
    return settings


def pieces_of(request: potential_pb2.RelaxRequest, start: int) -> Iterator[Piece]:
    """A part of a job in pieces; its first structure has index `start` in the job.

    Raises:
        CodecError: its arrays do not fit together.
    """
    arrays = decode_structures(request.structures)
    fixed = decode_flags("fixed", request.fixed, len(arrays.positions))
    offsets = arrays.offsets
    for first, stop in _ranges(arrays):
        piece = _cut(arrays, first, stop, offsets)
        held = fixed[offsets[first] : offsets[stop]]
        message = potential_pb2.RelaxRequest(
            structures=encode_structures(piece),
            fixed=held.astype(np.uint8).tobytes() if held.any() else b"",
        )
        data = message.SerializeToString()
        yield Piece(start + first, stop - first, int(offsets[stop] - offsets[first]), data)


def chunk_of(
    settings: potential_pb2.RelaxRequest,
    pieces: Sequence[Piece],
    ended: Collection[int],
    ways: Mapping[int, bytes],
) -> Chunk:
    """What is left to do of some pieces.

    Args:
        settings: of the job.
        pieces: of it.
        ended: places of structures at their end.
        ways: tokens of where others were last, by place.
    """
    kept: list[StructureArrays] = []
    held: list[bytes] = []
    tokens: list[bytes] = []
    places: list[int] = []
    for piece in pieces:
        message = potential_pb2.RelaxRequest.FromString(piece.data)
        arrays = decode_structures(message.structures)
        fixed = message.fixed or bytes(len(arrays.positions))
        offsets = arrays.offsets
        for index in range(len(arrays)):
            if (place := piece.first + index) not in ended:
                kept.append(_cut(arrays, index, index + 1, offsets))
                held.append(fixed[offsets[index] : offsets[index + 1]])
                tokens.append(ways.get(place, b""))
                places.append(place)
    request = potential_pb2.RelaxRequest()
    request.CopyFrom(settings)
    structures = _joined(kept)
    request.structures.CopyFrom(encode_structures(structures))
    request.fixed = b"".join(held)
    if not any(request.fixed):
        request.fixed = b""
    if any(tokens):
        request.tokens.extend(tokens)
    request.structures.SetInParent()
    return Chunk(request, tuple(places), structures, tuple(piece.first for piece in pieces))


def move_of(reply: potential_pb2.RelaxReply, chunk: Chunk) -> Move | None:
    """What a reply to a chunk's request says of one structure; None if nothing that is to be kept."""
    if reply.HasField("token"):
        return Move(place=chunk.places[reply.token.index], walk=reply.token.token)
    if not reply.HasField("result"):
        return None
    relaxed = reply.result
    index = relaxed.index
    relaxed.index = chunk.places[index]
    if failed := relaxed.HasField("failure"):
        relaxed.failure.index = relaxed.index
    structures = chunk.structures
    offsets = structures.offsets
    atoms = slice(offsets[index], offsets[index + 1])
    result = jobs_pb2.JobResult(
        index=relaxed.index,
        atomic_numbers=structures.atomic_numbers[atoms].astype("<i4").tobytes(),
        pbc=structures.pbc[index].astype(np.uint8).tobytes(),
        relaxed=relaxed,
    )
    return Move(
        place=relaxed.index,
        results=(result.SerializeToString(),),
        ended=True,
        failed=failed,
        steps=relaxed.steps,
    )


def refusals_of(request: jobs_pb2.SubmitJobRequest) -> tuple[Move, ...]:
    """Ends of structures that their sender refused.

    Raises:
        InvalidRequest: one is not there, or has atoms.
    """
    counts = request.relax.structures.n_atoms
    moves = []
    for failure in request.refused:
        if failure.index >= len(counts) or counts[failure.index]:
            raise InvalidRequest(
                f"structure {failure.index} is refused, and is none of this part's {len(counts)} that has no"
                " atoms",
                field="refused",
            )
        place = request.start + failure.index
        result = potential_pb2.RelaxResult(index=place, energy=np.nan, failure=failure)
        result.failure.index = place
        data = jobs_pb2.JobResult(index=place, relaxed=result).SerializeToString()
        moves.append(Move(place=place, results=(data,), ended=True, failed=True))
    return tuple(moves)


def room_for(n_structures: int, n_atoms: int, n_bytes: int) -> int:
    """Bytes that structures and their results take."""
    return n_bytes + RESULT_BYTES * n_structures + RESULT_BYTES_PER_ATOM * n_atoms


def _ranges(arrays: StructureArrays) -> Iterator[tuple[int, int]]:
    start = atoms = 0
    for index, count in enumerate(arrays.n_atoms.tolist()):
        if index > start and (atoms + count > PIECE_ATOMS or index - start >= PIECE_STRUCTURES):
            yield start, index
            start, atoms = index, 0
        atoms += count
    if start < len(arrays):
        yield start, len(arrays)


def _cut(arrays: StructureArrays, start: int, stop: int, offsets: Int64Array) -> StructureArrays:
    """As `arrays.slice`, which would count all atoms before at every call."""
    atoms = slice(offsets[start], offsets[stop])
    return StructureArrays(
        n_atoms=arrays.n_atoms[start:stop],
        atomic_numbers=arrays.atomic_numbers[atoms],
        positions=arrays.positions[atoms],
        cell=arrays.cell[start:stop],
        pbc=arrays.pbc[start:stop],
        charge=arrays.charge[start:stop],
        spin_multiplicity=arrays.spin_multiplicity[start:stop],
    )


def _joined(parts: Sequence[StructureArrays]) -> StructureArrays:
    if not parts:
        return decode_structures(potential_pb2.Structures())
    return StructureArrays(
        n_atoms=np.concatenate([part.n_atoms for part in parts]),
        atomic_numbers=np.concatenate([part.atomic_numbers for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        cell=np.concatenate([part.cell for part in parts]),
        pbc=np.concatenate([part.pbc for part in parts]),
        charge=np.concatenate([part.charge for part in parts]),
        spin_multiplicity=np.concatenate([part.spin_multiplicity for part in parts]),
    )
