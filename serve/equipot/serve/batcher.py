"""Decides which structures are computed together, and when. Pure bookkeeping: no torch, no gRPC, no clock.

Client identities share the engine by weighted fair queueing: each has a virtual time, the work it has been
served since it came by its weight, and the one furthest behind is next. The virtual time of all moves on
with every batch, and whoever comes anew starts there, so that nobody saves up turns while idle. Each level of
urgency has its own: who waits among the less urgent saves up nothing among the urgent, and holds nothing up.

Requests of one identity are served as they came, but each counts as so much later as it takes itself: a small
one overtakes a large one that came just before, and none is overtaken for longer than its own work takes. A
large one queues up anew after each quantum of some batches. (To share evenly, structure by structure, would
make all of them late together once there is more work than time.) One whose deadline comes near is next.

Who is next leads the batch, whatever the size of its structure, and others of the same key follow in that
order as long as they fit.

Urgent requests go first. Where more urgent ones, of others or its own, passed an identity over for
`ageing_seconds`, its requests of that priority count as one priority higher until it had a turn, so that
nothing starves. To wait for those of the same priority is no reason: turns see to that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from equipot.serve.errors import DeadlineUnreachable, QueueFull
from equipot.serve.shares import EQUAL_SHARE, Priority, Share
from equipot.serve.terms import Backlog, BatchLimit, Terms
from equipot.serve.turns import Clocks, Flow, Item, Line, Request

RATE_MEMORY = 0.2
"""Weight of the newest batch in the running mean of the engine's speed."""

MARGIN = 1.3
"""A request is refused at the door if the work ahead, so many times, would take longer than its deadline is
away: a forecast is a mean, and those who are let in and then late have cost others their time."""

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
        ageing_seconds: for which an identity's requests of one priority are passed over by more urgent ones,
            without a turn, until they count as one priority higher.
    """

    batch_edges: int
    batch_atoms: int
    queue_edges: int
    ageing_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Structures to compute together; all have the same key.

    Attributes:
        key: what they share.
        items: the structures, the one that led first.
        n_edges: of the whole batch.
        n_atoms: of the whole batch.
        terms: of its key's work.
    """

    key: Hashable
    items: tuple[Item, ...]
    n_edges: int
    n_atoms: int
    terms: Terms

    @property
    def cost(self) -> int:
        """Work of the whole batch in edges, atoms included."""
        return self.n_edges + self.n_atoms

    @property
    def work(self) -> float:
        """The same in the unit that all keys share."""
        return self.cost * self.terms.price

    @property
    def fill(self) -> float:
        """The part of the budget that is used, of edges or of atoms; above 1 for a structure over it."""
        limit = self.terms.limit
        return max(self.n_edges / limit.edges, self.n_atoms / limit.atoms)


@dataclass(frozen=True, slots=True)
class Depth:
    """What waits: requests that have structures in the queue, their atoms and edges.

    Attributes:
        seconds: that computing all open requests would take, their structures still to come included.
    """

    requests: int
    atoms: int
    edges: int
    seconds: float


