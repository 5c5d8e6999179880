"""Decides which structures are computed together, and when. Pure bookkeeping: no torch, no gRPC, no clock.

Requests share the engine by weighted fair queueing. Each waiting request has a virtual time, the work it
has been served since it came; the one furthest behind leads the next batch, whatever the size of its
structure, and others of the same key follow in that order as long as they fit. The queue's own virtual time
moves on with every batch, and a new request starts there: so a small request overtakes the rest of a large
one, a large cell cannot be passed over by those that come after it, and nobody starves.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from equipot.serve.errors import DeadlineUnreachable, QueueFull

RATE_MEMORY = 0.2
"""Weight of the newest batch in the running mean of the engine's speed."""

REFUSAL_MARGIN = 2.0
"""A deadline is refused at the door if the expected wait is this many times longer: it comes from a mean."""

FULL = 0.5
"""Part of the edge budget from which a batch tells the engine's speed: small ones are bound by overhead."""

FIRST_RETRY = 1.0
"""Seconds that a refused caller is told to wait while the engine's speed is not known yet."""

SHORTEST_RETRY = 0.1
"""Seconds below which a refused caller is never told to come back: refusals cost work too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much goes into one batch and how much may wait.

    Attributes:
        batch_edges: most edges in one batch; a structure with more is computed alone.
        batch_atoms: most atoms in one batch, for structures with few edges.
        queue_edges: most edges that may wait; a request beyond it is refused, unless nothing waits.
    """

    batch_edges: int
    batch_atoms: int
    queue_edges: int


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


@dataclass(frozen=True, slots=True)
class Batch:
    """Structures to compute together; all have the same key."""

    key: Hashable
    items: tuple[Item, ...]

    @property
    def n_edges(self) -> int:
        """Edges of the whole batch."""
        return sum(item.n_edges for item in self.items)

    @property
    def cost(self) -> int:
        """Work of the whole batch in edges, atoms included."""
        return sum(item.cost for item in self.items)


@dataclass(frozen=True, slots=True)
class Depth:
    """What waits: requests that have structures in the queue, and their atoms and edges."""

    requests: int
    atoms: int
    edges: int


@dataclass(slots=True)
class _Request:
    ticket: int
    key: Hashable
    deadline: float | None
    expected: int
    virtual: float
    items: deque[Item] = field(default_factory=deque)
    queued_edges: int = 0

    @property
    def remaining(self) -> int:
        return self.expected + self.queued_edges


