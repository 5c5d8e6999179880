"""Relaxations on a server: what is asked, and results as they come, each once. Opens no connection itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import grpc
import numpy as np
import numpy.typing as npt

from equipot.client.batches import PRIORITIES, Part, Wish
from equipot.client.errors import ClientError, InvalidRequest, ModelChanged, ModelNotFound, ServerError
from equipot.client.results import ModelReference
from equipot.client.retry import RetryPolicy
from equipot.client.structures import Structure, pack
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import BoolArray, Failure, FloatArray, decode_failures, encode_structures

OptimizerName = Literal["fire", "lbfgs"]
CellMotion = Literal["fixed", "full", "isotropic", "constant_volume"]

Ask = Callable[[pb.RelaxRequest], Iterator[pb.RelaxReply]]
Progressed = Callable[[int, int, float, float], None]
"""Told the index of a structure, its step, its energy in eV and its largest force in eV/Å."""


class RelaxWords(TypedDict, total=False):
    """How to relax; what is left out is as in `RelaxSettings`."""

    fmax: float
    steps: int
    optimizer: OptimizerName
    cell: CellMotion
    pressure: float
    max_step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaxSettings:
    """How to relax.

    Attributes:
        fmax: the largest force in eV/Å of a relaxed structure, the cell's included.
        steps: after which a structure is given up.
        optimizer: "fire" or "lbfgs", those of ASE.
        cell: "fixed", "full", "isotropic" or "constant_volume"; one that moves needs stress and three
            periodic directions.
        pressure: eV/Å³, from outside upon a cell whose volume moves.
        max_step: Å that an atom moves at most in a step.
    """

    fmax: float = 0.05
    steps: int = 500
    optimizer: OptimizerName = "fire"
    cell: CellMotion = "fixed"
    pressure: float = 0.0
    max_step: float = 0.2

    def request(
        self, wish: Wish, structures: Sequence[Structure], fixed: Sequence[BoolArray]
    ) -> pb.RelaxRequest:
        """The request for these structures, of which these atoms stay.

        Raises:
            InvalidRequest: a word that none of the settings has.
        """
        masks = np.concatenate(list(fixed)) if fixed else np.zeros(0, dtype=np.bool_)
        return pb.RelaxRequest(
            model=wish.model,
            structures=encode_structures(pack(list(structures))),
            level_of_theory=wish.level_of_theory,
            priority=PRIORITIES[wish.priority],
            session=wish.session,
            optimizer=_word(pb.Optimizer, "optimizer", self.optimizer),
            fmax=self.fmax,
            max_steps=self.steps,
            max_step=self.max_step,
            cell=_word(pb.CellMotion, "cell", self.cell, prefix="CELL_MOTION"),
            pressure=self.pressure,
            fixed=masks.astype(np.uint8).tobytes() if masks.any() else b"",
        )


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """Where one structure came to rest.

    Attributes:
        positions: (n, 3) in Å.
        cell: (3, 3) in Å.
        energy: eV; NaN if it failed.
        forces: (n, 3) in eV/Å; None if it failed.
        stress: (3, 3) in eV/Å³, positive in tension; None unless the cell moved.
        converged: whether its forces are below fmax; if not, it failed or ran out of steps.
        steps: taken.
        failure: why it could not go on; None if it could.
        model: what computed it; None if it was refused before anything was sent.
    """

    positions: FloatArray
    cell: FloatArray
    energy: float
    forces: FloatArray | None
    stress: FloatArray | None
    converged: bool
    steps: int
    failure: Failure | None
    model: ModelReference | None


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
                " others away, or relax with EquipotCalculator and ASE's own optimizer",
                field="fixed",
            )
        mask[constraint.index] = True
    return mask


@dataclass(frozen=True, slots=True)
class Relaxing:
    """How requests travel.

    Attributes:
        ask: sends one and reads its answers.
        understand: gRPC's error in our words.
        retry: when to ask again after the server was unavailable.
        told: of progress; None: nobody is.
    """

    ask: Ask
    understand: Callable[[grpc.RpcError], ClientError]
    retry: RetryPolicy
    told: Progressed | None

    def run(
        self, items: Sequence[object], parts: Iterable[Part], wish: Wish, how: RelaxSettings
    ) -> Iterator[tuple[int, Relaxed]]:
        """(index, result) of each item, in the order in which they are done; `parts` are the items, cut."""
        start = 0
        for part in parts:
            fixed = [
                fixed_atoms(items[start + place], len(structure))
                for place, structure in zip(part.places, part.structures, strict=True)
            ]
            relaxation = Relaxation(part, fixed, wish, how, self)
            for place, relaxed in relaxation.run(start):
                failure = relaxed.failure
                counted = (
                    relaxed
                    if failure is None
                    else replace(relaxed, failure=replace(failure, index=start + place))
                )
                yield start + place, counted
            start += len(part.n_atoms)
            # All parts by one bundle, whatever its name comes to mean meanwhile.
            wish = relaxation.wish


class Relaxation:
    """One request's worth of structures, until each has its result.

    Args:
        part: the structures, and those refused at once.
        fixed: of each structure of the part, the atoms that stay.
        wish: what is asked of the model.
        how: to relax.
        way: requests travel.

    Attributes:
        wish: the same of the bundle that answered, once one did.
    """

    def __init__(
        self, part: Part, fixed: Sequence[BoolArray], wish: Wish, how: RelaxSettings, way: Relaxing
    ) -> None:
        self._part = part
        self._fixed = fixed
        self.wish = wish
        self._how = how
        self._way = way
        self._open = list(range(len(part.structures)))

    def run(self, start: int) -> Iterator[tuple[int, Relaxed]]:
        """(place in the part, which begins at index `start`, and result), as structures are done.

        Raises:
            ModelChanged: another bundle answers than the one that answered first.
            ClientError: the request as a whole failed.
        """
        for failure in self._part.failures:
            yield failure.index, _refused(failure, self._part.n_atoms[failure.index])
        attempt = 1
        while self._open:
            try:
                for reply in self._way.ask(self._request()):
                    attempt = 1
                    if reply.HasField("progress"):
                        self._tell(start, reply.progress)
                        continue
                    yield self._settle(reply.result)
                if self._open:
                    raise ServerError(f"the answer ended with {len(self._open)} structures unanswered")
            except grpc.RpcError as error:
                problem, cause = self._in_its_words(self._way.understand(error)), error
            else:
                return
            delay = self._way.retry.delay(problem, attempt, math.inf)
            if delay is None:
                raise problem from cause
            time.sleep(delay)
            attempt += 1

    def _tell(self, start: int, progress: pb.RelaxProgress) -> None:
        if self._way.told is not None:
            place = self._part.places[self._asked[progress.index]]
            self._way.told(start + place, progress.step, progress.energy, progress.largest_force)

    def _request(self) -> pb.RelaxRequest:
        # Indices in answers are those of what was asked, while the open ones become fewer.
        self._asked = list(self._open)
        request = self._how.request(
            self.wish,
            [self._part.structures[number] for number in self._asked],
            [self._fixed[number] for number in self._asked],
        )
        request.progress_every = int(self._way.told is not None)
        return request

    def _settle(self, result: pb.RelaxResult) -> tuple[int, Relaxed]:
        number = self._asked[result.index]
        if number not in self._open:
            raise ServerError(f"structure {self._part.places[number]} was answered twice")
        self._open.remove(number)
        model = ModelReference.from_wire(result.model)
        # Whoever answered first goes on, also after the connection was lost.
        if "@sha256:" not in self.wish.model:
            self.wish = self.wish.settle(model.name, model.digest)
        elif not model.pinned.endswith(self.wish.model.partition("@")[2]):
            raise ModelChanged(f"{model.pinned} answers a relaxation that {self.wish.model} began")
        place = self._part.places[number]
        n_atoms = len(self._part.structures[number])
        failure = None
        if result.HasField("failure"):
            (failure,) = decode_failures([result.failure])
            failure = replace(failure, index=place)
        return place, Relaxed(
            positions=_array(result.positions, (n_atoms, 3)),
            cell=_array(result.cell, (3, 3)),
            energy=math.nan if failure else result.energy,
            forces=None if failure else _array(result.forces, (n_atoms, 3)),
            stress=_array(result.stress, (3, 3)) if result.stress and not failure else None,
            converged=result.converged,
            steps=result.steps,
            failure=failure,
            model=model,
        )

    def _in_its_words(self, problem: ClientError) -> ClientError:
        begun = self.wish.settled or len(self._open) < len(self._part.structures)
        if begun and isinstance(problem, ModelNotFound):
            return ModelChanged(f"{self.wish.model}, which the relaxation began with, is gone: {problem}")
        return problem


def _refused(failure: Failure, n_atoms: int) -> Relaxed:
    return Relaxed(
        positions=np.full((n_atoms, 3), math.nan),
        cell=np.full((3, 3), math.nan),
        energy=math.nan,
        forces=None,
        stress=None,
        converged=False,
        steps=0,
        failure=failure,
        model=None,
    )


def _array(raw: bytes, shape: tuple[int, ...]) -> FloatArray:
    array: npt.NDArray[np.float64] = np.frombuffer(raw, dtype="<f8").astype(np.float64)
    if array.size != math.prod(shape):
        raise ServerError(f"the answer has {array.size} numbers where {math.prod(shape)} were expected")
    return array.reshape(shape)


def _word(kinds: Any, name: str, word: str, prefix: str = "") -> Any:  # noqa: ANN401  # protobuf's enums
    full = f"{prefix or name.upper()}_{word.upper()}"
    if full not in kinds.keys():  # noqa: SIM118  # an enum of protobuf is no mapping
        allowed = ", ".join(
            key.removeprefix(f"{prefix or name.upper()}_").lower()
            for key in kinds.keys()  # noqa: SIM118
            if not key.endswith("UNSPECIFIED")
        )
        raise InvalidRequest(f"{name} is {word!r}; give one of {allowed}", field=name)
    return kinds.Value(full)
