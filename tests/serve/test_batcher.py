"""The batcher against simulated time: what it promises holds for any sequence of arrivals."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from equipot.serve.batcher import FULL, Batch, Batcher, Budget
from equipot.serve.errors import DeadlineUnreachable, QueueFull
from equipot.serve.shares import Priority, Share
from equipot.serve.terms import BatchLimit, Terms
from equipot.serve.turns import QUANTUM_BATCHES

BUDGET = Budget(batch_edges=100, batch_atoms=40, queue_edges=10_000)


def queue(batcher: Batcher, edges: list[int], *, key: str = "m", atoms: int = 1, now: float = 0.0) -> int:
    """A request whose structures are all prepared at once."""
    ticket = batcher.open(key, now=now, expected_edges=0)
    batcher.add(ticket, [(i, atoms, e) for i, e in enumerate(edges)], now=now, expected_edges=0)
    return ticket


def take(batcher: Batcher, seconds: float = 1.0, now: float = 0.0) -> Batch:
    batch = batcher.next_batch(now)
    assert batch is not None
    batcher.finished(batch, seconds)
    return batch


def indices(batch: Batch, ticket: int) -> list[int]:
    return [item.index for item in batch.items if item.ticket == ticket]


class TestBatching:
    def test_a_lone_structure_goes_at_once(self) -> None:
        batcher = Batcher(BUDGET)
        assert batcher.next_batch(0.0) is None
        ticket = queue(batcher, [7])
        assert indices(take(batcher), ticket) == [0]
        assert batcher.next_batch(0.0) is None

    def test_what_came_while_the_engine_was_busy_goes_together(self) -> None:
        batcher = Batcher(BUDGET)
        tickets = [queue(batcher, [10]) for _ in range(5)]
        assert [item.ticket for item in take(batcher).items] == tickets

    def test_filled_to_the_edge_budget_and_no_further(self) -> None:
        batcher = Batcher(BUDGET)
        queue(batcher, [30] * 7)
        assert [len(take(batcher).items) for _ in range(3)] == [3, 3, 1]

    def test_atoms_bound_a_batch_of_structures_without_edges(self) -> None:
        batcher = Batcher(BUDGET)
        queue(batcher, [0] * 5, atoms=20)
        assert [len(take(batcher).items) for _ in range(3)] == [2, 2, 1]

    def test_a_structure_over_the_budget_goes_alone(self) -> None:
        batcher = Batcher(BUDGET)
        big = queue(batcher, [5_000])
        small = queue(batcher, [1])
        assert [item.ticket for item in take(batcher).items] == [big]
        assert [item.ticket for item in take(batcher).items] == [small]

    def test_different_keys_never_mix(self) -> None:
        batcher = Batcher(BUDGET)
        queue(batcher, [10] * 50, key="a")
        queue(batcher, [10] * 50, key="b")
        keys = [take(batcher).key for _ in range(10)]
        assert Counter(keys) == {"a": 5, "b": 5}


class TestFairness:
    def test_one_structure_is_not_stuck_behind_ten_thousand(self) -> None:
        batcher = Batcher(Budget(batch_edges=100, batch_atoms=100, queue_edges=10**9), pace=0.01)
        queue(batcher, [10] * 10_000)
        now = 0.0
        for _ in range(21):
            take(batcher, 1.0, now)
            now += 1.0
        small = queue(batcher, [10], now=now)
        assert indices(take(batcher, 1.0, now), small) == [0]

    def test_of_one_size_the_first_is_done_first(self) -> None:
        batcher = Batcher(BUDGET, pace=0.01)
        first, second = (queue(batcher, [10] * 30, now=float(now)) for now in range(2))
        order = [item.ticket for _ in range(6) for item in take(batcher, 1.0, 2.0).items]
        assert order == sorted(order)
        assert set(order) == {first, second}

    def test_two_large_requests_take_turns(self) -> None:
        batcher = Batcher(BUDGET, pace=0.01)
        first = queue(batcher, [10] * 400)
        now, shares = 0.0, Counter[int]()
        for _ in range(10):
            take(batcher, 1.0, now)
            now += 1.0
        second = queue(batcher, [10] * 400, now=now)
        for _ in range(24):
            shares.update(item.ticket for item in take(batcher, 1.0, now).items)
            now += 1.0
        assert abs(shares[first] - shares[second]) <= 10 * QUANTUM_BATCHES

    def test_a_large_cell_is_served_although_small_ones_keep_coming(self) -> None:
        batcher = Batcher(BUDGET, pace=0.01)
        now = 0.0
        for _ in range(10):
            queue(batcher, [10], now=now)
        large = queue(batcher, [100], atoms=40, now=now)
        n_batches, served = 0, False
        while not served:
            for _ in range(12):
                queue(batcher, [10], now=now)
            served = bool(indices(take(batcher, 1.0, now), large))
            now += 1.0
            n_batches += 1
        # Those who came as long after it as it takes itself, a batch's time, may go before it.
        assert n_batches <= 4

    def test_a_large_request_moves_on_although_small_ones_fill_every_batch(self) -> None:
        batcher = Batcher(Budget(batch_edges=100, batch_atoms=100, queue_edges=10**9), pace=0.01)
        large = queue(batcher, [10] * 1_000)
        now, served = 0.0, 0
        for _ in range(200):
            for _ in range(8):
                queue(batcher, [10], now=now)
            served += len(indices(take(batcher, 1.0, now), large))
            now += 1.0
        assert served >= 150


class TestDoor:
    def test_a_full_queue_refuses_and_says_when_to_come_back(self) -> None:
        batcher = Batcher(Budget(batch_edges=100, batch_atoms=100, queue_edges=250))
        queue(batcher, [100])
        take(batcher, seconds=1.0)
        queue(batcher, [100, 100])
        with pytest.raises(QueueFull, match=r"200 edges wait.*limit is 250") as caught:
            batcher.open("m", now=0.0, expected_edges=100)
        assert caught.value.retry_after == pytest.approx(1.0, rel=0.05)
        take(batcher)
        batcher.open("m", now=0.0, expected_edges=100)

    def test_what_is_announced_counts_before_it_is_added(self) -> None:
        batcher = Batcher(Budget(batch_edges=100, batch_atoms=100, queue_edges=250))
        ticket = batcher.open("m", now=0.0, expected_edges=200)
        with pytest.raises(QueueFull):
            batcher.open("m", now=0.0, expected_edges=100)
        batcher.remove(ticket)
        batcher.open("m", now=0.0, expected_edges=100)

    def test_an_empty_queue_takes_any_request(self) -> None:
        batcher = Batcher(Budget(batch_edges=100, batch_atoms=100, queue_edges=250))
        batcher.open("m", now=0.0, expected_edges=10_000)

    def test_a_hopeless_deadline_is_refused_at_the_door(self) -> None:
        batcher = Batcher(BUDGET)
        queue(batcher, [100])
        take(batcher, seconds=10.0)
        queue(batcher, [100] * 10, now=50.0)
        with pytest.raises(DeadlineUnreachable) as caught:
            batcher.open("m", now=50.0, expected_edges=500, deadline=51.0)
        assert caught.value.retry_after is not None
        batcher.open("m", now=50.0, expected_edges=1, deadline=51.0)
        batcher.open("m", now=50.0, expected_edges=500, deadline=500.0)

    def test_batches_bound_by_overhead_say_nothing_of_the_speed(self) -> None:
        batcher = Batcher(BUDGET)
        for _ in range(10):
            queue(batcher, [1])
            take(batcher, seconds=10.0)
        queue(batcher, [100] * 10)
        batcher.open("m", now=0.0, expected_edges=500, deadline=1.0)

    def test_a_deadline_that_has_passed_leaves_the_queue(self) -> None:
        batcher = Batcher(BUDGET)
        ticket = batcher.open("m", now=0.0, expected_edges=10, deadline=5.0)
        batcher.add(ticket, [(0, 1, 10)], now=1.0, expected_edges=0)
        assert batcher.expire(4.9) == []
        assert batcher.expire(5.0) == [ticket]
        assert batcher.next_batch(0.0) is None
        assert batcher.depth.edges == batcher.backlog == 0

    def test_a_cancelled_request_leaves_the_queue_and_may_not_come_back(self) -> None:
        batcher = Batcher(BUDGET)
        ticket, other = queue(batcher, [10, 10]), queue(batcher, [10])
        batcher.remove(ticket)
        batcher.remove(ticket)
        batcher.add(ticket, [(2, 1, 10)], now=0.0, expected_edges=0)
        assert [item.ticket for item in take(batcher).items] == [other]
        assert batcher.next_batch(0.0) is None


class BatcherMachine(RuleBasedStateMachine):
    """Any order of arrivals, cancellations, deadlines and batches, against a plain model of the queue."""

    SHARES: ClassVar = {"": Share(), "x": Share(weight=3.0), "y": Share(highest=Priority.HIGH)}

    @initialize(edges=st.integers(1, 60), atoms=st.integers(1, 60))
    def start(self, edges: int, atoms: int) -> None:
        self.budget = Budget(batch_edges=edges, batch_atoms=atoms, queue_edges=1_000, ageing_seconds=4.0)
        self.batcher = Batcher(self.budget, share_of=self.SHARES.__getitem__)
        self.terms = {key: Terms(BatchLimit(edges=edges, atoms=atoms)) for key in "ab"}
        self.now = 0.0
        self.waiting: dict[int, list[tuple[int, int, int]]] = {}
        self.asked: dict[int, tuple[str, str, Priority, float]] = {}
        self.sizes: dict[int, int] = {}
        self.deadlines: dict[int, float] = {}
        self.computed: set[tuple[int, int]] = set()
        self.slowest = 0.0
        self.leader, self.led_since = Priority.LOW, 0.0
        self.passed = dict.fromkeys(Priority, 0.0)

    @rule(
        key=st.sampled_from("ab"),
        identity=st.sampled_from(["", "x", "y"]),
        priority=st.sampled_from(Priority),
        sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 90)), min_size=1, max_size=8),
        patience=st.none() | st.floats(0.1, 20.0),
    )
    def arrive(
        self,
        key: str,
        identity: str,
        priority: Priority,
        sizes: list[tuple[int, int]],
        patience: float | None,
    ) -> None:
        edges = sum(e for _, e in sizes)
        deadline = None if patience is None else self.now + patience
        before = self.batcher.backlog
        try:
            ticket = self.batcher.open(
                key,
                now=self.now,
                expected_edges=edges,
                deadline=deadline,
                identity=identity,
                priority=priority,
                terms=self.terms[key],
            )
        except QueueFull:
            assert before > 0
            assert before + edges > self.budget.queue_edges
            return
        except DeadlineUnreachable:
            assert deadline is not None
            return
        items = [(i, atoms, e) for i, (atoms, e) in enumerate(sizes)]
        self.batcher.add(ticket, items, now=self.now, expected_edges=0)
        self.waiting[ticket] = items
        self.sizes[ticket] = edges
        self.asked[ticket] = (key, identity, min(priority, self.SHARES[identity].highest), self.now)
        if deadline is not None:
            self.deadlines[ticket] = deadline

    @rule(seconds=st.floats(0.01, 5.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        late = {t for t, deadline in self.deadlines.items() if deadline <= self.now and t in self.waiting}
        gone = set(self.batcher.expire(self.now))
        assert late <= gone
        for ticket in gone - late:
            assert len(self.waiting) > 1
            batches = max(1.0, self.sizes[ticket] / self.budget.batch_edges)
            assert self.deadlines[ticket] <= self.now + batches * self.slowest / FULL
        for ticket in gone:
            del self.waiting[ticket]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        self.batcher.remove(ticket)
        del self.waiting[ticket]

    @rule(key=st.sampled_from("ab"))
    def memory_runs_out(self, key: str) -> None:
        limit = self.terms[key].limit
        limit.ran_out_of_memory(edges=limit.edges, atoms=limit.atoms)

    @rule(seconds=st.floats(0.01, 5.0))
    def compute(self, seconds: float) -> None:
        self.since = {ticket: self.batcher._requests[ticket].since for ticket in self.waiting}
        self.last_turns = {
            (name, one): dict(zip(Priority, standing.passed, strict=False))
            for name, flow in self.batcher._flows.items()
            for one, standing in flow.standings.items()
        }
        for lower in (one for one in Priority if one < self.leader):
            self.passed[lower] += self.now - self.led_since
        self.led_since = self.now
        batch = self.batcher.next_batch(self.now)
        if batch is None:
            assert not any(self.waiting.values()), "the engine was left idle while something waited"
            return
        self.note_leader(batch)
        for item in batch.items:
            assert self.waiting[item.ticket].pop(0) == (item.index, item.n_atoms, item.n_edges)
            assert self.asked[item.ticket][0] == batch.key
            assert item.arrival <= self.now
            assert (item.ticket, item.index) not in self.computed
            self.computed.add((item.ticket, item.index))
        limit = self.terms[str(batch.key)].limit
        within = batch.n_edges <= limit.edges and batch.n_atoms <= limit.atoms
        assert within or len(batch.items) == 1
        if batch.n_edges < limit.edges and batch.n_atoms < limit.atoms:
            for ticket, items in self.waiting.items():
                if items and self.asked[ticket][0] == batch.key:
                    too_big = (
                        batch.n_edges + items[0][2] > limit.edges or batch.n_atoms + items[0][1] > limit.atoms
                    )
                    assert too_big, "room was left for a structure that fits"
        self.batcher.finished(batch, seconds)
        self.slowest = max(self.slowest, seconds)
        for ticket in [t for t, items in self.waiting.items() if not items]:
            self.batcher.remove(ticket)
            del self.waiting[ticket]

    def note_leader(self, batch: Batch) -> None:
        """Nothing less urgent leads, and nothing newer before an equal's request that needs no more."""
        leader = batch.items[0].ticket
        _, identity, self.leader, _ = self.asked[leader]
        for ticket in self.waiting:
            assert self.urgency(leader) >= self.urgency(ticket)
            equal = self.asked[ticket][1:3] == (identity, self.leader)
            timeless = ticket not in self.deadlines and leader not in self.deadlines
            if equal and timeless:
                longest_quantum = QUANTUM_BATCHES * self.slowest / FULL
                assert self.since[leader] <= self.since[ticket] + longest_quantum + 1e-9

    def urgency(self, ticket: int) -> int:
        """A step higher for each time that requests above it went first for so long since its last turn."""
        _, identity, priority, _ = self.asked[ticket]
        before = self.last_turns.get((identity, priority), self.passed)
        steps = [one for one in Priority if priority <= one < Priority.HIGH]
        urgency = int(priority)
        for ages, step in enumerate(steps, 1):
            if urgency == step and self.passed[step] - before[step] >= ages * self.budget.ageing_seconds:
                urgency += 1
        return urgency

    @invariant()
    def counts_are_exact(self) -> None:
        if not hasattr(self, "batcher"):
            return
        queued = [item for items in self.waiting.values() for item in items]
        depth = self.batcher.depth
        assert depth.edges == self.batcher.backlog == sum(e for _, _, e in queued)
        assert depth.atoms == sum(atoms for _, atoms, _ in queued)
        assert depth.requests == sum(1 for items in self.waiting.values() if items)

    def teardown(self) -> None:
        if hasattr(self, "batcher"):
            while any(self.waiting.values()):
                self.compute(seconds=0.1)


TestAnySequence = BatcherMachine.TestCase
TestAnySequence.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
