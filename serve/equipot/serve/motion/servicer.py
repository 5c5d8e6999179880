"""The method `Relax` of `PotentialService`: words to algorithms, and results as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from ase import Atoms

from equipot.serve.dispatcher import Dispatcher
from equipot.serve.errors import Fault, InvalidRequest, NotReady, QueueFull
from equipot.serve.job import Work
from equipot.serve.metrics import Metrics
from equipot.serve.motion.crew import Member, Party
from equipot.serve.motion.relaxing import CellMotion, OptimizerName, Relaxing, with_fixed_atoms
from equipot.serve.motion.walker import Walker
from equipot.serve.servicer import RETRY_DRAINING, SERVICE, PotentialServicer
from equipot.serve.status import Context, guarded_reply_stream
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import CodecError, Failure, FailureReason, decode_flags, encode_failures

RETRY_MOVING = 5.0
"""Seconds after which some of what moves may have come to rest."""

UNREAD = 256
"""Results that wait for a caller who does not read; then its structures wait, too, and nobody else's."""

_OPTIMIZERS: dict[int, OptimizerName] = {pb.OPTIMIZER_LBFGS: "lbfgs"}
_CELLS: dict[int, CellMotion] = {
    pb.CELL_MOTION_FULL: "full",
    pb.CELL_MOTION_ISOTROPIC: "isotropic",
    pb.CELL_MOTION_CONSTANT_VOLUME: "constant_volume",
}


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """One understood request."""

    work: Work
    how: Relaxing
    fixed: npt.NDArray[np.bool_]

    def begin(self, index: int) -> Walker:
        """The walker of one structure."""
        arrays = self.work.structures
        atoms = slice(self.work.offsets[index], self.work.offsets[index + 1])
        moving = Atoms(
            numbers=arrays.atomic_numbers[atoms],
            positions=arrays.positions[atoms],
            cell=arrays.cell[index],
            pbc=arrays.pbc[index],
        )
        return Walker(with_fixed_atoms(moving, self.fixed[atoms]), self.how)


