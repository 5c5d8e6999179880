"""The methods of `PotentialService` that move structures: results as they come, to whoever reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from equipot.serve.dispatcher import Dispatcher
from equipot.serve.errors import NotReady, QueueFull
from equipot.serve.metrics import OK, Metrics
from equipot.serve.models import ServedModel
from equipot.serve.motion.crew import Member, Party
from equipot.serve.motion.errand import Errand
from equipot.serve.motion.mover import Mover
from equipot.serve.motion.outbox import Outbox, Unread
from equipot.serve.motion.relax_errand import RelaxErrand
from equipot.serve.motion.simulate_errand import SimulateErrand
from equipot.serve.room import Room, Tenant
from equipot.serve.servicer import RETRY_DRAINING, SERVICE, PotentialServicer
from equipot.serve.shares import Share
from equipot.serve.status import Context, guarded_reply_stream
from equipot.wire.v1 import potential_pb2 as pb

RETRY_MOVING = 5.0
"""Seconds after which some of what moves may have come to rest."""

MessageT = TypeVar("MessageT", bound=Message)


class MotionServicer:
    """Everything that moves structures here."""

    def __init__(
        self,
        potential: PotentialServicer,
        dispatcher: Dispatcher,
        metrics: Metrics,
        *,
        most_atoms: int,
        patience: float,
        room: Room,
        share_of: Callable[[str], Share],
    ) -> None:
        """Registers nothing yet.

        Args:
            potential: understands what requests have in common.
            dispatcher: answers.
            metrics: that are told what happens.
            most_atoms: of all requests together, unless one request alone has more.
            patience: seconds that structures wait for a caller who does not read.
            room: for the neighbour lists of what moves; those that find none are built at each step.
            share_of: what a client identity may have.
        """
        self._potential = potential
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._room = room
        self._mover = Mover(share_of)
        self._parties: set[asyncio.Future[None]] = set()
        self._draining = False
        self._most_atoms = most_atoms
        self._patience = patience
        self._atoms = 0
        self._unread = Unread()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods, beside those of the same service that are registered elsewhere."""
        handlers = {
            "Relax": guarded_reply_stream(self.relax, pb.RelaxRequest),
            "Simulate": guarded_reply_stream(self.simulate, pb.SimulateRequest),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def drain(self) -> None:
        """Ends everything that moves: it may take hours, and its callers go on elsewhere."""
        self._draining = True
        for party in self._parties:
            party.cancel()

    def close(self) -> None:
        """Lets the thread go."""
        self._mover.close()

    def check(self, request: pb.RelaxRequest | pb.SimulateRequest, model: ServedModel) -> list[str]:
        """Raises CallError where `moved` would; returns what looks wrong and is done all the same."""
        if isinstance(request, pb.SimulateRequest):
            return SimulateErrand.understand(request, model, self._potential).warnings
        RelaxErrand.understand(request, model, self._potential)
        return []

    def moved(
        self, request: pb.RelaxRequest | pb.SimulateRequest, model: ServedModel
    ) -> AsyncGenerator[pb.RelaxReply, None] | AsyncGenerator[pb.SimulateReply, None]:
        """As `relax` or `simulate`, by this model, of structures that were let in by `check`."""
        if isinstance(request, pb.SimulateRequest):
            return self._simulated(request, model, accepted=True)
        return self._relaxed(request, model, accepted=True)

    async def relax(self, request: pb.RelaxRequest, context: Context) -> AsyncGenerator[pb.RelaxReply, None]:
        """Results, and progress and tokens if they are wanted, as structures come to rest."""
        async with aclosing(self._relaxed(request, self._potential.find(request, context))) as replies:
            async for reply in replies:
                yield reply

    async def _relaxed(
        self, request: pb.RelaxRequest, model: ServedModel, *, accepted: bool = False
    ) -> AsyncGenerator[pb.RelaxReply, None]:
        with model.in_use():
            errand = RelaxErrand.understand(request, model, self._potential, accepted=accepted)
            async with aclosing(self._carry_out(errand)) as replies:
                async for reply in replies:
                    yield reply

    async def simulate(
        self, request: pb.SimulateRequest, context: Context
    ) -> AsyncGenerator[pb.SimulateReply, None]:
        """Frames, observations and tokens as structures move, and how each of them ended."""
        async with aclosing(self._simulated(request, self._potential.find(request, context))) as replies:
            async for reply in replies:
                yield reply

    async def _simulated(
        self, request: pb.SimulateRequest, model: ServedModel, *, accepted: bool = False
    ) -> AsyncGenerator[pb.SimulateReply, None]:
        with model.in_use():
            errand = SimulateErrand.understand(request, model, self._potential, accepted=accepted)
            async with aclosing(self._carry_out(errand)) as replies:
                async for reply in replies:
                    yield reply

    async def _carry_out(self, errand: Errand[MessageT]) -> AsyncGenerator[MessageT, None]:
        work, model = errand.work, errand.work.key.model
        counts = self._metrics.of(model.name, model.version)
        unfinished, n_atoms = len(work.structures), work.offsets[-1]
        if self._atoms and self._atoms + n_atoms > self._most_atoms:
            raise QueueFull(
                f"{self._atoms} atoms move here already and this request brings {n_atoms};"
                f" the limit is {self._most_atoms}",
                retry_after=RETRY_MOVING,
            )
        if self._unread.full:
            raise QueueFull(
                f"{self._unread.bytes} bytes of results wait to be read; the limit is {self._unread.most}:"
                " read those of your requests first",
                retry_after=RETRY_MOVING,
            )
        outbox: Outbox[MessageT] = Outbox(self._unread, patience=self._patience)

        async def tell(member: Member) -> None:
            nonlocal unfinished
            for message in errand.told(member):
                await outbox.put(message)
            if not member.goes_on:
                unfinished -= 1
                self._metrics.moving.dec()
                counts.moved(errand.method, OK if member.fault is None else str(member.fault.reason))

        def left(marched: object) -> None:
            tenant.leave()
            self._atoms -= n_atoms
            self._metrics.moving.dec(unfinished)

        tenant = Tenant(self._room)
        party = Party(
            errand, mover=self._mover, dispatcher=self._dispatcher, claim=tenant.claim_list, tell=tell
        )
        marching = asyncio.ensure_future(_march(party, outbox))
        self._parties.add(marching)
        self._atoms += n_atoms
        # Not when the last is read: what nobody reads on takes no room from others.
        marching.add_done_callback(left)
        self._metrics.moving.inc(unfinished)
        try:
            yield errand.opening()
            while (reply := await outbox.get()) is not None:
                yield reply
            if self._draining and unfinished:
                raise NotReady("the server is shutting down", retry_after=RETRY_DRAINING)
            if unfinished:
                await marching
        finally:
            self._parties.discard(marching)
            marching.cancel()
            outbox.leave()


async def _march(party: Party, outbox: Outbox[MessageT]) -> None:
    try:
        await party.march()
    finally:
        # Behind what is there already: results that came are sent, whatever else.
        await outbox.close()
