"""Requests of `Simulate`: words to integrators, and what is told of structures as they move."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
from ase import Atoms
from ase.constraints import FixAtoms
from ase.data import atomic_masses

from equipot.serve.errors import InvalidRequest
from equipot.serve.job import Work
from equipot.serve.models import ServedModel
from equipot.serve.motion.crew import Member, algorithm_failed
from equipot.serve.motion.dynamics import MOST_MOVED, Dynamics, IntegratorName, Start, Watch
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
from equipot.serve.motion.notes import Frame, Kept, Observation
from equipot.serve.motion.state import BadState, FloatArray, Origin, unseal
from equipot.serve.motion.walker import Halt, Walker
from equipot.serve.servicer import PotentialServicer
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.certainty import UncertaintyArrays, encode_uncertainty
from equipot.wire.v1.codec import CodecError, decode_flags, decode_floats

logger = logging.getLogger(__name__)

_INTEGRATORS: dict[int, IntegratorName] = {
    pb.INTEGRATOR_UNSPECIFIED: "velocity_verlet",
    pb.INTEGRATOR_VELOCITY_VERLET: "velocity_verlet",
    pb.INTEGRATOR_LANGEVIN: "langevin",
    pb.INTEGRATOR_NOSE_HOOVER: "nose_hoover",
    pb.INTEGRATOR_BUSSI: "bussi",
    pb.INTEGRATOR_MTK_ISOTROPIC: "mtk_isotropic",
    pb.INTEGRATOR_MTK: "mtk",
}


@dataclass(frozen=True, slots=True, eq=False)
class SimulateErrand:
    """One understood request.

    Attributes:
        work: what it asks for at every step.
        request: as it came.
        how: to move.
        masses: (N,) in unified atomic mass units.
        velocities: (N, 3) in Å/fs; zeros where they are drawn.
        drawn: (S,) whether they are.
        fixed: (N,) atoms that stay.
        reference: what computes.
        warnings: what looks wrong.
    """

    method: ClassVar[str] = "simulate"

    work: Work
    request: pb.SimulateRequest
    how: Dynamics
    masses: FloatArray
    velocities: FloatArray
    drawn: npt.NDArray[np.bool_]
    fixed: npt.NDArray[np.bool_]
    reference: pb.ModelReference
    warnings: list[str]

    @classmethod
    def understand(
        cls,
        request: pb.SimulateRequest,
        model: ServedModel,
        potential: PotentialServicer,
        *,
        accepted: bool = False,
    ) -> Self:
        """What is asked; `accepted`: see `PotentialServicer.understand`.

        Raises:
            CallError: the request as a whole cannot be done.
        """
        how = Dynamics(
            integrator=_INTEGRATORS[word(pb.Integrator, "integrator", request.integrator)],
            steps=request.steps,
            timestep=request.timestep or 1.0,
            temperature=request.temperature,
            final_temperature=request.final_temperature if request.HasField("final_temperature") else None,
            friction=request.friction or None,
            thermostat_time=request.thermostat_time or None,
            pressure=request.pressure,
            barostat_time=request.barostat_time or None,
        )
        stress = how.moves_cell or request.frame_stress
        work = potential.understand(question(request, stress=stress), model, None, accepted=accepted)
        n_atoms, n_structures = len(work.structures.positions), len(work.structures)
        fixed = fixed_of(request.fixed, work)
        how.check_fixed(fixed)
        one_each("tokens", request.tokens, n_structures)
        one_each("seeds", request.seeds, n_structures)
        if how.moves_cell:
            periodic(work)
        try:
            given = bool(request.velocities)
            velocities = (
                decode_floats("velocities", request.velocities, (n_atoms, 3))
                if given
                else np.zeros((n_atoms, 3))
            )
            drawn = (
                decode_flags("drawn", request.drawn, n_structures)
                if request.drawn
                else np.full(n_structures, not given)
            )
            masses = (
                decode_floats("masses", request.masses, (n_atoms,))
                if request.masses
                else standard_masses(work.structures.atomic_numbers)
            )
        except CodecError as error:
            raise InvalidRequest(str(error), field=error.field) from error
        warnings = how.warnings(masses, conservative=model.card.force_mode != "direct")
        return cls(
            work,
            request,
            how,
            masses,
            velocities,
            drawn,
            fixed,
            model.reference(work.level),
            warnings,
        )

    def opening(self) -> pb.SimulateReply:
        """What is told at once."""
        return pb.SimulateReply(begun=pb.MotionBegun(model=self.reference, warnings=self.warnings))

    @property
    def at_once(self) -> int:
        """ASE moves them one by one."""
        return 1

    def begin(self, index: int) -> Member:
        """One structure, at its beginning or where its token says."""
        request = self.request
        start = Start(
            velocities=None if self.drawn[index] else self.velocities[self._part(index)],
            seed=request.seeds[index] if request.seeds else index,
        )
        watch = Watch(
            frames=request.frame_every,
            forces=request.frame_forces,
            stress=request.frame_stress,
            observations=request.observe_every,
            states=request.token_every,
        )
        algorithm = self.how.algorithm(start, watch)
        token = request.tokens[index] if request.tokens else b""
        try:
            state = unseal(token, self._origin(index)) if token else None
            walker = Walker(self._atoms(index), algorithm, resumed=state, most_moved=MOST_MOVED)
            return Member(index, walker)
        except BadState as error:
            return Member(index, Walker(self._atoms(index), algorithm), fault=bad_token(error))

    def advance(self, members: Sequence[Member]) -> None:
        """Takes these to their next questions, their ends or their faults."""
        for member in members:
            walker = member.course
            assert isinstance(walker, Walker)
            try:
                member.goes_on = walker.advance(member.given)
            except Halt as halt:
                member.fault = halt.fault
            except BadState as error:
                member.fault = bad_token(error)
            except Exception:
                logger.exception("the algorithm of structure %d failed", member.index)
                member.fault = algorithm_failed(member)
            else:
                member.fault = walker.fault() if member.goes_on else None

    def told(self, member: Member) -> Iterator[pb.SimulateReply]:
        """Frames, observations and tokens, and the result of a member that is done."""
        progress = member.course.progress
        notes, progress.notes = progress.notes, []
        for note in notes:
            match note:
                case Frame():
                    # Its step is that of the last answer: no other is asked for before this is told.
                    yield pb.SimulateReply(frame=_frame(member.index, note, member.certainty))
                case Observation():
                    yield pb.SimulateReply(observation=_observation(member.index, note))
                case Kept():
                    yield pb.SimulateReply(token=token_of(member.index, note, self._origin(member.index)))
        if not member.goes_on:
            result = pb.SimulateResult(index=member.index, steps=progress.steps, model=self.reference)
            if member.fault is not None:
                result.failure.CopyFrom(failure_of(member))
                result.failure.message = f"after {progress.steps} steps: {result.failure.message}"
                positions, cell = member.course.positions, member.course.cell
                # What failed before anything was computed has not moved.
                if progress.last is not None and np.isfinite(positions).all() and np.isfinite(cell).all():
                    result.positions, result.cell = as_bytes(positions), as_bytes(cell)
            yield pb.SimulateReply(result=result)

    def _atoms(self, index: int) -> Atoms:
        """As they were sent."""
        arrays, part = self.work.structures, self._part(index)
        atoms = Atoms(
            numbers=arrays.atomic_numbers[part],
            positions=arrays.positions[part],
            cell=arrays.cell[index],
            pbc=arrays.pbc[index],
        )
        if self.fixed[part].any():
            atoms.set_constraint(FixAtoms(mask=self.fixed[part]))
        atoms.set_masses(self.masses[part])
        return atoms

    def _part(self, index: int) -> slice:
        return slice(self.work.offsets[index], self.work.offsets[index + 1])

    def _origin(self, index: int) -> Origin:
        part = self._part(index)
        digest = structure_digest(self.work, index, self.fixed[part], self.masses[part])
        return self.how.origin(self.reference.digest, self.reference.level_of_theory, digest)


def standard_masses(atomic_numbers: npt.NDArray[np.int32]) -> FloatArray:
    """(N,) in unified atomic mass units; NaN for what is no element."""
    known = (atomic_numbers >= 0) & (atomic_numbers < len(atomic_masses))
    masses: FloatArray = np.where(known, atomic_masses[np.where(known, atomic_numbers, 0)], np.nan)
    return masses


def _frame(index: int, frame: Frame, certainty: UncertaintyArrays | None) -> pb.MotionFrame:
    return pb.MotionFrame(
        index=index,
        step=frame.step,
        positions=as_bytes(frame.positions),
        velocities=as_bytes(frame.velocities),
        cell=as_bytes(frame.cell),
        energy=frame.energy,
        kinetic_energy=frame.kinetic_energy,
        temperature=frame.temperature,
        forces=b"" if frame.forces is None else as_bytes(frame.forces),
        stress=b"" if frame.stress is None else as_bytes(frame.stress),
        uncertainty=None if certainty is None else encode_uncertainty(certainty),
    )


def _observation(index: int, seen: Observation) -> pb.MotionObservation:
    return pb.MotionObservation(
        index=index,
        step=seen.step,
        energy=seen.energy,
        kinetic_energy=seen.kinetic_energy,
        temperature=seen.temperature,
        volume=seen.volume,
        pressure=seen.pressure,
        largest_force=seen.largest_force,
    )
