"""Whose turn it is: waiting requests by urgency, then client identity, then request. Knows no budget."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from equipot.serve.shares import Priority, Share
from equipot.serve.terms import Backlog, Terms

DUE = 2.0
"""A request is due once its deadline is only so many times as far as its own work and a batch take."""

QUANTUM_BATCHES = 4
"""A request's work is done in so many full batches in one go: then others who came meanwhile have a turn."""


@dataclass(frozen=True, slots=True)
class Item:
    """One structure that waits: its request, its index there, its size, and when it came (s)."""

    ticket: int
    index: int
    n_atoms: int
    n_edges: int
    arrival: float

    @property
    def cost(self) -> int:
        """Work in edges; atoms count too, so that isolated ones are not free."""
        return self.n_edges + self.n_atoms


Place = tuple[int, float, float]
"""Of a request among others: the lower one is first."""


@dataclass(slots=True, kw_only=True)
class Request:
    """One open request: what it waits for, and its place among the others of its identity.

    Attributes:
        expected: edges that it will still add.
        since: when it queued up for its present quantum.
        stint: edges of that, as far as they are known.
        served: of these, done.
        items: its structures that wait.
        queued_edges: of these.
    """

    ticket: int
    key: Hashable
    deadline: float | None
    flow: Flow
    priority: Priority
    terms: Terms
    expected: int
    since: float = 0.0
    stint: int = 0
    served: int = 0
    items: deque[Item] = field(default_factory=deque)
    queued_edges: int = 0

    @property
    def edges(self) -> int:
        """Left of it."""
        return self.expected + self.queued_edges

    @property
    def work(self) -> float:
        """The same in the unit that all models share."""
        return self.edges * self.terms.price

    @property
    def quantum(self) -> int:
        """Edges of it that are computed in one go."""
        return QUANTUM_BATCHES * self.terms.limit.edges

    def take_turn(self, now: float) -> None:
        """Lets it queue up now for its next quantum."""
        self.since, self.served = now, 0
        self.reckon_stint()

    def reckon_stint(self) -> None:
        """Reckons anew with the edges that are known of by now."""
        self.stint = min(self.edges + self.served, self.quantum)

    def turn(self, seconds_of: Callable[[float], float]) -> float:
        """When its quantum would be done had it been alone; who has the earlier turn is first."""
        return self.since + seconds_of(self.stint * self.terms.price)

    def place(self, now: float, seconds_of: Callable[[float], float]) -> Place:
        """Its place among the others of its identity: those whose time runs out first, then by turn.

        Those that rose to a level are behind who was there before, in the order that they had.
        """
        if self.deadline is not None:
            batch = self.terms.limit.edges * self.terms.price
            if self.deadline - now <= DUE * seconds_of(self.work + batch):
                return 0, self.deadline, 0.0
        turn = self.turn(seconds_of)
        return 1, max(turn, self.flow.standings[self.priority].since), turn


RISING = (Priority.LOW, Priority.NORMAL)
"""Those above which there is something."""

Passed = tuple[float, ...]
"""For each of these the seconds for which requests above it led the engine."""


@dataclass(slots=True)
class Standing:
    """Of one identity's waiting requests of one priority.

    Attributes:
        passed: what `Clocks.passed` said when one of them had the last turn.
        level: of urgency.
        since: when they rose to it.
    """

    passed: Passed
    level: int
    since: float = -math.inf


@dataclass(slots=True)
class Flow:
    """One client identity: its place among the others, and its own requests.

    Attributes:
        virtual: at each level of urgency the work that it was served there, by its weight, counted from where
            the others were when it came.
        levels: at which it waited when the last batch was taken, and has waited since.
        standings: of each priority of which it has requests that wait.
        waiting: those that have structures in the queue, by ticket.
        requests: all that are open, by ticket.
        backlog: what they still bring, by priority.
    """

    identity: str
    share: Share
    virtual: dict[int, float] = field(default_factory=dict)
    levels: set[int] = field(default_factory=set)
    standings: dict[Priority, Standing] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)
    waiting: dict[int, Request] = field(default_factory=dict)
    backlog: dict[Priority, Backlog] = field(default_factory=lambda: defaultdict(Backlog))

    def queue_up(self, request: Request) -> None:
        """Lets a request of its own wait; if it is the only one, what was before counts no more."""
        if not self.waiting:
            self.levels, self.standings = set(), {}
        self.waiting[request.ticket] = request


