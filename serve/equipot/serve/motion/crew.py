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
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from equipot.model.skin import SkinnedNeighbors
from equipot.serve.call import Call, current_call
from equipot.serve.dispatcher import Dispatcher
from equipot.serve.errors import Fault, OverQuota, QueueFull
from equipot.serve.job import Work
from equipot.serve.motion.mover import Mover
from equipot.serve.motion.state import BadState
from equipot.serve.motion.walker import Given, Halt, Walker
from equipot.wire.v1.certainty import UncertaintyArrays
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
        goes_on: whether it waits for what it asked for.
        certainty: how sure its last answer is; None if nobody asked.
        neighbors: its list; None if the potential does not say how far it looks, and finds its own.
    """

    index: int
    walker: Walker
    given: Given | None = None
    fault: Fault | Failure | None = None
    goes_on: bool = True
    certainty: UncertaintyArrays | None = None
    neighbors: SkinnedNeighbors | None = None


class Party:
    """All structures of one request that moves them.

    Args:
        work: the request at its start.
        begin: makes the member of a structure; called in the thread that moves.
        mover: moves.
        dispatcher: answers.
        tell: is told of each member that came a step further or is done; waits for the caller.
    """

    def __init__(
        self,
        work: Work,
        begin: Callable[[int], Member],
        *,
        mover: Mover,
        dispatcher: Dispatcher,
        tell: Callable[[Member], Awaitable[None]],
    ) -> None:
        self._work = work
        self._begin = begin
        self._mover = mover
        self._dispatcher = dispatcher
        self._tell = tell
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
            self._mover.let_go(partial(_let_go, self._members))

    async def _crew(self) -> None:
        crew: list[Member] = []
        while True:
            joining = self._joining(crew)
            if not crew and not joining:
                return
            await self._mover.move(
                self._work.call.identity,
                len(crew) + len(joining),
                partial(self._move, crew, joining, len(crew)),
            )
            for member in crew:
                if member.walker.progress.notes or not member.goes_on:
                    await self._tell(member)
                if not member.goes_on:
                    self._members.discard(member)
            crew = [member for member in crew if member.goes_on]
            if crew:
                await self._ask(crew)

    def _move(self, crew: list[Member], joining: list[int], old: int, number: int) -> None:
        """In the thread that moves: a member of the crew, or one that joins it, goes to its next question."""
        if number >= old:
            member = self._begin(joining[number - old])
            if cutoff := self._work.key.model.card.cutoff:
                member.neighbors = SkinnedNeighbors(cutoff, skin=SKIN)
            crew.append(member)
            self._members.add(member)
        member = crew[number]
        if member.fault is None:
            _advance(member)
        member.goes_on = member.goes_on and member.fault is None
        if not member.goes_on:
            member.walker.close()

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

    async def _ask(self, crew: list[Member]) -> None:
        """Has the members' present positions computed."""
        structures = _pack(self._work.structures, crew)
        kept = [member.neighbors for member in crew if member.neighbors is not None]
        neighbors = kept if len(kept) == len(crew) else None
        call: Call | None = None
        while True:
            try:
                if call is None:
                    # Once a step, however often the queue has no room for it.
                    call = current_call().next_request()
                    call.asked(len(structures), len(structures.positions))
                work = replace(self._work, structures=structures, call=call, neighbors=neighbors)
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
            if predicted.uncertainty is not None:
                member.certainty = predicted.uncertainty.of(place, atoms)


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


def _advance(member: Member) -> None:
    """The member goes to its next question, its end or its fault."""
    try:
        member.goes_on = member.walker.advance(member.given)
    except Halt as halt:
        member.fault = halt.fault
    except BadState as error:
        member.fault = Fault("invalid_structure", "tokens", str(error), error.remedy)
    except Exception:
        logger.exception("the algorithm of structure %d failed", member.index)
        step = member.walker.progress.steps
        member.fault = Fault("internal", "", f"the algorithm failed at step {step}", "report it")
    else:
        if member.goes_on:
            member.fault = member.walker.fault()


def _let_go(members: set[Member]) -> None:
    for member in members:
        member.walker.close()
