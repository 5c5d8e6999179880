"""Cuts structures into requests that a server takes, and puts answers back in order. No gRPC calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from equipot.client.certainty import Uncertainty, among
from equipot.client.errors import (
    ClientError,
    InvalidStructure,
    ModelChanged,
    ModelNotFound,
    ServerError,
    refused,
)
from equipot.client.results import Limits, ModelReference, Predictions
from equipot.client.structures import Structure, as_structure, count_atoms, pack
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import (
    REQUEST_BYTES_PER_ATOM,
    REQUEST_BYTES_PER_STRUCTURE,
    CodecError,
    Failure,
    FailureReason,
    FloatArray,
    Int64Array,
    PredictionArrays,
    decode_predictions,
    encode_structures,
)

Priority = Literal["low", "normal", "high"]
"""How urgent a call is; what the server lets nobody have is lowered."""

PRIORITIES: Mapping[str, pb.Priority.ValueType] = MappingProxyType(
    {"low": pb.PRIORITY_LOW, "normal": pb.PRIORITY_UNSPECIFIED, "high": pb.PRIORITY_HIGH}
)

# The model's name, level of theory and the fields' own headers.
_BYTES_PER_REQUEST = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is asked of a model for every structure; `settled` if the model is one bundle of our choice."""

    model: str
    level_of_theory: str
    forces: bool
    stress: bool
    priority: Priority = "normal"
    session: str = ""
    settled: bool = False
    uncertainty: Uncertainty | None = None

    def settle(self, name: str, digest: str) -> Wish:
        """The same of one bundle exactly, whatever its name comes to mean meanwhile."""
        return replace(self, model=f"{name}@{digest}", settled=True)

    @property
    def properties(self) -> list[pb.Property.ValueType]:
        """What is asked for, on the wire."""
        properties = [pb.PROPERTY_ENERGY]
        properties += [pb.PROPERTY_FORCES] if self.forces else []
        properties += [pb.PROPERTY_STRESS] if self.stress else []
        return properties

    def with_properties(self, *, forces: bool | None, stress: bool | None) -> Wish:
        """The same for another step; None leaves as it is."""
        return replace(
            self,
            forces=self.forces if forces is None else forces,
            stress=self.stress if stress is None else stress,
        )

    def request(self, structures: list[Structure]) -> pb.PredictRequest:
        """The request for these structures."""
        return pb.PredictRequest(
            model=self.model,
            structures=encode_structures(pack(structures)),
            properties=self.properties,
            level_of_theory=self.level_of_theory,
            priority=PRIORITIES[self.priority],
            session=self.session,
            uncertainty=self.options,
        )

    @property
    def options(self) -> pb.UncertaintyOptions | None:
        """What is asked of how sure answers are, on the wire."""
        return None if self.uncertainty is None else self.uncertainty.options()


@dataclass(slots=True)
class Part:
    """One request's worth of a batch: structures to send, and those refused at once, in their places."""

    structures: list[Structure] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    n_atoms: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    size: int = 0

    def add(self, structure: Structure) -> None:
        """Takes a structure to send."""
        self.places.append(len(self.n_atoms))
        self.structures.append(structure)
        self.n_atoms.append(len(structure))
        self.size += len(structure)

    def refuse(self, reason: FailureReason, problem: InvalidStructure, n_atoms: int) -> None:
        """Takes a structure that is not sent."""
        self.failures.append(refused(len(self.n_atoms), problem, reason))
        self.n_atoms.append(n_atoms)

    def merge(self, wish: Wish, response: pb.PredictResponse | None) -> Predictions:
        """The predictions for this part; `response` is None if there was nothing to send.

        A number that is not finite without a failure that says why becomes one: it must reach no trajectory.

        Raises:
            ServerError: the answer does not fit the request.
        """
        n_atoms = np.array(self.n_atoms, dtype=np.int64)
        energy = np.full(len(n_atoms), np.nan)
        forces = np.full((int(n_atoms.sum()), 3), np.nan) if wish.forces else None
        stress = np.full((len(n_atoms), 3, 3), np.nan) if wish.stress else None
        failures = list(self.failures)
        uncertainty = None
        if response is not None:
            answer = self._decode(wish, response)
            if answer.uncertainty is not None:
                uncertainty = among(answer.uncertainty, self.places, n_atoms)
            energy[self.places] = answer.energy
            if forces is not None and answer.forces is not None:
                sent = np.zeros(len(n_atoms), dtype=np.bool_)
                sent[self.places] = True
                forces[np.repeat(sent, n_atoms)] = answer.forces
            if stress is not None and answer.stress is not None:
                stress[self.places] = answer.stress
            failures += [replace(failure, index=self.places[failure.index]) for failure in answer.failures]
            failed = {failure.index for failure in failures}
            failures += [
                Failure(place, FailureReason.NOT_FINITE, "", "the answer is not a finite number", "report it")
                for place in _not_finite(energy, forces, n_atoms)
                if place not in failed
            ]
        failures.sort(key=lambda failure: failure.index)
        model = None if response is None else ModelReference.from_wire(response.model)
        return Predictions(n_atoms, energy, forces, stress, tuple(failures), model, uncertainty)

    def _decode(self, wish: Wish, response: pb.PredictResponse) -> PredictionArrays:
        try:
            answer = decode_predictions(response, [len(structure) for structure in self.structures])
        except CodecError as error:
            raise ServerError(f"the answer does not fit the request: {error}") from error
        if (wish.forces and answer.forces is None) or (wish.stress and answer.stress is None):
            raise ServerError("the answer lacks the forces or the stress that were asked for")
        if wish.uncertainty is not None and answer.uncertainty is None:
            raise ServerError("the answer does not say how sure it is: the server is older than this client")
        return answer


