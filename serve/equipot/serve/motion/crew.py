"""Moves many structures of one request in step, as many as fill a batch. Knows neither ASE nor gRPC.

A crew asks for the forces of all its members in one request, which the queue puts into batches with those of
everybody else; members that are done leave, and others that wait take their places. Two crews of a request
that is alone take turns: one is computed while the other's algorithms decide where to go.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from equipot.model.batch import Graph
from equipot.model.skin import Claim, SkinnedNeighbors
from equipot.serve.call import Call, current_call
from equipot.serve.dispatcher import Dispatcher, Ready
from equipot.serve.errors import Fault, OverLimit, OverQuota, QueueFull
from equipot.serve.job import Work
from equipot.serve.motion.mover import Errands, Mover
from equipot.serve.motion.progress import Given, Progress
from equipot.serve.motion.state import FloatArray
from equipot.wire.v1.certainty import UncertaintyArrays
from equipot.wire.v1.codec import Failure, StructureArrays

LARGEST_PREPARED = 1024
"""Atoms of a structure whose neighbours are found in the thread that moves. A larger one would hold up others
there, and is prepared where those of single points are."""

CREWS = 2


class Course(Protocol):
    """One structure on its way."""

    @property
    def positions(self) -> FloatArray:
        """(n, 3) Å."""

    @property
    def cell(self) -> FloatArray:
        """(3, 3) Å."""

    @property
    def progress(self) -> Progress:
        """How far it has come."""

    def close(self) -> None:
        """Lets go of what it holds; in the thread that moves."""


@dataclass(slots=True, eq=False)
class Member:
    """One structure of a crew.

    Attributes:
        index: in the request.
        course: where it is and how far it has come.
        given: what its last question came to.
        fault: why it goes no further.
        goes_on: whether it waits for what it asked for.
        certainty: how sure its last answer is; None if nobody asked.
        neighbors: its list; None if the potential does not say how far it looks, and finds its own.
    """

    index: int
    course: Course
    given: Given | None = None
    fault: Fault | Failure | None = None
    goes_on: bool = True
    certainty: UncertaintyArrays | None = None
    neighbors: SkinnedNeighbors | None = None


@dataclass(slots=True, eq=False)
class _Question:
    """What these members ask at one step, and their structures if they are prepared already."""

    members: list[Member]
    work: Work
    ready: Ready | None = None

    def parts(self) -> Iterator[_Question]:
        """Itself, or parts of which each is what its caller may ask for at once, or one member alone."""
        call, offsets = self.work.call, self.work.offsets
        if call.allows(offsets[-1], math.inf):
            yield self
            return
        edges: Sequence[float] = [math.inf] * len(self.members)
        if self.ready is not None:
            edges = [0 if isinstance(one, Fault) else one.n_edges for one in self.ready.structures]
        start, together = 0, 0.0
        for place, of_one in enumerate(edges):
            together += of_one
            if place > start and not call.allows(offsets[place + 1] - offsets[start], together):
                yield self._part(start, place)
                start, together = place, of_one
        yield self._part(start, len(self.members))

    def _part(self, start: int, stop: int) -> _Question:
        work, ready = self.work, self.ready
        neighbors = None if work.neighbors is None else work.neighbors[start:stop]
        if ready is not None:
            seconds = ready.seconds * (stop - start) / len(self.members)
            ready = Ready(ready.structures[start:stop], seconds)
        work = replace(work, structures=work.structures.slice(start, stop), neighbors=neighbors)
        return _Question(self.members[start:stop], work, ready)


class Movement(Protocol):
    """What moves the members of a party; called in the thread that moves."""

    @property
    def work(self) -> Work:
        """The request at its start."""

    @property
    def at_once(self) -> int:
        """How many structures `advance` takes in one go."""

    def begin(self, index: int) -> Member:
        """Makes the member of a structure."""

    def advance(self, members: Sequence[Member]) -> None:
        """Takes these to their next questions, their ends or their faults; raises nothing."""


class Party:
    """All structures of one request that moves them.

    Args:
        movement: how they move.
        mover: has the thread in which they do.
        dispatcher: answers.
        claim: asked for the memory of neighbour lists.
        tell: is told of each member that came a step further or is done; waits for the caller.
    """

    def __init__(
        self,
        movement: Movement,
        *,
        mover: Mover,
        dispatcher: Dispatcher,
        claim: Claim,
        tell: Callable[[Member], Awaitable[None]],
    ) -> None:
        self._movement = movement
        self._work = work = movement.work
        self._mover = mover
        self._dispatcher = dispatcher
        self._claim = claim
        self._tell = tell
        self._waiting = deque(range(len(work.structures)))
        self._edges_of_crew = work.key.model.capacity.limit.edges
        self._members: set[Member] = set()
        self._errands = Errands(work.call.identity)
        self._crews = 1

    async def march(self) -> None:
        """Moves every structure to its end.

        Raises:
            CallError: the request as a whole cannot go on.
        """
        # In the company of others the engine has enough to do.
        self._crews = 1 if self._mover.crews else CREWS
        crews = [asyncio.create_task(self._crew()) for _ in range(min(self._crews, len(self._waiting)))]
        self._mover.crews += len(crews)
        try:
            await asyncio.gather(*crews)
        finally:
            self._mover.crews -= len(crews)
            for crew in crews:
                crew.cancel()
            await asyncio.gather(*crews, return_exceptions=True)
            # Algorithms end in the thread in which they run.
            self._mover.let_go(partial(_let_go, self._members))

    async def _crew(self) -> None:
        crew: list[Member] = []
        asked: list[_Question] = []
        while True:
            joining = self._joining(crew)
            if not crew and not joining:
                return
            before, asked = asked, []
            strides = self._strides(crew, joining, before, asked)
            await self._mover.move(self._errands, strides)
            for member in crew:
                if member.course.progress.notes or not member.goes_on:
                    await self._tell(member)
                if not member.goes_on:
                    self._members.discard(member)
                    if member.neighbors is not None:
                        member.neighbors.forget()
            crew = [member for member in crew if member.goes_on]
            for question in asked:
                for part in question.parts():
                    await self._ask(part)

    def _strides(
        self, crew: list[Member], joining: list[int], before: list[_Question], asked: list[_Question]
    ) -> Iterator[None]:
        """In the thread that moves: takes the crew, and those that join it, to their next question."""
        for index in joining:
            member = self._movement.begin(index)
            if cutoff := self._work.key.model.card.cutoff:
                member.neighbors = SkinnedNeighbors(cutoff, claim=self._claim)
            crew.append(member)
            self._members.add(member)
            yield
        able = [member for member in crew if member.fault is None]
        for start in range(0, len(able), self._movement.at_once):
            self._movement.advance(able[start : start + self._movement.at_once])
            yield
        going: list[Member] = []
        for member in crew:
            member.goes_on = member.goes_on and member.fault is None
            if member.goes_on:
                going.append(member)
            else:
                member.course.close()
        if going:
            yield from self._prepare(going, before, asked)

    def _prepare(
        self, going: list[Member], before: list[_Question], asked: list[_Question]
    ) -> Iterator[None]:
        """Puts together what is asked of them now, and their neighbours if that does not take long."""
        if before and before[0].members == going:
            structures, neighbors = before[0].work.structures, before[0].work.neighbors
        else:
            structures = _those_of(self._work.structures, going)
            kept = [member.neighbors for member in going if member.neighbors is not None]
            neighbors = kept if len(kept) == len(going) else None
        structures = replace(
            structures,
            positions=np.concatenate([member.course.positions for member in going]),
            cell=np.concatenate([member.course.cell for member in going]).reshape(-1, 3, 3),
        )
        question = _Question(going, replace(self._work, structures=structures, neighbors=neighbors))
        asked.append(question)
        if structures.n_atoms.max() > LARGEST_PREPARED:
            return
        prepared: list[Graph | Fault] = []
        begun = time.perf_counter()
        for start, stop in question.work.chunks():
            prepared += question.work.prepare(start, stop)
            yield
        question.ready = Ready(prepared, time.perf_counter() - begun)

    def _joining(self, crew: list[Member]) -> list[int]:
        """Indices of structures for which there is room: as many as the queue's largest batch holds."""
        neighbors = self._work.key.model.card.mean_neighbors
        n_atoms = self._work.structures.n_atoms
        room = self._edges_of_crew - neighbors * sum(len(member.course.positions) for member in crew)
        # The other crews are to have their share of a request that fills no batch.
        most = max(1, -(-len(n_atoms) // self._crews)) - len(crew)
        joining: list[int] = []
        while self._waiting and len(joining) < most:
            cost = neighbors * int(n_atoms[self._waiting[0]])
            if cost > room and (crew or joining):
                break
            room -= cost
            joining.append(self._waiting.popleft())
        return joining

    async def _ask(self, question: _Question) -> None:
        """Has the members' present positions computed."""
        crew = question.members
        call: Call | None = None
        while True:
            try:
                if call is None:
                    # Once a step, however often the queue has no room for it.
                    call = current_call().next_request()
                    call.asked(len(crew), len(question.work.structures.positions))
                work = replace(question.work, call=call)
                work.key.model.engine.check_ready()
                answer = await self._dispatcher.predict(
                    work, question.ready, in_company=self._mover.crews > 1
                )
                break
            except (QueueFull, OverQuota) as error:
                # It was let in: it waits for its turn as long as it takes.
                if error.retry_after is None:
                    raise
                await asyncio.sleep(error.retry_after)
            except OverLimit as error:
                if len(crew) > 1:
                    raise
                crew[0].fault = _too_large(error)
                return
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


def _those_of(like: StructureArrays, crew: list[Member]) -> StructureArrays:
    """The members, where they began."""
    places = np.array([member.index for member in crew])
    offsets = like.offsets
    atoms = np.concatenate([np.arange(offsets[place], offsets[place + 1]) for place in places])
    return StructureArrays(
        n_atoms=like.n_atoms[places],
        atomic_numbers=like.atomic_numbers[atoms],
        positions=like.positions[atoms],
        cell=like.cell[places],
        pbc=like.pbc[places],
        charge=like.charge[places],
        spin_multiplicity=like.spin_multiplicity[places],
    )


def _too_large(error: OverLimit) -> Fault:
    """Of a structure that alone is more than its caller may ask for."""
    return Fault(
        "too_large", error.field, error.message, "take a smaller one, or ask the operator for a higher limit"
    )


def algorithm_failed(member: Member) -> Fault:
    """Of a member whose algorithm raised what it should not."""
    step = member.course.progress.steps
    return Fault("internal", "", f"the algorithm failed at step {step}", "report it")


def _let_go(members: set[Member]) -> None:
    for member in members:
        member.course.close()
