"""Moves many structures of one request in step, as many as fill a batch. Knows neither ASE nor gRPC.

A crew asks for the forces of all its members in one request, which the queue puts into batches with those of
everybody else; members that are done leave, and others that wait take their places. Two crews of a request
take turns: one is computed while the other's algorithms decide where to go.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from equipot.serve.call import Call, current_call
from equipot.serve.dispatcher import Dispatcher
from equipot.serve.errors import Fault, OverQuota, QueueFull
from equipot.serve.job import KeptNeighbors, Work
from equipot.serve.motion.walker import Given, Walker
from equipot.wire.v1.codec import Failure, StructureArrays

CREWS = 2
SKIN = 0.3
"""Å around the cutoff within which neighbours are kept: relaxing atoms move little from step to step."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Member:
    """One structure of a crew.

    Attributes:
        index: in the request.
        walker: moves it.
        given: what its last question came to.
        fault: why it goes no further.
    """

    index: int
    walker: Walker
    given: Given | None = None
    fault: Fault | Failure | None = None


class Party:
    """All structures of one request that moves them.

    Args:
        work: the request at its start.
        begin: makes the walker of a structure; called in the thread that moves.
        moving: the one thread that moves.
        dispatcher: answers.
        tell: is told of each member that is done, and now and then of those that go on; waits for the caller.
        every: how many steps apart it is told of those that go on; 0: never.
    """

    def __init__(
        self,
        work: Work,
        begin: Callable[[int], Walker],
        *,
        moving: ThreadPoolExecutor,
        dispatcher: Dispatcher,
        tell: Callable[[Member, bool], Awaitable[None]],
        every: int,
    ) -> None:
        self._work = work
        self._begin = begin
        self._moving = moving
        self._dispatcher = dispatcher
        self._tell = tell
        self._every = every
        self._waiting = deque(range(len(work.structures)))
        self._edges_of_crew = work.key.model.capacity.limit.edges
        self._members: set[Member] = set()

    async def march(self) -> None:
        """Moves every structure to its end.

        Raises:
            CallError: the request as a whole cannot go on.
        """
        crews = [asyncio.create_task(self._crew()) for _ in range(min(CREWS, len(self._waiting)))]
        try:
            await asyncio.gather(*crews)
        finally:
            for crew in crews:
                crew.cancel()
            await asyncio.gather(*crews, return_exceptions=True)
            # Algorithms end in the thread in which they run.
            self._moving.submit(_let_go, [member.walker for member in self._members])

    async def _crew(self) -> None:
        crew: list[Member] = []
        kept: KeptNeighbors | None = None
        loop = asyncio.get_running_loop()
        while True:
            joining = self._joining(crew)
            # A potential that does not say how far it looks finds its neighbours itself.
            if joining and (cutoff := self._work.key.model.card.cutoff):
                kept = KeptNeighbors(cutoff, SKIN)
            if not crew and not joining:
                return
            came = await loop.run_in_executor(self._moving, _move, crew, joining, self._begin)
            self._members.update(came)
            crew = []
            for member, goes_on in came.items():
                if not goes_on:
                    self._members.discard(member)
                    await self._tell(member, False)
                    continue
                steps = member.walker.progress.steps
                if self._every and steps and steps % self._every == 0:
                    await self._tell(member, True)
                crew.append(member)
            if crew:
                await self._ask(crew, kept)

    def _joining(self, crew: list[Member]) -> list[int]:
        """Indices of structures for which there is room: as many as the queue's largest batch holds."""
        neighbors = self._work.key.model.card.mean_neighbors
        n_atoms = self._work.structures.n_atoms
        room = self._edges_of_crew - neighbors * sum(len(member.walker.atoms) for member in crew)
        # The other crews are to have their share of a request that fills no batch.
        most = max(1, -(-len(n_atoms) // CREWS)) - len(crew)
        joining: list[int] = []
        while self._waiting and len(joining) < most:
            cost = neighbors * int(n_atoms[self._waiting[0]])
            if cost > room and (crew or joining):
                break
            room -= cost
            joining.append(self._waiting.popleft())
        return joining

    async def _ask(self, crew: list[Member], kept: KeptNeighbors | None) -> None:
        """Has the members' present positions computed."""
        structures = _pack(self._work.structures, crew)
        call: Call | None = None
        while True:
            try:
                if call is None:
                    # Once a step, however often the queue has no room for it.
                    call = current_call().next_request()
                    call.asked(len(structures), len(structures.positions))
                work = replace(self._work, structures=structures, call=call, neighbors=kept)
                work.key.model.engine.check_ready()
                answer = await self._dispatcher.predict(work)
                break
            except (QueueFull, OverQuota) as error:
                # It was let in: it waits for its turn as long as it takes.
                if error.retry_after is None:
                    raise
                await asyncio.sleep(error.retry_after)
        predicted = answer.predictions
        failures = {failure.index: failure for failure in predicted.failures}
        assert predicted.forces is not None
        for place, member in enumerate(crew):
            if failure := failures.get(place):
                member.fault = failure
                continue
            atoms = slice(work.offsets[place], work.offsets[place + 1])
            stress = None if predicted.stress is None else predicted.stress[place]
            member.given = Given(float(predicted.energy[place]), predicted.forces[atoms], stress)


def _pack(like: StructureArrays, crew: list[Member]) -> StructureArrays:
    """The members where they are now."""
    places = np.array([member.index for member in crew])
    offsets = like.offsets
    atoms = np.concatenate([np.arange(offsets[place], offsets[place + 1]) for place in places])
    return StructureArrays(
        n_atoms=like.n_atoms[places],
        atomic_numbers=like.atomic_numbers[atoms],
        positions=np.concatenate([member.walker.atoms.positions for member in crew]),
        cell=np.stack([member.walker.atoms.cell[:] for member in crew]),
        pbc=like.pbc[places],
        charge=like.charge[places],
        spin_multiplicity=like.spin_multiplicity[places],
    )


def _move(crew: list[Member], joining: list[int], begin: Callable[[int], Walker]) -> dict[Member, bool]:
    """In the thread that moves: each member goes to its next question (True) or its end (False)."""
    came = {}
    for member in (*crew, *(Member(index, begin(index)) for index in joining)):
        came[member] = member.fault is None and _advance(member)
        if not came[member]:
            member.walker.close()
    return came


def _advance(member: Member) -> bool:
    try:
        goes_on = member.walker.advance(member.given)
    except Exception:
        logger.exception("the algorithm of structure %d failed", member.index)
        member.fault = Fault(
            "internal", "", f"the algorithm failed at step {member.walker.progress.steps}", "report it"
        )
        return False
    if goes_on:
        member.fault = member.walker.fault()
    return goes_on and member.fault is None


def _let_go(walkers: list[Walker]) -> None:
    for walker in walkers:
        walker.close()