class Batcher:
    """The queue between requests and one engine. Times are seconds of any monotonic clock, passed in."""

    def __init__(
        self,
        budget: Budget,
        *,
        share_of: Callable[[str], Share] = lambda identity: EQUAL_SHARE,
        pace: float | None = None,
    ) -> None:
        """An empty queue.

        Args:
            budget: of batches and of the queue.
            share_of: what an identity may have; asked whenever one of its requests comes.
            pace: seconds for a unit of work (an edge times its price) until batches tell; None is unknown.
        """
        self._budget = budget
        self._terms = Terms(BatchLimit(edges=budget.batch_edges, atoms=budget.batch_atoms))
        self._share_of = share_of
        self._requests: dict[int, Request] = {}
        self._flows: dict[str, Flow] = {}
        self._next_ticket = 0
        self._clocks = Clocks()
        self._pace = pace
        self._running: Batch | None = None
        self._started = 0.0
        self._waiting = 0
        self._atoms = 0
        self._edges = 0
        self._open = Backlog()

    @property
    def depth(self) -> Depth:
        """What waits now; may be read from any thread."""
        return Depth(self._waiting, self._atoms, self._edges, self._seconds(self._open.work))

    @property
    def backlog(self) -> int:
        """Edges that wait, those that open requests still expect to add included."""
        return self._open.edges

    def waiting_edges(self, ticket: int) -> int:
        """Edges that one request has in the queue; 0 for a request that is not known."""
        request = self._requests.get(ticket)
        return request.queued_edges if request else 0

    def open(
        self,
        key: Hashable,
        *,
        now: float,
        expected_edges: int,
        deadline: float | None = None,
        identity: str = "",
        priority: Priority = Priority.NORMAL,
        terms: Terms | None = None,
    ) -> int:
        """Lets a request in and returns its ticket.

        Args:
            key: what structures must share to be computed together.
            now: the time.
            expected_edges: an estimate of the work it brings; it counts against the queue until it is added.
            deadline: when its caller gives up.
            identity: of its caller, who shares the engine with the others; "" for all that are unknown.
            priority: lowered to what the identity may have.
            terms: of this key's work; None is batches of the budget at a price of 1.

        Raises:
            QueueFull: there is no room for it now.
            DeadlineUnreachable: the work ahead takes longer than the caller would wait.
        """
        terms = terms or self._terms
        self._check_room(expected_edges, terms)
        share, priority = self._share(identity, priority)
        everything = self._running_work() + self._open.work + expected_edges * terms.price
        # With time enough in any order there is no need to look at each request.
        if deadline is not None and MARGIN * self._seconds(everything) > deadline - now:
            self.check(
                now=now,
                expected_edges=expected_edges,
                deadline=deadline,
                identity=identity,
                priority=priority,
                terms=terms,
            )
        flow = self._flows.get(identity)
        if flow is None:
            flow = self._flows[identity] = Flow(identity, share)
        flow.share = share
        ticket = self._next_ticket
        self._next_ticket += 1
        request = self._requests[ticket] = Request(
            ticket=ticket,
            key=key,
            deadline=deadline,
            flow=flow,
            priority=priority,
            terms=terms,
            expected=expected_edges,
        )
        request.take_turn(now)
        flow.requests[ticket] = request
        self._change_backlog(request, expected_edges)
        return ticket

    def check(
        self,
        *,
        now: float,
        expected_edges: int,
        deadline: float | None,
        identity: str,
        priority: Priority,
        terms: Terms | None = None,
    ) -> float:
        """Seconds until such a request would be computed, as far as the work ahead tells; it is not let in.

        Args:
            now, expected_edges, deadline, identity, priority, terms: as for `open`.

        Raises:
            QueueFull, DeadlineUnreachable: as `open` would.
        """
        terms = terms or self._terms
        self._check_room(expected_edges, terms)
        share, priority = self._share(identity, priority)
        work = expected_edges * terms.price
        ahead = self._work_ahead(now, work, identity, share, priority, deadline)
        seconds = self._seconds(ahead + work)
        busy = bool(self._running or self._open.work)
        if busy and deadline is not None and MARGIN * seconds > deadline - now:
            raise DeadlineUnreachable(
                f"the work ahead takes about {seconds:.2g} s, the deadline is in {deadline - now:.2g} s",
                retry_after=self._retry_after(ahead),
                facts={"expected_seconds": f"{seconds:.3f}"},
            )
        return self._seconds(ahead)

    def _check_room(self, expected_edges: int, terms: Terms) -> None:
        if self.backlog and self.backlog + expected_edges > self._budget.queue_edges:
            raise QueueFull(
                f"{self.backlog} edges wait and this request brings about {expected_edges} more; "
                f"the limit is {self._budget.queue_edges}",
                retry_after=self._retry_after(expected_edges * terms.price),
                facts={"queue_edges": str(self.backlog), "max_queue_edges": str(self._budget.queue_edges)},
            )

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
        before, was_waiting = request.edges, bool(request.items)
        for index, n_atoms, n_edges in items:
            request.items.append(Item(ticket, index, n_atoms, n_edges, now))
            request.queued_edges += n_edges
            self._edges += n_edges
            self._atoms += n_atoms
        request.expected = expected_edges
        request.reckon_stint()
        self._change_backlog(request, request.edges - before)
        if request.items and not was_waiting:
            request.flow.queue_up(request)
            self._waiting += 1

    def remove(self, ticket: int) -> None:
        """Forgets a request that is answered, cancelled or failed; what it had in the queue leaves it."""
        request = self._requests.pop(ticket, None)
        if request is None:
            return
        flow = request.flow
        if flow.waiting.pop(ticket, None) is not None:
            self._waiting -= 1
        self._edges -= request.queued_edges
        self._atoms -= sum(item.n_atoms for item in request.items)
        del flow.requests[ticket]
        self._change_backlog(request, -request.edges)
        self._forget(flow)

    def expire(self, now: float) -> list[int]:
        """Removes the requests that cannot be answered in time any more, and returns their tickets.

        Those are the ones whose deadline comes before the next batch would be done: computing them is what
        makes an overloaded server answer nobody in time.
        """
        waiting = self._open.work
        expired = [
            ticket
            for ticket, request in self._requests.items()
            if request.deadline is not None and request.deadline <= now + self._at_least(request, waiting)
        ]
        for ticket in expired:
            self.remove(ticket)
        return expired

    def next_batch(self, now: float) -> Batch | None:
        """Takes the next batch out of the queue; None if nothing waits. The engine must be idle."""
        flows = [flow for flow in self._flows.values() if flow.waiting]
        line = Line(flows, now, self._budget.ageing_seconds, self._seconds, self._clocks)
        leader = request = line.first()
        if leader is None:
            return None
        limit = leader.terms.limit
        edges = atoms = 0
        taken: list[Item] = []
        while request is not None:
            item = request.items[0]
            fits = edges + item.n_edges <= limit.edges and atoms + item.n_atoms <= limit.atoms
            # The leader goes whatever its size: a large cell would wait for ever for a batch with room.
            goes = request.key == leader.key and (fits or not taken)
            if goes:
                self._take(request, now, line)
                edges += item.n_edges
                atoms += item.n_atoms
                taken.append(item)
                if edges >= limit.edges or atoms >= limit.atoms:
                    break
            request = line.next_after(request, went=goes)
        self._edges -= edges
        self._atoms -= atoms
        self._running = batch = Batch(leader.key, tuple(taken), edges, atoms, leader.terms)
        self._started = now
        self._clocks.led_by(leader.priority)
        for flow in list(self._flows.values()):
            self._forget(flow)
        return batch

    def finished(self, batch: Batch, seconds: float | None) -> None:
        """Notes that the engine is idle again.

        Args:
            batch: that it had.
            seconds: that the batch took; None if that says nothing of others, as something in it failed.
        """
        self._running = None
        if not seconds or seconds < 0 or not batch.work or not batch.terms.settled:
            return
        pace, full = seconds / batch.work, batch.cost >= FULL * batch.terms.limit.edges
        if self._pace is None:
            self._pace = pace if full else None
        elif full or pace < self._pace:
            # A small batch that is quicker than full ones proves them quicker now: else a pace from a bad
            # moment would refuse the very requests that could mend it.
            self._pace += RATE_MEMORY * (pace - self._pace)

    def highest(self, identity: str) -> Priority:
        """The most urgent that a request of this identity can be."""
        return self._share_of(identity).highest

    def _share(self, identity: str, priority: Priority) -> tuple[Share, Priority]:
        share = self._share_of(identity)
        return share, min(priority, share.highest)

    def _work_ahead(
        self,
        now: float,
        work: float,
        identity: str,
        share: Share,
        priority: Priority,
        deadline: float | None,
    ) -> float:
        """What is computed before a new request of so much work is done, if nothing comes after it."""
        same = self._flows.get(identity)
        own = work
        if same:
            own += _before(same, priority, work, now + self._seconds(work), deadline, self._seconds)
        # In turns, others are served as much as this identity, by weight, before this request is done.
        ahead = own - work
        for flow in self._flows.values():
            ahead += sum(flow.backlog[higher].work for higher in Priority if higher > priority)
            if flow is not same:
                ahead += min(flow.backlog[priority].work, own * flow.share.weight / share.weight)
        elapsed = (now - self._started) / self._pace if self._pace else 0.0
        return ahead + max(0.0, self._running_work() - elapsed)

    def _running_work(self) -> float:
        return self._running.work if self._running else 0.0

    def _change_backlog(self, request: Request, edges: int) -> None:
        request.flow.backlog[request.priority].change(request.terms, edges)
        self._open.change(request.terms, edges)

    def _at_least(self, request: Request, waiting: float) -> float:
        """Seconds that it will take from now on; 0 if it is alone: then nothing is lost by trying."""
        if not request.items or waiting <= request.work:
            return 0.0
        return self._seconds(max(request.work, min(waiting, request.terms.limit.edges * request.terms.price)))

    def _take(self, request: Request, now: float, line: Line) -> None:
        """Charges a request's first item to it, to its identity and to all."""
        flow = request.flow
        item = request.items.popleft()
        request.queued_edges -= item.n_edges
        self._change_backlog(request, -item.n_edges)
        line.served(request)
        work = item.cost * request.terms.price
        flow.virtual[line.level] += work / flow.share.weight
        self._clocks.move(line.level, work / line.weights[line.level])
        request.served += item.cost
        if request.served >= request.quantum:
            request.take_turn(now)
        if not request.items:
            del flow.waiting[request.ticket]
            self._waiting -= 1

    def _forget(self, flow: Flow) -> None:
        # One that was served ahead of the others is remembered until they have caught up.
        if not flow.requests and self._clocks.has_caught_up(flow):
            self._flows.pop(flow.identity, None)

    def _retry_after(self, work: float) -> float:
        return max(SHORTEST_RETRY, self._seconds(work)) if self._pace else FIRST_RETRY

    def _seconds(self, work: float) -> float:
        return work * self._pace if self._pace else 0.0


def _before(
    flow: Flow,
    priority: Priority,
    work: float,
    turn: float,
    deadline: float | None,
    seconds_of: Callable[[float], float],
) -> float:
    """What a flow's requests have done before another one of so much work, this turn and deadline is done.

    Those that need more than a quantum let it go first once theirs is over, unless it needs as much itself.
    """
    return sum(
        min(request.work, max((request.quantum - request.served) * request.terms.price, work))
        for request in flow.requests.values()
        if request.priority is priority
        and (
            request.turn(seconds_of) <= turn
            or (deadline is not None and request.deadline is not None and request.deadline <= deadline)
        )
    )