class Batcher:
    """The queue between requests and one engine. Times are seconds of any monotonic clock, passed in."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._requests: dict[int, _Request] = {}
        self._next_ticket = 0
        self._virtual = 0.0
        self._rate: float | None = None
        self._running = 0
        self._waiting = 0
        self._atoms = 0
        self._edges = 0
        self._expected = 0

    @property
    def depth(self) -> Depth:
        """What waits now; may be read from any thread."""
        return Depth(self._waiting, self._atoms, self._edges)

    @property
    def backlog(self) -> int:
        """Edges that wait, those that open requests still expect to add included."""
        return self._edges + self._expected

    def waiting_edges(self, ticket: int) -> int:
        """Edges that one request has in the queue; 0 for a request that is not known."""
        request = self._requests.get(ticket)
        return request.queued_edges if request else 0

    def open(self, key: Hashable, *, now: float, expected_edges: int, deadline: float | None = None) -> int:
        """Lets a request in and returns its ticket.

        Args:
            key: what structures must share to be computed together.
            now: the time.
            expected_edges: an estimate of the work it brings; it counts against the queue until it is added.
            deadline: when its caller gives up.

        Raises:
            QueueFull: there is no room for it now.
            DeadlineUnreachable: the work ahead takes much longer than the caller would wait.
        """
        if self.backlog and self.backlog + expected_edges > self._budget.queue_edges:
            raise QueueFull(
                f"{self.backlog} edges wait and this request brings about {expected_edges} more; "
                f"the limit is {self._budget.queue_edges}",
                retry_after=self._retry_after(expected_edges),
                facts={"queue_edges": str(self.backlog), "max_queue_edges": str(self._budget.queue_edges)},
            )
        if deadline is not None and (ahead := self._work_ahead(expected_edges)):
            wait = self._seconds(ahead + expected_edges)
            if wait > REFUSAL_MARGIN * (deadline - now):
                raise DeadlineUnreachable(
                    f"the work ahead takes about {wait:.2g} s, the deadline is in {deadline - now:.2g} s",
                    retry_after=self._retry_after(ahead),
                    facts={"expected_seconds": f"{wait:.3f}"},
                )
        ticket = self._next_ticket
        self._next_ticket += 1
        self._requests[ticket] = _Request(ticket, key, deadline, expected_edges, self._virtual)
        self._expected += expected_edges
        return ticket

    def add(
        self, ticket: int, items: Iterable[tuple[int, int, int]], *, now: float, expected_edges: int
    ) -> None:
        """Queues structures (index, n_atoms, n_edges) of an open request.

        Args:
            ticket: of the request; one that has left meanwhile is ignored.
            items: the structures, first come first served within the request.
            now: the time.
            expected_edges: an estimate of what the request will still add.
        """
        request = self._requests.get(ticket)
        if request is None:
            return
        if not request.items:
            request.virtual = max(request.virtual, self._virtual)
        was_waiting = bool(request.items)
        for index, n_atoms, n_edges in items:
            request.items.append(Item(ticket, index, n_atoms, n_edges, now))
            request.queued_edges += n_edges
            self._edges += n_edges
            self._atoms += n_atoms
        self._waiting += bool(request.items) - was_waiting
        self._expected += expected_edges - request.expected
        request.expected = expected_edges

    def remove(self, ticket: int) -> None:
        """Forgets a request that is answered, cancelled or failed; what it had in the queue leaves it."""
        request = self._requests.pop(ticket, None)
        if request is None:
            return
        self._waiting -= bool(request.items)
        self._expected -= request.expected
        self._edges -= request.queued_edges
        self._atoms -= sum(item.n_atoms for item in request.items)

    def expire(self, now: float) -> list[int]:
        """Removes the requests whose deadline has passed, and returns their tickets."""
        expired = [
            ticket
            for ticket, request in self._requests.items()
            if request.deadline is not None and request.deadline <= now
        ]
        for ticket in expired:
            self.remove(ticket)
        return expired

    def next_batch(self) -> Batch | None:
        """Takes the next batch out of the queue; None if nothing waits. The engine must be idle."""
        order = [(request.virtual, ticket) for ticket, request in self._requests.items() if request.items]
        if not order:
            return None
        n_waiting = len(order)
        heapq.heapify(order)
        key = self._requests[order[0][1]].key
        edges = atoms = 0
        taken: list[Item] = []
        while order and edges < self._budget.batch_edges and atoms < self._budget.batch_atoms:
            request = self._requests[heapq.heappop(order)[1]]
            item = request.items[0]
            fits = (
                edges + item.n_edges <= self._budget.batch_edges
                and atoms + item.n_atoms <= self._budget.batch_atoms
            )
            # The leader goes whatever its size: a large cell would wait for ever for a batch with room.
            if request.key != key or (taken and not fits):
                continue
            request.items.popleft()
            request.queued_edges -= item.n_edges
            request.virtual += item.cost
            edges += item.n_edges
            atoms += item.n_atoms
            taken.append(item)
            if request.items:
                heapq.heappush(order, (request.virtual, request.ticket))
            else:
                self._waiting -= 1
        self._edges -= edges
        self._atoms -= atoms
        self._virtual += (edges + atoms) / n_waiting
        self._running = edges + atoms
        return Batch(key, tuple(taken))

    def finished(self, batch: Batch, seconds: float) -> None:
        """Notes that the engine is idle again, and how long the batch took it."""
        self._running = 0
        if seconds > 0 and batch.cost >= FULL * self._budget.batch_edges:
            rate = batch.cost / seconds
            self._rate = rate if self._rate is None else self._rate + RATE_MEMORY * (rate - self._rate)

    def _work_ahead(self, expected_edges: int) -> int:
        # In turns, each request ahead is served about as much as this one before this one is done.
        return self._running + sum(
            min(request.remaining, expected_edges) for request in self._requests.values()
        )

    def _retry_after(self, edges: int) -> float:
        return max(SHORTEST_RETRY, self._seconds(edges)) if self._rate else FIRST_RETRY

    def _seconds(self, edges: int) -> float:
        return edges / self._rate if self._rate else 0.0
