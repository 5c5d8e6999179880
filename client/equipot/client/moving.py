"""What all requests have in common that have a server move structures. Opens no connection itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from equipot.client.batches import Part, Wish
from equipot.client.certainty import Certainty, certainty_of
from equipot.client.errors import InvalidRequest, ModelChanged, ServerError
from equipot.client.results import ModelReference
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.certainty import decode_uncertainty
from equipot.wire.v1.codec import BoolArray, CodecError, Failure, FloatArray, decode_failures

_BYTES_PER_TOKEN = 8
"""Of a field's own header, at most."""


class _MayFail(Protocol):
    """A result on the wire."""

    @property
    def failure(self) -> pb.Failure: ...
    def HasField(self, field_name: Any, /) -> bool: ...  # noqa: ANN401  # as protobuf has it


class Moves:
    """Structures of one request, some of which have no result yet: which, by what, and from where.

    Attributes:
        part: the structures, and those refused at once.
        wish: what is asked; of one bundle alone once one answered.
        start: the index of the part's first item among all.
        headway: how often one of them got further than it ever was.
    """

    def __init__(self, part: Part, wish: Wish, *, start: int, most_bytes: int) -> None:
        self.part = part
        self.wish = wish
        self.start = start
        self._most_bytes = most_bytes
        self._open = list(range(len(part.structures)))
        self._asked = self._open
        self._tokens: dict[int, tuple[int, bytes]] = {}
        self.headway = 0

    @property
    def waits_for(self) -> int:
        """How many structures have no result yet."""
        return len(self._open)

    @property
    def begun(self) -> str:
        """The bundle that it began with; empty: it may be answered by any."""
        return self.wish.model if self.wish.settled else ""

    def ask_for(self) -> list[int]:
        """The numbers, in the part, of what has no result yet; by these places are indices from now on."""
        self._asked = list(self._open)
        return self._asked

    def tokens_within(self, request_bytes: int) -> list[bytes]:
        """A token for each that is asked for, as far as the message has room; none if nobody has one."""
        room = self._most_bytes - request_bytes
        tokens = []
        for number in self._asked:
            _, token = self._tokens.get(number, (-1, b""))
            room -= len(token) + _BYTES_PER_TOKEN
            tokens.append(token if room >= 0 else b"")
        return tokens if any(tokens) else []

    def index_of(self, index: int) -> int:
        """The index among all items of what the last request has there."""
        return self.start + self.part.places[self.number_of(index)]

    def n_atoms_of(self, index: int) -> int:
        """Of the structure that the last request has there."""
        return len(self.part.structures[self.number_of(index)])

    def go_on_from(self, number: int, token: bytes, step: int = -1) -> None:
        """Begins this structure of the part from there; -1: of which step that is, is not known."""
        self._tokens[number] = step, token

    def keep(self, token: pb.MotionToken) -> bool:
        """Goes on from there if it has to ask again, unless it has been as far before; whether it does."""
        number = self.number_of(token.index)
        before, _ = self._tokens.get(number, (-1, b""))
        if token.step <= before:
            return False
        self.go_on_from(number, token.token, token.step)
        self.headway += 1
        return True

    def finish(self, index: int) -> int:
        """Notes a result; returns the structure's number of atoms.

        Raises:
            ServerError: it has one already.
        """
        number = self.number_of(index)
        if number not in self._open:
            raise ServerError(f"structure {self.index_of(index)} was answered twice")
        self._open.remove(number)
        self.headway += 1
        self._tokens.pop(number, None)
        return len(self.part.structures[number])

    def settle(self, model: ModelReference) -> None:
        """Whoever answered first goes on, also after the connection was lost.

        Raises:
            ModelChanged: another bundle answers.
        """
        if "@sha256:" not in self.wish.model:
            self.wish = self.wish.settle(model.name, model.digest)
        elif not model.pinned.endswith(self.wish.model.partition("@")[2]):
            raise ModelChanged(f"{model.pinned} answers what {self.wish.model} began")

    def number_of(self, index: int) -> int:
        """The number, in the part, of what the last request has there.

        Raises:
            ServerError: it has no such structure.
        """
        if not 0 <= index < len(self._asked):
            raise ServerError(f"the answer is about structure {index} of {len(self._asked)}")
        return self._asked[index]


def fixed_atoms(item: object, n_atoms: int) -> BoolArray:
    """(n_atoms,) bool: atoms that constraints of `ase.Atoms` hold where they are.

    Raises:
        InvalidRequest: a constraint of another kind, which the server would not keep.
    """
    mask = np.zeros(n_atoms, dtype=np.bool_)
    constraints: Any = getattr(item, "constraints", ())
    for constraint in constraints:
        if type(constraint).__name__ != "FixAtoms":
            raise InvalidRequest(
                f"a constraint is {type(constraint).__name__}; on the server only FixAtoms is kept: take the"
                " others away, or move them with EquipotCalculator and ASE's own algorithms",
                field="fixed",
            )
        mask[constraint.index] = True
    return mask


def fixed_of(items: Sequence[object], part: Part, start: int) -> list[BoolArray]:
    """`fixed_atoms` of each structure of a part that begins at this item."""
    return [
        fixed_atoms(items[start + place], len(structure))
        for place, structure in zip(part.places, part.structures, strict=True)
    ]


def flags(masks: Sequence[BoolArray]) -> bytes:
    """The masks of structure after structure as the wire has them; empty if nothing is set."""
    every = np.concatenate(list(masks)) if masks else np.zeros(0, dtype=np.bool_)
    return every.astype(np.uint8).tobytes() if every.any() else b""


def failure_of(result: _MayFail, index: int) -> Failure | None:
    """Why a result is none, for the item with this index."""
    if not result.HasField("failure"):
        return None
    (failure,) = decode_failures([result.failure])
    return replace(failure, index=index)


def certainty_told(told: pb.RelaxResult | pb.MotionFrame, n_atoms: int) -> Certainty | None:
    """How sure the answer is for one structure of so many atoms; None if that was not asked for.

    Raises:
        ServerError: it does not fit the structure.
    """
    if not told.HasField("uncertainty"):
        return None
    try:
        return certainty_of(decode_uncertainty(told.uncertainty, [n_atoms]), 0, slice(0, n_atoms))
    except CodecError as error:
        raise ServerError(f"the answer does not fit the request: {error}") from error


def floats(raw: bytes, shape: tuple[int, ...]) -> FloatArray:
    """The numbers of one array.

    Raises:
        ServerError: they are not as many as its shape has.
    """
    array: npt.NDArray[np.float64] = np.frombuffer(raw, dtype="<f8").astype(np.float64)
    if array.size != math.prod(shape):
        raise ServerError(f"the answer has {array.size} numbers where {math.prod(shape)} were expected")
    return array.reshape(shape)


def word(kinds: Any, name: str, word: str, prefix: str = "") -> Any:  # noqa: ANN401  # protobuf's enums
    """The value of one of protobuf's enums, by its word in lower case.

    Raises:
        InvalidRequest: it has no such word.
    """
    full = f"{prefix or name.upper()}_{word.upper()}"
    if full not in kinds.keys():  # noqa: SIM118  # an enum of protobuf is no mapping
        allowed = ", ".join(
            key.removeprefix(f"{prefix or name.upper()}_").lower()
            for key in kinds.keys()  # noqa: SIM118
            if not key.endswith("UNSPECIFIED")
        )
        raise InvalidRequest(f"{name} is {word!r}; give one of {allowed}", field=name)
    return kinds.Value(full)
