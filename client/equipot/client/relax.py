"""Relaxations on a server: what is asked, and results as they come, each once. Opens no connection itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import numpy as np

from equipot.client.batches import PRIORITIES, Part, Wish
from equipot.client.certainty import Certainty
from equipot.client.moving import Moves, certainty_told, failure_of, fixed_of, flags, floats, word
from equipot.client.results import ModelReference
from equipot.client.structures import Structure, pack
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import BoolArray, Failure, FloatArray, encode_structures

OptimizerName = Literal["fire", "lbfgs"]
CellMotion = Literal["fixed", "full", "isotropic", "constant_volume"]

TOKEN_EVERY = 20
"""Steps after which the server tells where a structure is, to go on from there after a lost connection."""

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
        return pb.RelaxRequest(
            model=wish.model,
            structures=encode_structures(pack(list(structures))),
            level_of_theory=wish.level_of_theory,
            priority=PRIORITIES[wish.priority],
            session=wish.session,
            optimizer=word(pb.Optimizer, "optimizer", self.optimizer),
            fmax=self.fmax,
            max_steps=self.steps,
            max_step=self.max_step,
            cell=word(pb.CellMotion, "cell", self.cell, prefix="CELL_MOTION"),
            pressure=self.pressure,
            fixed=flags(fixed),
            uncertainty=wish.options,
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
        uncertainty: how sure the answer is there; None if not asked for, or it failed.
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
    uncertainty: Certainty | None = None


def relaxations(
    items: Sequence[object],
    parts: Iterable[Part],
    wish: Wish,
    how: RelaxSettings,
    *,
    told: Progressed | None,
    most_bytes: int,
) -> Iterator[Relaxation]:
    """The requests for these items, of which `parts` are the items, cut; made as each is wanted."""
    start = 0
    for part in parts:
        fixed = fixed_of(items, part, start)
        relaxation = Relaxation(part, fixed, wish, how, start=start, told=told, most_bytes=most_bytes)
        yield relaxation
        start += len(part.n_atoms)
        # All parts by one bundle, whatever its name comes to mean meanwhile.
        wish = relaxation.wish


class Relaxation(Moves):
    """One request's worth of structures, until each has its result: (index among all items, result)."""

    def __init__(
        self,
        part: Part,
        fixed: Sequence[BoolArray],
        wish: Wish,
        how: RelaxSettings,
        *,
        start: int = 0,
        told: Progressed | None = None,
        most_bytes: int,
    ) -> None:
        """Nothing of it is asked yet.

        Args:
            part: the structures, and those refused at once.
            fixed: of each structure of the part, the atoms that stay.
            wish: what is asked of the model.
            how: to relax.
            start: the index of the part's first item among all.
            told: of progress; None: nobody is.
            most_bytes: of one request.
        """
        super().__init__(part, wish, start=start, most_bytes=most_bytes)
        self._fixed = fixed
        self._how = how
        self._told = told
        self._reached: dict[int, int] = {}

    def refused(self) -> Iterator[tuple[int, Relaxed]]:
        """What is known before anything is asked: structures that are not sent."""
        for failure in self.part.failures:
            index = self.start + failure.index
            yield index, _refused(replace(failure, index=index), self.part.n_atoms[failure.index])

    def request(self) -> pb.RelaxRequest:
        """For all that have no result yet, each from its last token."""
        asked = self.ask_for()
        request = self._how.request(
            self.wish,
            [self.part.structures[number] for number in asked],
            [self._fixed[number] for number in asked],
        )
        request.progress_every = int(self._told is not None)
        request.token_every = TOKEN_EVERY
        request.tokens.extend(self.tokens_within(request.ByteSize()))
        return request

    def take(self, reply: pb.RelaxReply) -> Iterator[tuple[int, Relaxed]]:
        """What a reply to the last request means.

        Raises:
            ModelChanged: another bundle answers than the one that answered first.
            ServerError: it does not fit the request.
        """
        match reply.WhichOneof("kind"):
            case "begun":
                self.settle(ModelReference.from_wire(reply.begun.model))
            case "token":
                self.keep(reply.token)
            case "progress" if self._told is not None:
                progress = reply.progress
                number = self.number_of(progress.index)
                if progress.step > self._reached.get(number, -1):
                    self._reached[number] = progress.step
                    self.headway += 1
                self._told(
                    self.index_of(progress.index), progress.step, progress.energy, progress.largest_force
                )
            case "result":
                yield self._result(reply.result)

    def _result(self, result: pb.RelaxResult) -> tuple[int, Relaxed]:
        n_atoms = self.finish(result.index)
        model = ModelReference.from_wire(result.model)
        self.settle(model)
        index = self.index_of(result.index)
        return index, relaxed_of(result, n_atoms, index)


def relaxed_of(result: pb.RelaxResult, n_atoms: int, index: int) -> Relaxed:
    """The result of a structure with so many atoms, whose failure bears this index.

    Raises:
        ServerError: it does not fit the structure.
    """
    failure = failure_of(result, index)
    if failure is not None and not result.HasField("model"):
        return _refused(failure, n_atoms)
    return Relaxed(
        positions=floats(result.positions, (n_atoms, 3)),
        cell=floats(result.cell, (3, 3)),
        energy=math.nan if failure else result.energy,
        forces=None if failure else floats(result.forces, (n_atoms, 3)),
        stress=floats(result.stress, (3, 3)) if result.stress and not failure else None,
        converged=result.converged,
        steps=result.steps,
        failure=failure,
        model=ModelReference.from_wire(result.model),
        uncertainty=certainty_told(result, n_atoms),
    )


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
