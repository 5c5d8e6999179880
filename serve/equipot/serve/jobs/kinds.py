"""What jobs do: requests cut into pieces, put together again, and their room. Knows neither store nor queue.

A job is a request as any caller could make it, only larger: its pieces are requests of a few structures, and
what runs is a request of those that have not come to their end, each from where it was saved last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import Message

from equipot.serve.errors import InvalidRequest
from equipot.serve.jobs.records import Piece
from equipot.serve.motion.errand import as_bytes, one_each
from equipot.serve.motion.simulate_errand import standard_masses
from equipot.wire.v1 import jobs_pb2, potential_pb2
from equipot.wire.v1.codec import (
    CodecError,
    Int64Array,
    StructureArrays,
    decode_flags,
    decode_floats,
    decode_structures,
    encode_structures,
)

PIECE_ATOMS = 1_024
PIECE_STRUCTURES = 64
"""A piece is what is read and written at once; it holds one structure at least."""

RESULT_BYTES = 512
OBSERVATION_BYTES = 192
VECTOR_BYTES, NUMBER_BYTES = 24, 4
"""Room that results take, and in them atoms: a result has atomic numbers, positions and one more vector."""

CERTAINTY_BYTES, CERTAINTY_ATOM_BYTES = 512, 16
"""More room of a result that says how sure it is: in words and numbers; spread and interval of each atom."""

TOKEN_STEPS = 10
"""How many steps apart a structure's state is told; how often it is written is the clock's business."""

MoveRequest = potential_pb2.RelaxRequest | potential_pb2.SimulateRequest

REQUESTS: dict[str, type[MoveRequest]] = {
    "relax": potential_pb2.RelaxRequest,
    "simulate": potential_pb2.SimulateRequest,
}
"""By the names that the oneof of `SubmitJobRequest` has for them."""

_PER_ATOM = {"fixed": 1, "velocities": 24, "masses": 8}
"""Bytes of what a request has for each atom."""

_NOT_SETTINGS = (
    *("structures", "fixed", "velocities", "drawn", "masses", "seeds"),
    *("session", "progress_every", "token_every", "tokens"),
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Structures of a job that move together.

    Attributes:
        request: for them, as a caller would ask.
        places: index in the job of each.
        structures: what they are.
        firsts: of the pieces that they are from.
    """

    request: MoveRequest
    places: tuple[int, ...]
    structures: StructureArrays
    firsts: tuple[int, ...]

    @property
    def fresh(self) -> list[int]:
        """Places of those that have not moved before."""
        tokens = self.request.tokens
        return [place for index, place in enumerate(self.places) if not (tokens and tokens[index])]

    @property
    def n_atoms(self) -> int:
        """In all of them."""
        return len(self.structures.positions)


def request_of(message: jobs_pb2.SubmitJobRequest) -> MoveRequest:
    """What is to be done.

    Raises:
        InvalidRequest: it does not say.
    """
    match message.WhichOneof("kind"):
        case "relax":
            return message.relax
        case "simulate":
            return message.simulate
    raise InvalidRequest("the request does not say what is to be done: give relax or simulate", field="kind")


def settings_of(request: MoveRequest) -> MoveRequest:
    """The request without its structures, and without what may differ from one call to the next."""
    settings = deepcopy(request)
    message: Message = settings
    for name in _NOT_SETTINGS:
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    if settings.priority == potential_pb2.PRIORITY_UNSPECIFIED:
        settings.priority = potential_pb2.PRIORITY_LOW
    return settings


def steps_of(settings: MoveRequest) -> int:
    """That each structure takes unless it fails; 0: it is known when it has."""
    return settings.steps if isinstance(settings, potential_pb2.SimulateRequest) else 0


def timestep_of(settings: MoveRequest) -> float:
    """fs between two steps of dynamics; 0 of what has none."""
    return (settings.timestep or 1.0) if isinstance(settings, potential_pb2.SimulateRequest) else 0.0


def pieces_of(request: MoveRequest, start: int) -> Iterator[Piece]:
    """A part of a job in pieces; its first structure has index `start` in the job.

    Raises:
        InvalidRequest: its arrays do not fit together.
    """
    try:
        arrays = decode_structures(request.structures)
    except CodecError as error:
        raise InvalidRequest(str(error), field=f"structures.{error.field}") from error
    try:
        whole = _told_apart(request, arrays, start)
    except CodecError as error:
        raise InvalidRequest(str(error), field=error.field) from error
    offsets = arrays.offsets
    for first, stop in _ranges(arrays):
        message = type(request)(structures=encode_structures(_cut(arrays, first, stop, offsets)))
        for name, size in _PER_ATOM.items():
            if values := getattr(whole, name, b""):
                setattr(message, name, values[offsets[first] * size : offsets[stop] * size])
        if not any(message.fixed):
            message.fixed = b""
        if isinstance(message, potential_pb2.SimulateRequest):
            assert isinstance(whole, potential_pb2.SimulateRequest)
            message.drawn = whole.drawn[first:stop]
            message.seeds.extend(whole.seeds[first:stop])
        data = message.SerializeToString()
        yield Piece(start + first, stop - first, int(offsets[stop] - offsets[first]), data)


