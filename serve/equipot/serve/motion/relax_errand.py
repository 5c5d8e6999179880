"""Requests of `Relax`: words to optimisers, and what is told of structures as they come to rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from equipot.serve.job import Work
from equipot.serve.models import ServedModel
from equipot.serve.motion.crew import Member, algorithm_failed
from equipot.serve.motion.errand import (
    as_bytes,
    bad_token,
    failure_of,
    fixed_of,
    one_each,
    periodic,
    question,
    structure_digest,
    token_of,
    word,
)
from equipot.serve.motion.notes import Advance, Kept
from equipot.serve.motion.relaxation import Relaxation, Telling, advance, begun
from equipot.serve.motion.relaxing import OptimizerName, Relaxing
from equipot.serve.motion.state import BadState, Origin, unseal
from equipot.serve.motion.strain import CellMotion
from equipot.serve.servicer import PotentialServicer
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.certainty import encode_uncertainty

AT_ONCE = 64
"""Structures that are moved in one go, which takes about a millisecond."""

logger = logging.getLogger(__name__)

_OPTIMIZERS: dict[int, OptimizerName] = {pb.OPTIMIZER_LBFGS: "lbfgs"}
_CELLS: dict[int, CellMotion] = {
    pb.CELL_MOTION_FULL: "full",
    pb.CELL_MOTION_ISOTROPIC: "isotropic",
    pb.CELL_MOTION_CONSTANT_VOLUME: "constant_volume",
}


@dataclass(frozen=True, slots=True, eq=False)
class RelaxErrand:
    """One understood request."""

    method: ClassVar[str] = "relax"

    work: Work
    request: pb.RelaxRequest
    how: Relaxing
    fixed: npt.NDArray[np.bool_]
    reference: pb.ModelReference

    @classmethod
    def understand(
        cls,
        request: pb.RelaxRequest,
        model: ServedModel,
        potential: PotentialServicer,
        *,
        accepted: bool = False,
    ) -> Self:
        """What is asked; `accepted`: see `PotentialServicer.understand`.

        Raises:
            CallError: the request as a whole cannot be done.
        """
        asked = question(request, stress=request.cell in _CELLS)
        work = potential.understand(asked, model, None, accepted=accepted)
        defaults = Relaxing()
        how = Relaxing(
            optimizer=_OPTIMIZERS.get(word(pb.Optimizer, "optimizer", request.optimizer), "fire"),
            fmax=request.fmax or defaults.fmax,
            steps=request.max_steps or defaults.steps,
            max_step=request.max_step or defaults.max_step,
            cell=_CELLS.get(word(pb.CellMotion, "cell", request.cell), "fixed"),
            pressure=request.pressure,
        )
        fixed = fixed_of(request.fixed, work)
        one_each("tokens", request.tokens, len(work.structures))
        if how.moves_cell:
            periodic(work)
        return cls(work, request, how, fixed, model.reference(work.level))

    def opening(self) -> pb.RelaxReply:
        """What is told at once."""
        return pb.RelaxReply(begun=pb.MotionBegun(model=self.reference))

    @property
    def at_once(self) -> int:
        """How many structures `advance` takes in one go."""
        return AT_ONCE

    def begin(self, index: int) -> Member:
        """One structure, at its beginning or where its token says."""
        arrays, part = self.work.structures, self._part(index)
        place = arrays.positions[part], arrays.cell[index], self.fixed[part]
        token = self.request.tokens[index] if self.request.tokens else b""
        try:
            state = unseal(token, self._origin(index)) if token else None
            return Member(index, begun(self.how, *place, state))
        except BadState as error:
            return Member(index, begun(self.how, *place), fault=bad_token(error))

    def advance(self, members: Sequence[Member]) -> None:
        """Takes these to their next questions, their ends or their faults."""
        telling = Telling(
            every=self.request.progress_every,
            frames=self.request.progress_frames,
            keep_every=self.request.token_every,
        )
        some = [member.course for member in members if isinstance(member.course, Relaxation)]
        for member, one in zip(members, some, strict=True):
            if member.given is not None:
                one.progress.last = member.given
        try:
            advance(some, self.how, telling)
        except Exception:
            logger.exception("the optimiser of %d structures failed", len(some))
            for member in members:
                member.fault = algorithm_failed(member)
        for member, one in zip(members, some, strict=True):
            member.fault = member.fault or one.fault
            member.goes_on = one.goes_on

    def told(self, member: Member) -> Iterator[pb.RelaxReply]:
        """Progress and tokens, and the result of a member that is done."""
        progress = member.course.progress
        notes, progress.notes = progress.notes, []
        for note in notes:
            match note:
                case Advance(step, energy, largest_force, frame):
                    told = pb.RelaxProgress(
                        index=member.index, step=step, energy=energy, largest_force=largest_force
                    )
                    if frame is not None:
                        told.positions = as_bytes(frame.positions)
                        told.cell = as_bytes(frame.cell)
                        told.forces = as_bytes(frame.forces)
                    yield pb.RelaxReply(progress=told)
                case Kept():
                    yield pb.RelaxReply(token=token_of(member.index, note, self._origin(member.index)))
        if not member.goes_on:
            yield pb.RelaxReply(result=self._result(member))

    def _part(self, index: int) -> slice:
        return slice(self.work.offsets[index], self.work.offsets[index + 1])

    def _origin(self, index: int) -> Origin:
        digest = structure_digest(self.work, index, self.fixed[self._part(index)])
        return self.how.origin(self.reference.digest, self.reference.level_of_theory, digest)

    def _result(self, member: Member) -> pb.RelaxResult:
        progress = member.course.progress
        result = pb.RelaxResult(
            index=member.index,
            converged=progress.converged and member.fault is None,
            steps=progress.steps,
            positions=as_bytes(member.course.positions),
            cell=as_bytes(member.course.cell),
            energy=np.nan,
            model=self.reference,
        )
        if member.fault is not None:
            result.failure.CopyFrom(failure_of(member))
            if progress.steps:
                result.failure.message = f"after {progress.steps} steps: {result.failure.message}"
        elif progress.last is not None:
            result.energy = progress.last.energy
            result.forces = as_bytes(progress.last.forces)
            if progress.last.stress is not None:
                result.stress = as_bytes(progress.last.stress)
            if member.certainty is not None:
                result.uncertainty.CopyFrom(encode_uncertainty(member.certainty))
        return result