def gone_meanwhile(wish: Wish, error: ModelNotFound) -> ClientError:
    """The error of a part whose model is not found: what it means if the batch was begun with it."""
    if not wish.settled:
        return error
    return ModelChanged(
        f"{wish.model} went while a batch was computed with it ({error}): ask again, which computes all of it"
        " with what is there now"
    )


def cut(
    structures: Iterable[object], limits: Limits, *, atoms_per_request: int, max_message_bytes: int
) -> Iterator[Part]:
    """Parts within every limit, in order, made as the structures come.

    A structure that cannot be one, or that no request could hold, is refused alone; the others go on.
    """
    max_bytes = limits.message_bytes(max_message_bytes) - _BYTES_PER_REQUEST
    max_atoms = min(atoms_per_request, limits.max_atoms_per_request or atoms_per_request)
    max_structures = limits.max_structures_per_request or atoms_per_request
    part = Part()
    for item in structures:
        try:
            structure = as_structure(item)
        except InvalidStructure as error:
            part.refuse(FailureReason.INVALID_STRUCTURE, error, count_atoms(item))
        else:
            too_large = _too_large(structure, limits, max_bytes)
            if too_large is not None:
                part.refuse(FailureReason.TOO_LARGE, too_large, len(structure))
            else:
                if part.structures and (
                    part.size + len(structure) > max_atoms
                    or _request_bytes(len(part.structures) + 1, part.size + len(structure)) > max_bytes
                ):
                    yield part
                    part = Part()
                part.add(structure)
        if len(part.n_atoms) >= max_structures:
            yield part
            part = Part()
    if part.n_atoms:
        yield part


def _request_bytes(n_structures: int, n_atoms: int) -> int:
    return n_structures * REQUEST_BYTES_PER_STRUCTURE + n_atoms * REQUEST_BYTES_PER_ATOM


def _too_large(structure: Structure, limits: Limits, max_bytes: int) -> InvalidStructure | None:
    n_atoms = len(structure)
    for limit in (limits.max_atoms_per_structure, limits.max_atoms_per_request):
        if limit and n_atoms > limit:
            return InvalidStructure(
                "n_atoms",
                f"{n_atoms} atoms, the server takes {limit}",
                "split the structure or raise the server's limit",
            )
    if _request_bytes(1, n_atoms) > max_bytes:
        return InvalidStructure(
            "n_atoms",
            f"{n_atoms} atoms take {_request_bytes(1, n_atoms)} bytes, a message {max_bytes}",
            "raise max_message_bytes of the client and the server",
        )
    return None


def _not_finite(energy: FloatArray, forces: FloatArray | None, n_atoms: Int64Array) -> list[int]:
    bad = ~np.isfinite(energy)
    if forces is not None:
        atom_of_structure = np.repeat(np.arange(len(n_atoms)), n_atoms)
        bad[atom_of_structure[~np.isfinite(forces).all(axis=1)]] = True
    return [int(index) for index in np.flatnonzero(bad)]