def _told_apart(request: MoveRequest, arrays: StructureArrays, start: int) -> MoveRequest:
    """What the request has beside structures, so that it means the same for some of them.

    Raises:
        CodecError: it is not that of its structures.
        InvalidRequest: not one seed for each.
    """
    n_atoms, n_structures = len(arrays.positions), len(arrays)
    told = type(request)(fixed=decode_flags("fixed", request.fixed, n_atoms).astype(np.uint8).tobytes())
    if isinstance(request, potential_pb2.SimulateRequest):
        assert isinstance(told, potential_pb2.SimulateRequest)
        one_each("seeds", request.seeds, n_structures)
        told.seeds.extend(request.seeds or range(start, start + n_structures))
        if request.velocities:
            told.velocities = as_bytes(decode_floats("velocities", request.velocities, (n_atoms, 3)))
        drawn = decode_flags("drawn", request.drawn, n_structures) if request.drawn else None
        told.drawn = bytes([not request.velocities] * n_structures) if drawn is None else drawn.tobytes()
        if request.masses:
            told.masses = as_bytes(decode_floats("masses", request.masses, (n_atoms,)))
    return told


@dataclass(slots=True)
class _Left:
    """What is left of pieces, structure by structure."""

    structures: list[StructureArrays] = field(default_factory=list)
    fixed: list[bytes] = field(default_factory=list)
    velocities: list[bytes] = field(default_factory=list)
    masses: list[bytes] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def add(self, message: MoveRequest, index: int, arrays: StructureArrays, offsets: Int64Array) -> None:
        """Takes one structure of a piece."""
        self.structures.append(_cut(arrays, index, index + 1, offsets))
        for name, size in _PER_ATOM.items():
            values = getattr(message, name, b"")
            getattr(self, name).append(values[offsets[index] * size : offsets[index + 1] * size])
        if isinstance(message, potential_pb2.SimulateRequest):
            self.drawn.append(message.drawn[index])
            self.seeds.append(message.seeds[index])

    def per_atom(self, name: str) -> bytes:
        """Of all structures; empty if none has it, and else zero for those without."""
        values = getattr(self, name)
        if not any(values):
            return b""
        counts = (len(one.positions) for one in self.structures)
        return b"".join(
            one or bytes(count * _PER_ATOM[name]) for one, count in zip(values, counts, strict=True)
        )

    def into(self, request: MoveRequest) -> None:
        """Writes it down."""
        request.fixed = self.per_atom("fixed")
        if any(self.tokens):
            request.tokens.extend(self.tokens)
        if isinstance(request, potential_pb2.SimulateRequest):
            request.velocities = self.per_atom("velocities")
            request.drawn = bytes(self.drawn)
            request.seeds.extend(self.seeds)
            if any(self.masses):
                request.masses = b"".join(
                    own or as_bytes(standard_masses(one.atomic_numbers))
                    for own, one in zip(self.masses, self.structures, strict=True)
                )


def chunk_of(
    settings: MoveRequest,
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
    left = _Left()
    for piece in pieces:
        message = type(settings).FromString(piece.data)
        arrays = decode_structures(message.structures)
        offsets = arrays.offsets
        for index in range(len(arrays)):
            if (place := piece.first + index) not in ended:
                left.add(message, index, arrays, offsets)
                left.tokens.append(ways.get(place, b""))
                left.places.append(place)
    request = deepcopy(settings)
    structures = _joined(left.structures)
    request.structures.CopyFrom(encode_structures(structures))
    left.into(request)
    request.structures.SetInParent()
    return Chunk(request, tuple(left.places), structures, tuple(piece.first for piece in pieces))


def room_for(request: MoveRequest, n_bytes: int) -> int:
    """Bytes that structures, which themselves are so large, and all their results take."""
    n_structures, n_atoms = len(request.structures.n_atoms), sum(request.structures.n_atoms)
    vectors, results, observations = 2, 1, 0
    if isinstance(request, potential_pb2.SimulateRequest):
        vectors += request.frame_forces
        every = request.frame_every or max(1, request.steps)
        # With step 0, a last one that is none of the others, and the end.
        frames = request.steps // every + bool(request.steps % every) + bool(request.frame_every)
        results, observations = frames + 1, 0
        if request.observe_every:
            observations = request.steps // request.observe_every + 1
    by_result, by_atom = RESULT_BYTES, VECTOR_BYTES * vectors + NUMBER_BYTES
    if request.HasField("uncertainty"):
        by_result, by_atom = by_result + CERTAINTY_BYTES, by_atom + CERTAINTY_ATOM_BYTES
    by_structure = by_result * results + OBSERVATION_BYTES * observations
    return n_bytes + by_structure * n_structures + by_atom * results * n_atoms


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