class Clocks:
    """The virtual time of all at each level of urgency, where those begin who come anew; and how long what is
    more urgent has held the engine, by which the others age."""

    def __init__(self) -> None:
        self._at: defaultdict[int, float] = defaultdict(float)
        self.passed: Passed = (0.0,) * len(RISING)
        self._leader, self._now = Priority.LOW, 0.0

    def tick(self, now: float) -> None:
        """Counts the time since the last batch was taken as time of the one who led it."""
        elapsed, self._now = now - self._now, now
        leader, both = self._leader, zip(RISING, self.passed, strict=True)
        self.passed = tuple([past + elapsed if leader > priority else past for priority, past in both])

    def led_by(self, priority: Priority) -> None:
        """Notes whose batch was taken now."""
        self._leader = priority

    def age(self, flow: Flow, ageing_seconds: float) -> None:
        """Lets requests rise a level for each `ageing_seconds` since their identity had its turn there.

        Only the time counts for which requests above the level that they were on led the engine. With that of
        the same priority, all would rise who wait for their turns, and turns would be by age.
        """
        waiting = {request.priority for request in flow.waiting.values()}
        flow.standings = {one: flow.standings.get(one) or Standing(self.passed, one) for one in waiting}
        for priority, standing in flow.standings.items():
            level = int(priority)
            while level < Priority.HIGH:
                step = level - RISING[0]
                if self.passed[step] - standing.passed[step] < (level - priority + 1) * ageing_seconds:
                    break
                level += 1
            if level != standing.level:
                standing.level, standing.since = level, self._now if level > priority else -math.inf

    def admit(self, flow: Flow, levels: set[int]) -> None:
        """Notes at which levels it waits; where it did not until now it has saved up nothing."""
        for level in levels - flow.levels:
            flow.virtual[level] = max(flow.virtual.get(level, 0.0), self._at[level])
        flow.levels = levels

    def move(self, level: int, work: float) -> None:
        """So much work, by the weight of all who waited there, was done at a level."""
        self._at[level] += work

    def has_caught_up(self, flow: Flow) -> bool:
        """Whether all are as far as this one, which may be forgotten then."""
        return all(virtual <= self._at[level] for level, virtual in flow.virtual.items())


class Line:
    """The waiting requests in the order of their turns: by urgency, then identity, then request.

    Attributes:
        level: of urgency, at which the one is whose turn it is.
        weights: of all identities that wait at each level.
    """

    def __init__(
        self,
        flows: Iterable[Flow],
        now: float,
        ageing_seconds: float,
        seconds_of: Callable[[float], float],
        clocks: Clocks,
    ) -> None:
        """Lines up those of these identities that wait; `seconds_of` says how long work takes."""
        self._now, self._seconds_of, self._clocks = now, seconds_of, clocks
        self._held_up: set[tuple[str, Priority]] = set()
        clocks.tick(now)
        self._levels: defaultdict[int, dict[str, Flow]] = defaultdict(dict)
        self._requests: defaultdict[tuple[int, str], list[tuple[Place, int]]] = defaultdict(list)
        self.weights: defaultdict[int, float] = defaultdict(float)
        for flow in flows:
            clocks.age(flow, ageing_seconds)
            for ticket, request in flow.waiting.items():
                level = flow.standings[request.priority].level
                place = request.place(now, seconds_of)
                self._requests[level, flow.identity].append((place, ticket))
            levels = {standing.level for standing in flow.standings.values()}
            clocks.admit(flow, levels)
            for level in levels:
                self._levels[level][flow.identity] = flow
                self.weights[level] += flow.share.weight
        self.level = 0
        self._turns: list[tuple[float, int, str]] = []

    def first(self) -> Request | None:
        """Whose turn it is; None if nobody waits."""
        while not self._turns:
            if not self._levels:
                return None
            self.level = max(self._levels)
            self._flows = self._levels.pop(self.level)
            for identity, flow in self._flows.items():
                heapq.heapify(self._requests[self.level, identity])
                self._queue_up(flow)
        _, ticket, identity = heapq.heappop(self._turns)
        heapq.heappop(self._requests[self.level, identity])
        return self._flows[identity].waiting[ticket]

    def served(self, request: Request) -> None:
        """Notes that a structure of the one whose turn it is goes.

        Its identity has had its turn at that priority then, unless an earlier request of these had to stay
        behind: one of another model, or too large for the room that was left.
        """
        if (request.flow.identity, request.priority) not in self._held_up:
            request.flow.standings[request.priority].passed = self._clocks.passed

    def next_after(self, request: Request, *, went: bool) -> Request | None:
        """Whose turn it is once this one has had its own; if it went and has more it queues up once more."""
        flow = request.flow
        again = went and bool(request.items)
        if not went:
            self._held_up.add((flow.identity, request.priority))
        if again:
            waiting = self._requests[self.level, flow.identity]
            place = request.place(self._now, self._seconds_of), request.ticket
            if not self._turns and (not waiting or place < waiting[0]):
                # It would be the first again.
                return request
            heapq.heappush(waiting, place)
        self._queue_up(flow)
        return self.first()

    def _queue_up(self, flow: Flow) -> None:
        if requests := self._requests[self.level, flow.identity]:
            heapq.heappush(self._turns, (flow.virtual[self.level], requests[0][1], flow.identity))
