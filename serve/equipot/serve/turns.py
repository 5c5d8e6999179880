"""Whose turn it is: waiting requests by urgency, then client identity, then request. Knows no budget."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from equipot.serve.shares import Backlog, Priority, Share


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
        virtual: the work that it was served, counted from where the others were when it came.
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
    virtual: float
    items: deque[Item] = field(default_factory=deque)
    queued_edges: int = 0

    @property
    def work(self) -> float:
        """What is left of it, in the unit that all keys share."""
        return (self.expected + self.queued_edges) * self.price

    def urgency(self, now: float, ageing_seconds: float) -> int:
        """The priority, higher for each time it has waited so long."""
        waited = (now - self.items[0].arrival) / ageing_seconds
        return min(Priority.HIGH, self.priority + max(0, int(min(waited, Priority.HIGH))))


@dataclass(slots=True)
class Flow:
    """One client identity: its place among the others, and its own requests.

    Attributes:
        virtual: the work that it was served, by its weight, counted from where the others were when it came.
        inner: the virtual time of its own requests; a new one starts here.
        n_open: how many of them there are.
        waiting: those that have structures in the queue, by ticket.
        backlog: the work that all of them still bring, by priority.
    """

    identity: str
    share: Share
    virtual: float
    inner: float = 0.0
    n_open: int = 0
    waiting: dict[int, Request] = field(default_factory=dict)
    backlog: dict[Priority, Backlog] = field(default_factory=lambda: {p: Backlog() for p in Priority})


class Line:
    """The waiting requests in the order of their turns: by urgency, then identity, then request."""

    def __init__(self, flows: Iterable[Flow], now: float, ageing_seconds: float) -> None:
        self._levels: defaultdict[int, dict[str, Flow]] = defaultdict(dict)
        self._requests: defaultdict[tuple[int, str], list[tuple[float, int]]] = defaultdict(list)
        for flow in flows:
            for ticket, request in flow.waiting.items():
                level = request.urgency(now, ageing_seconds)
                self._levels[level][flow.identity] = flow
                self._requests[level, flow.identity].append((request.virtual, ticket))
        self._level = 0
        self._turns: list[tuple[float, int, str]] = []

    def first(self) -> Request | None:
        """Whose turn it is; None if nobody waits."""
        while not self._turns:
            if not self._levels:
                return None
            self._level = max(self._levels)
            self._flows = self._levels.pop(self._level)
            for identity, flow in self._flows.items():
                heapq.heapify(self._requests[self._level, identity])
                self._queue_up(flow)
        _, ticket, identity = heapq.heappop(self._turns)
        heapq.heappop(self._requests[self._level, identity])
        return self._flows[identity].waiting[ticket]

    def next_after(self, request: Request, *, again: bool) -> Request | None:
        """Whose turn it is once this one has had its own; with `again` it queues up once more."""
        flow = request.flow
        if again:
            heapq.heappush(self._requests[self._level, flow.identity], (request.virtual, request.ticket))
        self._queue_up(flow)
        return self.first()

    def _queue_up(self, flow: Flow) -> None:
        if requests := self._requests[self._level, flow.identity]:
            heapq.heappush(self._turns, (flow.virtual, requests[0][1], flow.identity))
