"""Sessions: the same structures again and again as their atoms move. Knows no queue and no torch.

What does not change is understood once; a step is a request like any other with new positions, so it waits in
the same queue by the same rules. A session holds its model and its neighbour lists until it ends; where all
of them together have no room for its lists, it goes on without, and each step costs what a request does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace

import grpc
import numpy as np

from equipot.model.skin import SkinnedNeighbors
from equipot.serve.call import current_call
from equipot.serve.certainty import understood
from equipot.serve.config import SessionLimits
from equipot.serve.dispatcher import Dispatcher
from equipot.serve.errors import CallError, InvalidRequest, NotReady, OverLimit, QueueFull, SessionIdle
from equipot.serve.job import Work
from equipot.serve.metrics import OK, Metrics
from equipot.serve.models import ServedModel
from equipot.serve.room import Room, Tenant
from equipot.serve.servicer import RETRY_DRAINING, SERVICE, PotentialServicer, respond
from equipot.serve.status import Context, guarded_stream
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import CodecError, StructureArrays, decode_step

SKIN = 0.5
"""Å around the cutoff within which neighbours are kept, unless a session asks for another skin."""

COPIES, ATOM_BYTES, STRUCTURE_BYTES = 3, 24, 500
"""Of what is opened so many copies are held, and so many bytes more for each atom and structure."""

LARGEST_SKIN = 5.0
"""Å; a wider list costs more to filter at every step than it saves."""


@dataclass(slots=True, eq=False)
class _Open:
    """What one session keeps between steps."""

    tenant: Tenant
    work: Work
    neighbors: list[SkinnedNeighbors] | None
    asked: pb.PredictRequest
    by_properties: dict[frozenset[pb.Property.ValueType], Work]


class SessionServicer:
    """The method `Session` of `PotentialService`."""

    def __init__(
        self,
        potential: PotentialServicer,
        dispatcher: Dispatcher,
        metrics: Metrics,
        limits: SessionLimits,
        room: Room,
    ) -> None:
        self._potential = potential
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._limits = limits
        self._room = room
        self._draining = False
        self._idle: set[asyncio.Task[object]] = set()
        self._count = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the method, beside those of the same service that are registered elsewhere."""
        handlers = {"Session": guarded_stream(self.session, pb.SessionRequest)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def drain(self) -> None:
        """Ends every session once it has no step under way: its caller goes on elsewhere."""
        self._draining = True
        for task in self._idle:
            task.cancel()

    async def session(
        self, requests: AsyncIterator[pb.SessionRequest], context: Context
    ) -> AsyncGenerator[pb.SessionReply, None]:
        """Answers step by step until the caller has no more."""
        if self._count >= self._limits.most:
            raise OverLimit(
                f"{self._count} sessions are open, and no more are let in: close some or use Predict",
                retry_after=self._limits.idle_seconds,
            )
        self._count += 1
        self._metrics.sessions.inc()
        tenant = Tenant(self._room)
        try:
            first = await self._next(requests)
            if first is None:
                return
            if first.WhichOneof("kind") != "open":
                raise InvalidRequest("a session begins with `open`", field="open")
            model = self._potential.find(first.open, context)
            with model.in_use():
                opened = self._understand(first.open, model, tenant)
                while (request := await self._next(requests)) is not None:
                    if request.WhichOneof("kind") != "step":
                        raise InvalidRequest("a session that is open takes steps alone", field="step")
                    self._dispatcher.entered()
                    try:
                        reply = await self._step(opened, request.step, context)
                    finally:
                        # Not once it is written: the next step may be here by then, as if it were another's.
                        self._dispatcher.left()
                    yield reply
        finally:
            tenant.leave()
            self._count -= 1
            self._metrics.sessions.dec()

    async def _next(self, requests: AsyncIterator[pb.SessionRequest]) -> pb.SessionRequest | None:
        """What the caller sends next; None if it has closed its side.

        Raises:
            NotReady: the server drains.
            SessionIdle: nothing came for too long.
        """
        if self._draining:
            raise _drained()
        task = asyncio.current_task()
        assert task is not None
        self._idle.add(task)
        try:
            async with asyncio.timeout(self._limits.idle_seconds):
                return await anext(requests, None)
        except TimeoutError:
            raise SessionIdle(
                f"no step came for {self._limits.idle_seconds:g} s, so the session was ended: open it again",
                retry_after=0.0,
            ) from None
        except asyncio.CancelledError:
            if self._draining and task.uncancel() == 0:
                raise _drained() from None
            raise
        finally:
            self._idle.discard(task)

    def _understand(self, request: pb.SessionOpen, model: ServedModel, tenant: Tenant) -> _Open:
        if not (math.isfinite(request.skin) and 0 <= request.skin <= LARGEST_SKIN):
            raise InvalidRequest(
                f"skin is {request.skin:g} Å, allowed are 0 to {LARGEST_SKIN:g}", field="skin"
            )
        if request.structures.positions:
            raise InvalidRequest(
                "a session is opened without positions: they come with each step",
                field="structures.positions",
            )
        self._let_in(request, tenant)
        structures = pb.Structures()
        structures.CopyFrom(request.structures)
        # As many as there are numbers of atoms of 4 bytes: a hostile n_atoms must not say how much.
        structures.positions = bytes(6 * len(request.structures.atomic_numbers))
        asked = pb.PredictRequest(
            model=request.model,
            structures=structures,
            properties=request.properties,
            level_of_theory=request.level_of_theory,
            priority=request.priority,
            uncertainty=request.uncertainty if request.HasField("uncertainty") else None,
        )
        work = self._potential.understand(asked, model, None, now=False)
        cutoff = model.card.cutoff
        neighbors = None
        if cutoff:
            skin = request.skin or SKIN
            neighbors = [
                SkinnedNeighbors(cutoff, skin=skin, claim=tenant.claim_list)
                for _ in range(len(work.structures))
            ]
        return _Open(tenant, work, neighbors, asked, {frozenset(request.properties): work})

    def _let_in(self, request: pb.SessionOpen, tenant: Tenant) -> None:
        n_atoms, n_structures = len(request.structures.atomic_numbers) // 4, len(request.structures.n_atoms)
        n_bytes = COPIES * request.ByteSize() + ATOM_BYTES * n_atoms + STRUCTURE_BYTES * n_structures
        if tenant.claim_structures(n_bytes):
            return
        remedy = "send fewer structures, use Predict, or raise the server's --max-session-mb"
        if n_bytes > self._room.most:
            raise OverLimit(
                f"this session would keep {_mib(n_bytes)} MiB, the limit of all is {_mib(self._room.most)}:"
                f" {remedy}"
            )
        raise QueueFull(
            f"sessions and motions keep {_mib(self._room.held)} MiB and this one would add {_mib(n_bytes)};"
            f" the limit is {_mib(self._room.most)}: close some, {remedy}",
            retry_after=self._limits.idle_seconds,
        )

    async def _step(self, opened: _Open, step: pb.SessionStep, context: Context) -> pb.SessionReply:
        started = time.perf_counter()
        model, outcome = opened.work.key.model, "internal"
        counts = self._metrics.of(model.name, model.version)
        self._metrics.in_flight.inc()
        try:
            work = self._work(opened, step)
            answer = await self._dispatcher.predict(work)
            if opened.neighbors is not None and not opened.tenant.lists_fit:
                opened.neighbors = None
                opened.tenant.drop_lists()
            outcome = OK
            counts.request_answered(time.perf_counter() - started)
            return pb.SessionReply(number=step.number, answer=respond(work, answer))
        except CallError as error:
            outcome = error.reason.lower()
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self._metrics.in_flight.dec()
            counts.request_ended(outcome)

    def _work(self, opened: _Open, step: pb.SessionStep) -> Work:
        """The step as a request: what was opened, with these positions."""
        opened.work.key.model.engine.check_ready()
        # By set: lists of the same properties in other orders, however long, are the same question.
        wanted = frozenset(step.properties)
        like = opened.by_properties.get(wanted) if wanted else opened.work
        if like is None:
            other = pb.PredictRequest()
            other.CopyFrom(opened.asked)
            other.ClearField("properties")
            other.properties.extend(step.properties)
            like = self._potential.understand(other, opened.work.key.model, None, now=False)
            like = replace(like, structures=opened.work.structures)
            opened.by_properties[wanted] = like
        before: StructureArrays = opened.work.structures
        try:
            structures = decode_step(step, before)
        except CodecError as error:
            raise InvalidRequest(str(error), field=f"step.{error.field}") from error
        if step.cell:
            opened.work = replace(opened.work, structures=replace(before, cell=np.array(structures.cell)))
        call = current_call().next_request()
        call.asked(len(structures), len(structures.positions))
        seconds = step.timeout_seconds
        if not (math.isfinite(seconds) and seconds >= 0):
            raise InvalidRequest(
                f"timeout_seconds is {seconds:g}: give seconds, 0 to wait", field="step.timeout_seconds"
            )
        deadline = time.monotonic() + seconds if seconds else None
        work = replace(like, structures=structures, deadline=deadline, call=call, neighbors=opened.neighbors)
        return replace(work, certainty=understood(step.uncertainty)) if step.HasField("uncertainty") else work


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.3g}"


def _drained() -> NotReady:
    return NotReady("the server is shutting down", retry_after=RETRY_DRAINING)
