"""Whose turn it is: waiting requests by urgency, then client identity, then request. Knows no budget."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from equipot.serve.shares import Priority, Share

DUE = 2.0
"""A request is due once its deadline is only so many times as far as its own work and a batch take."""

QUANTUM_BATCHES = 4
"""A request's work is done in so many full batches in one go: then others who came meanwhile have a turn."""


class BatchLimit:
    """What one model's batches may hold; smaller after one of them ran out of memory.

    Attributes:
        edges: most edges in one batch.
        atoms: most atoms in one batch.
    """

    def __init__(self, *, edges: int, atoms: int) -> None:
        self.edges = edges
        self.atoms = atoms

    def ran_out_of_memory(self, *, edges: int, atoms: int) -> bool:
        """A batch of this size did not fit: from now on half of it is the most; says whether that is news."""
        before = self.edges, self.atoms
        if edges:
            self.edges = min(self.edges, max(1, edges // 2))
        self.atoms = min(self.atoms, max(1, atoms // 2))
        return before != (self.edges, self.atoms)


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


@dataclass(slots=True, kw_only=True)
class Request:
    """One open request: what it waits for, and its place among the others of its identity.

    Attributes:
        expected: edges that it will still add.
        since: when it queued up for its present quantum.
        turn: when it would be done with that had it been alone; who has the earlier one is first.
        served: work of its present quantum that is done.
        items: its structures that wait.
        queued_edges: of these.
    """

    ticket: int
    key: Hashable
    deadline: float | None
    flow: Flow
    priority: Priority
    price: float
    limit: BatchLimit
    expected: int
    since: float = 0.0
    turn: float = 0.0
    served: float = 0.0
    items: deque[Item] = field(default_factory=deque)
    queued_edges: int = 0

    @property
    def work(self) -> float:
        """What is left of it, in the unit that all keys share."""
        return (self.expected + self.queued_edges) * self.price

    @property
    def quantum(self) -> float:
        """Work of it that is done in one go."""
        return QUANTUM_BATCHES * self.limit.edges * self.price

    def take_turn(self, now: float, seconds_of: Callable[[float], float]) -> None:
        """Lets it queue up now for its next quantum."""
        self.since, self.served = now, 0.0
        self.reckon_turn(seconds_of)

    def reckon_turn(self, seconds_of: Callable[[float], float]) -> None:
        """Reckons anew with the work that is known of by now."""
        self.turn = self.since + seconds_of(min(self.work + self.served, self.quantum))

    def place(self, now: float, seconds_of: Callable[[float], float]) -> tuple[int, float]:
        """Its place among the others of its identity: those whose time runs out first, then by turn."""
        if self.deadline is not None:
            batch = self.limit.edges * self.price
            if self.deadline - now <= DUE * seconds_of(self.work + batch):
                return 0, self.deadline
        return 1, self.turn

    def urgency(self, now: float, ageing_seconds: float) -> int:
        """The priority, higher for each time it has waited so long."""
        waited = (now - max(self.since, self.items[0].arrival)) / ageing_seconds
        return min(Priority.HIGH, self.priority + max(0, int(min(waited, Priority.HIGH))))


@dataclass(slots=True)
class Flow:
    """One client identity: its place among the others, and its own requests.

    Attributes:
        virtual: at each level of urgency the work that it was served there, by its weight, counted from where
            the others were when it came.
        levels: at which it waited when the last batch was taken, and has waited since.
        waiting: those that have structures in the queue, by ticket.
        requests: all that are open, by ticket.
        backlog: the work that they still bring, by priority.
    """

    identity: str
    share: Share
    virtual: dict[int, float] = field(default_factory=dict)
    levels: set[int] = field(default_factory=set)
    requests: dict[int, Request] = field(default_factory=dict)
    waiting: dict[int, Request] = field(default_factory=dict)
    backlog: dict[Priority, float] = field(default_factory=lambda: dict.fromkeys(Priority, 0.0))

    def change_backlog(self, priority: Priority, work: float) -> None:
        """Notes work that came, or that is done if it is below zero."""
        # Differences of floats leave dust, which must not add up over months.
        self.backlog[priority] = max(0.0, self.backlog[priority] + work) if self.requests else 0.0


class Clocks:
    """The virtual time of all at each level of urgency: where those begin who come anew."""

    def __init__(self) -> None:
        self._at: defaultdict[int, float] = defaultdict(float)

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
        self._now, self._seconds_of = now, seconds_of
        self._levels: defaultdict[int, dict[str, Flow]] = defaultdict(dict)
        self._requests: defaultdict[tuple[int, str], list[tuple[tuple[int, float], int]]] = defaultdict(list)
        self.weights: defaultdict[int, float] = defaultdict(float)
        for flow in flows:
            levels = set()
            for ticket, request in flow.waiting.items():
                level = request.urgency(now, ageing_seconds)
                levels.add(level)
                self._levels[level][flow.identity] = flow
                self._requests[level, flow.identity].append(
                    (request.place(self._now, self._seconds_of), ticket)
                )
            clocks.admit(flow, levels)
            for level in levels:
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

    def next_after(self, request: Request, *, again: bool) -> Request | None:
        """Whose turn it is once this one has had its own; with `again` it queues up once more."""
        flow = request.flow
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
