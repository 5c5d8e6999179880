"""What the client answers with: predictions in the caller's order, and what is known of a model. No gRPC."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, overload

import numpy as np

from equipot.client.certainty import Certainty, certainty_of, concatenated
from equipot.client.errors import ModelChanged, StructureFailure
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.certainty import UncertaintyArrays
from equipot.wire.v1.codec import Failure, FloatArray, Int64Array, offsets_of

_STATES: Mapping[int, str] = MappingProxyType(
    {
        pb.MODEL_STATE_AVAILABLE: "available",
        pb.MODEL_STATE_LOADING: "loading",
        pb.MODEL_STATE_READY: "ready",
        pb.MODEL_STATE_FAILED: "failed",
    }
)


@dataclass(frozen=True, slots=True)
class ModelReference:
    """Which model computed an answer.

    Attributes:
        name: as the server calls it.
        digest: "sha256:…" over the bundle's card and weights.
        level_of_theory: whose total energies these are.
        dtype: what the network computed in.
        tensor_parallel: over how many ranks.
        batch_invariant: whether a structure gets the same bits whatever shares its batch.
        version: in the server's repository; empty if it has none.
    """

    name: str
    digest: str
    level_of_theory: str
    dtype: str
    tensor_parallel: int
    batch_invariant: bool = False
    version: str = ""

    @property
    def pinned(self) -> str:
        """The name to ask for to get exactly this bundle and no later one."""
        return f"{self.name}@{self.digest}"

    @staticmethod
    def from_wire(message: pb.ModelReference) -> ModelReference:
        """The reference in a reply."""
        return ModelReference(
            message.name,
            message.digest,
            message.level_of_theory,
            message.dtype,
            message.tensor_parallel,
            message.batch_invariant,
            message.version,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes; 0: it does not say."""

    max_atoms_per_structure: int
    max_structures_per_request: int
    max_atoms_per_request: int
    max_message_bytes: int

    def message_bytes(self, most: int) -> int:
        """Most bytes of one request, of a client that sends no more than `most` itself."""
        return min(most, self.max_message_bytes or most)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model. Units: cutoff in Å. What a model does not say is empty or 0.

    Attributes:
        force_mode: "conservative", "direct", "unknown", or "none" if it gives no forces.
        limits: of the server that serves it.
        card_json: the bundle's whole card, or what is known of another potential.
        version: in the server's repository; empty if it has none.
        labels: that name this version.
        state: "available" (loaded when it is asked for), "loading", "ready" or "failed".
        reason: why it failed.
        is_current: whether its plain name means this version.
        members: potentials in it, whose mean is the prediction; 0 if it does not say.
        is_calibrated: whether it knows intervals that hold the truth.
        has_domain: whether it knows where its training ended.
    """

    name: str
    digest: str
    levels_of_theory: tuple[str, ...]
    elements: tuple[int, ...]
    charges: tuple[int, ...]
    spin_multiplicities: tuple[int, ...]
    cutoff: float
    force_mode: str
    has_stress: bool
    dtype: str
    n_parameters: int
    is_default: bool
    limits: Limits
    card_json: str
    version: str = ""
    labels: tuple[str, ...] = ()
    state: str = ""
    reason: str = ""
    is_current: bool = True
    members: int = 0
    is_calibrated: bool = False
    has_domain: bool = False

    @property
    def card(self) -> dict[str, Any]:
        """The bundle's card: configuration, provenance, metrics; empty if the server did not send it."""
        card: dict[str, Any] = json.loads(self.card_json or "{}")
        return card

    @staticmethod
    def from_wire(message: pb.Model) -> ModelInfo:
        """The model in a reply."""
        limits = message.limits
        return ModelInfo(
            name=message.name,
            digest=message.digest,
            levels_of_theory=tuple(message.levels_of_theory),
            elements=tuple(message.elements),
            charges=tuple(message.charges),
            spin_multiplicities=tuple(message.spin_multiplicities),
            cutoff=message.cutoff,
            force_mode=message.force_mode,
            has_stress=message.has_stress,
            dtype=message.dtype,
            n_parameters=message.n_parameters,
            is_default=message.is_default,
            limits=Limits(
                limits.max_atoms_per_structure,
                limits.max_structures_per_request,
                limits.max_atoms_per_request,
                limits.max_message_bytes,
            ),
            card_json=message.card_json,
            version=message.version,
            labels=tuple(message.labels),
            state=_STATES.get(message.state, ""),
            reason=message.reason,
            is_current=message.is_current,
            members=message.members,
            is_calibrated=message.is_calibrated,
            has_domain=message.has_domain,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The answer for one structure.

    Attributes:
        energy: eV; NaN if it failed.
        forces: (n, 3) in eV/Å; None if not asked for, NaN if it failed.
        stress: (3, 3) in eV/Å³, positive in tension; None if not asked for, NaN if it failed or the structure
            is not periodic in all three directions.
        failure: why it failed; None if it did not.
        model: what computed it; None if it was refused before anything was sent.
        uncertainty: how sure it is; None if not asked for, or it was refused before anything was sent.
    """

    energy: float
    forces: FloatArray | None
    stress: FloatArray | None
    failure: Failure | None
    model: ModelReference | None
    uncertainty: Certainty | None = None

    def raise_for_failure(self) -> None:
        """Raises StructureFailure if this structure failed."""
        if self.failure is not None:
            raise StructureFailure(self.failure)


@dataclass(frozen=True, slots=True, eq=False)
class Predictions(Sequence[Prediction]):
    """The answers for a batch of S structures with N atoms in all, in the order they were given.

    Attributes:
        n_atoms: (S,) int64; 0 for a structure whose atoms could not be counted.
        energy: (S,) in eV, NaN where the structure failed.
        forces: (N, 3) in eV/Å, structure after structure; None if not asked for.
        stress: (S, 3, 3) in eV/Å³, positive in tension; None if not asked for.
        failures: by index into the batch.
        model: what computed them; None if nothing was sent.
        uncertainty: how sure they are, by structure (S,) and atom (N,); None if not asked for.
    """

    n_atoms: Int64Array
    energy: FloatArray
    forces: FloatArray | None
    stress: FloatArray | None
    failures: tuple[Failure, ...]
    model: ModelReference | None
    uncertainty: UncertaintyArrays | None = None

    def __len__(self) -> int:
        """Number of structures."""
        return len(self.energy)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prediction]: ...
    def __getitem__(self, index: int | slice) -> Prediction | list[Prediction]:
        """One prediction, or a list of them."""
        if isinstance(index, slice):
            return list(self)[index]
        if not -len(self) <= index < len(self):
            raise IndexError(f"prediction {index} of {len(self)}")
        index %= len(self)
        first = int(self.n_atoms[:index].sum())
        failure = next((failure for failure in self.failures if failure.index == index), None)
        return self._at(index, slice(first, first + int(self.n_atoms[index])), failure)

    def __iter__(self) -> Iterator[Prediction]:
        """The predictions in order."""
        offsets = offsets_of(self.n_atoms).tolist()
        failures = {failure.index: failure for failure in self.failures}
        for index in range(len(self)):
            yield self._at(index, slice(offsets[index], offsets[index + 1]), failures.get(index))

    def _at(self, index: int, atoms: slice, failure: Failure | None) -> Prediction:
        return Prediction(
            energy=float(self.energy[index]),
            forces=None if self.forces is None else self.forces[atoms],
            stress=None if self.stress is None else self.stress[index],
            failure=failure,
            model=self.model,
            uncertainty=None if self.uncertainty is None else certainty_of(self.uncertainty, index, atoms),
        )

    def raise_for_failures(self) -> None:
        """Raises StructureFailure, naming the first and counting the others, if any structure failed."""
        if self.failures:
            raise StructureFailure(self.failures[0], others=len(self.failures) - 1)

    @staticmethod
    def concatenate(parts: Sequence[Predictions], *, forces: bool, stress: bool) -> Predictions:
        """One batch of several; `forces` and `stress` say what an empty batch would hold.

        Raises:
            ModelChanged: the parts were computed by different bundles.
        """
        if len(parts) == 1:
            return parts[0]
        starts = offsets_of(np.array([len(part) for part in parts], dtype=np.int64)).tolist()
        model: ModelReference | None = None
        for part in parts:
            model = same_model(model, part.model)
        return Predictions(
            n_atoms=np.concatenate([np.zeros(0, dtype=np.int64), *(part.n_atoms for part in parts)]),
            energy=np.concatenate([np.zeros(0), *(part.energy for part in parts)]),
            forces=np.concatenate(
                [np.zeros((0, 3)), *(part.forces for part in parts if part.forces is not None)]
            )
            if forces
            else None,
            stress=np.concatenate(
                [np.zeros((0, 3, 3)), *(part.stress for part in parts if part.stress is not None)]
            )
            if stress
            else None,
            failures=tuple(
                replace(failure, index=failure.index + start)
                for part, start in zip(parts, starts, strict=False)
                for failure in part.failures
            ),
            model=model,
            uncertainty=concatenated([(part.uncertainty, part.n_atoms) for part in parts]),
        )


def numbered(part: Predictions, start: int) -> Iterator[Prediction]:
    """A part's predictions, whose failures count from the beginning of the whole batch."""
    for prediction in part:
        failure = prediction.failure
        if failure is None:
            yield prediction
        else:
            yield replace(prediction, failure=replace(failure, index=failure.index + start))


def same_model(first: ModelReference | None, other: ModelReference | None) -> ModelReference | None:
    """The one of the two that is known.

    Raises:
        ModelChanged: both are, and they are different bundles or levels of theory.
    """
    if first is None or other is None:
        return first or other
    if (first.digest, first.level_of_theory) != (other.digest, other.level_of_theory):
        raise ModelChanged(
            f"the server changed its model from {first.pinned} ({first.level_of_theory}) to {other.pinned} "
            f"({other.level_of_theory}) between two parts of one batch: ask again, or ask for one bundle by "
            f"model={first.pinned!r}"
        )
    return first