class MotionServicer:
    """Everything that moves structures here."""

    def __init__(
        self, potential: PotentialServicer, dispatcher: Dispatcher, metrics: Metrics, *, most_atoms: int
    ) -> None:
        """Moves atoms of all requests together up to a number, unless one request alone has more."""
        self._potential = potential
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._moving = ThreadPoolExecutor(1, "equipot-motion")
        self._parties: set[asyncio.Future[None]] = set()
        self._draining = False
        self._most_atoms = most_atoms
        self._atoms = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the method, beside those of the same service that are registered elsewhere."""
        handlers = {"Relax": guarded_reply_stream(self.relax, pb.RelaxRequest)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def drain(self) -> None:
        """Ends everything that moves: it may take hours, and its callers go on elsewhere."""
        self._draining = True
        for party in self._parties:
            party.cancel()

    def close(self) -> None:
        """Lets the thread go."""
        self._moving.shutdown(wait=False)

    async def relax(self, request: pb.RelaxRequest, context: Context) -> AsyncGenerator[pb.RelaxReply, None]:
        """Results, and progress if it is wanted, as structures come to rest."""
        model = self._potential.find(request, context)
        outbox: asyncio.Queue[pb.RelaxReply | None] = asyncio.Queue(UNREAD)
        with model.in_use():
            asked = self._understand(request, self._potential.understand(_question(request), model, None))
            reference = model.reference(asked.work.level)
            unfinished = len(asked.work.structures)
            n_atoms = asked.work.offsets[-1]
            if self._atoms and self._atoms + n_atoms > self._most_atoms:
                raise QueueFull(
                    f"relaxations of {self._atoms} atoms are under way and this one brings {n_atoms};"
                    f" the limit is {self._most_atoms}",
                    retry_after=RETRY_MOVING,
                )
            self._atoms += n_atoms

            async def tell(member: Member, goes_on: bool) -> None:
                nonlocal unfinished
                if goes_on:
                    await outbox.put(pb.RelaxReply(progress=_progress(member)))
                else:
                    unfinished -= 1
                    self._metrics.moving.dec()
                    await outbox.put(pb.RelaxReply(result=_result(member, reference)))

            party = Party(
                asked.work,
                asked.begin,
                moving=self._moving,
                dispatcher=self._dispatcher,
                tell=tell,
                every=request.progress_every,
            )
            marching = asyncio.ensure_future(self._march(party, outbox))
            self._parties.add(marching)
            self._metrics.moving.inc(unfinished)
            try:
                while (reply := await outbox.get()) is not None:
                    yield reply
                if self._draining and unfinished:
                    raise NotReady("the server is shutting down", retry_after=RETRY_DRAINING)
                if unfinished:
                    await marching
            finally:
                self._parties.discard(marching)
                marching.cancel()
                self._atoms -= n_atoms
                self._metrics.moving.dec(unfinished)

    async def _march(self, party: Party, outbox: asyncio.Queue[pb.RelaxReply | None]) -> None:
        try:
            await party.march()
        finally:
            # Behind what is there already: results that came are sent, whatever else.
            await outbox.put(None)

    def _understand(self, request: pb.RelaxRequest, work: Work) -> _Asked:
        defaults = Relaxing()
        for name, values in (("optimizer", pb.Optimizer.values()), ("cell", pb.CellMotion.values())):
            if (value := getattr(request, name)) not in values:
                raise InvalidRequest(f"{value} is no {name} this server knows", field=name)
        how = Relaxing(
            optimizer=_OPTIMIZERS.get(request.optimizer, "fire"),
            fmax=request.fmax or defaults.fmax,
            steps=request.max_steps or defaults.steps,
            max_step=request.max_step or defaults.max_step,
            cell=_CELLS.get(request.cell, "fixed"),
            pressure=request.pressure,
        )
        try:
            fixed = decode_flags("fixed", request.fixed, len(work.structures.positions))
        except CodecError as error:
            raise InvalidRequest(str(error), field=error.field) from error
        if how.moves_cell and not work.structures.pbc.all():
            index = int(np.flatnonzero(~work.structures.pbc.all(axis=1))[0])
            raise InvalidRequest(
                f"structure {index} is not periodic in all three directions, so its cell cannot move:"
                " relax it with a fixed cell, or in a request of its own",
                field="cell",
            )
        return _Asked(work, how, fixed)


def _question(request: pb.RelaxRequest) -> pb.PredictRequest:
    """What is asked at every step."""
    properties = [pb.PROPERTY_ENERGY, pb.PROPERTY_FORCES]
    properties += [pb.PROPERTY_STRESS] if request.cell in _CELLS else []
    return pb.PredictRequest(
        model=request.model,
        structures=request.structures if request.HasField("structures") else None,
        properties=properties,
        level_of_theory=request.level_of_theory,
        session=request.session,
        priority=request.priority,
    )


def _progress(member: Member) -> pb.RelaxProgress:
    progress = member.walker.progress
    assert progress.last is not None
    return pb.RelaxProgress(
        index=member.index,
        step=progress.steps,
        energy=progress.last.energy,
        largest_force=progress.largest_force,
    )


def _result(member: Member, model: pb.ModelReference) -> pb.RelaxResult:
    progress, atoms = member.walker.progress, member.walker.atoms
    result = pb.RelaxResult(
        index=member.index,
        converged=progress.converged and member.fault is None,
        steps=progress.steps,
        positions=_bytes(atoms.positions),
        cell=_bytes(atoms.cell[:]),
        energy=np.nan,
        model=model,
    )
    if member.fault is not None:
        failure = member.fault
        if isinstance(failure, Fault):
            failure = Failure(
                member.index, FailureReason(failure.reason), failure.field, failure.message, failure.remedy
            )
        (encoded,) = encode_failures([replace(failure, index=member.index)])
        result.failure.CopyFrom(encoded)
    elif progress.last is not None:
        result.energy = progress.last.energy
        result.forces = _bytes(progress.last.forces)
        if progress.last.stress is not None:
            result.stress = _bytes(progress.last.stress)
    return result


def _bytes(array: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array, dtype="<f8").tobytes()
