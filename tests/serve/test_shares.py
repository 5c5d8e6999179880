"""Who goes first and how long the others wait: identities, weights, priorities, age and deadlines."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.test_batcher import BUDGET, indices, queue, take

from equipot.serve.batcher import Batcher, Budget
from equipot.serve.errors import DeadlineUnreachable
from equipot.serve.shares import Priority, Share
from equipot.serve.terms import BatchLimit, Terms

ENDLESS = Budget(batch_edges=100, batch_atoms=40, queue_edges=10**9)
SIZES = st.lists(st.integers(0, 90), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    sizes=st.tuples(SIZES, SIZES),
    n_requests=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    n_batches=st.integers(1, 10),
)
def test_identities_share_by_weight_within_one_batch(
    weights: tuple[int, int],
    sizes: tuple[list[int], list[int]],
    n_requests: tuple[int, int],
    n_batches: int,
) -> None:
    shares = {name: Share(weight=weight) for name, weight in zip("xy", weights, strict=True)}
    batcher = Batcher(Budget(batch_edges=100, batch_atoms=50, queue_edges=10**9), share_of=shares.__getitem__)
    owners = {}
    for name, edges, count in zip("xy", sizes, n_requests, strict=True):
        for _ in range(count):
            ticket = batcher.open("m", now=0.0, expected_edges=0, identity=name)
            batcher.add(
                ticket, [(i, 1, e) for i, e in enumerate(edges * 600)][:600], now=0.0, expected_edges=0
            )
            owners[ticket] = name
    served = Counter[str]()
    for _ in range(n_batches):
        largest = max(map(max, sizes))
        for item in take(batcher).items:
            served[owners[item.ticket]] += item.cost
        one_batch = 150 + largest + 1
        gap = served["x"] / weights[0] - served["y"] / weights[1]
        assert abs(gap) <= 2 * one_batch / min(weights)


@settings(max_examples=60, deadline=None)
@given(
    edges=st.integers(1, 300),
    priority=st.sampled_from(Priority),
    flood=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seconds=st.floats(0.1, 2.0),
)
def test_nothing_starves_whatever_urgent_work_keeps_coming(
    edges: int, priority: Priority, flood: list[int], seconds: float
) -> None:
    shares = {"x": Share(), "y": Share(highest=Priority.HIGH)}
    budget = Budget(batch_edges=100, batch_atoms=10**6, queue_edges=10**9, ageing_seconds=5.0)
    batcher = Batcher(budget, share_of=shares.__getitem__)
    ticket = batcher.open("m", now=0.0, expected_edges=0, identity="x", priority=priority)
    batcher.add(ticket, [(0, 1, edges)], now=0.0, expected_edges=0)
    now = 0.0
    while True:
        for size in flood:
            urgent = batcher.open("m", now=now, expected_edges=0, identity="y", priority=Priority.HIGH)
            batcher.add(urgent, [(0, 1, size)], now=now, expected_edges=0)
        if indices(take(batcher, seconds, now), ticket):
            break
        now += seconds
    # Two ages at most until it is as urgent as anything, then a turn.
    assert now <= 2 * budget.ageing_seconds + 2 * seconds


@settings(max_examples=12, deadline=None)
@given(
    callers=st.lists(
        st.tuples(st.integers(1, 10), st.sampled_from([1, 12]), st.sampled_from(Priority)),
        min_size=2,
        max_size=20,
    )
)
def test_ageing_is_for_who_is_passed_over_and_turns_see_to_the_others(
    callers: list[tuple[int, int, Priority]],
) -> None:
    """Callers of any weight keep some requests open, each of a second; all of one priority, then of any."""
    budget = Budget(batch_edges=100, batch_atoms=100, queue_edges=10**9, ageing_seconds=5.0)
    shares = {
        str(index): Share(weight=caller[0], highest=Priority.HIGH) for index, caller in enumerate(callers)
    }
    weights = sum(share.weight for share in shares.values())

    def served(priorities: list[Priority], n_batches: int) -> tuple[Counter[str], Counter[str]]:
        """Batches of each caller, and the longest time that each was without one."""
        batcher = Batcher(budget, share_of=shares.__getitem__, pace=0.01)
        counts, last, longest, owners = Counter[str](), Counter[str](), Counter[str](), dict[int, str]()

        def ask(name: str, now: float) -> None:
            priority = priorities[int(name)]
            ticket = batcher.open("m", now=now, expected_edges=0, identity=name, priority=priority)
            batcher.add(ticket, [(0, 1, 99)], now=now, expected_edges=0)
            owners[ticket] = name

        for name in shares:
            for _ in range(callers[int(name)][1]):
                ask(name, 0.0)
        for now in range(n_batches):
            (item,) = take(batcher, 1.0, float(now)).items
            batcher.remove(item.ticket)
            name = owners.pop(item.ticket)
            counts[name] += 1
            longest[name] = max(longest[name], now - last[name])
            last[name] = now
            ask(name, now + 1.0)
        for name in shares:
            longest[name] = max(longest[name], n_batches - last[name])
        return counts, longest

    counts, _ = served([Priority.NORMAL] * len(callers), 300)
    for name, share in shares.items():
        assert abs(counts[name] - 300 * share.weight / weights) <= share.weight + 1
    priorities = [priority for _, _, priority in callers]
    _, longest = served(priorities, 600)
    for name, share in shares.items():
        ages = max(priorities) - priorities[int(name)]
        # While it ages others who do have a turn each; then it is behind one of each, and what it had before.
        longest_round = len(callers) + weights / share.weight
        assert longest[name] <= ages * (budget.ageing_seconds + len(callers)) + longest_round


class TestShares:
    def test_the_urgent_go_first_and_nobody_is_more_urgent_than_allowed(self) -> None:
        shares = {"x": Share(), "y": Share(highest=Priority.HIGH)}
        batcher = Batcher(ENDLESS, share_of=shares.__getitem__)
        asked = [("x", Priority.LOW), ("x", Priority.NORMAL), ("x", Priority.HIGH), ("y", Priority.HIGH)]
        tickets = []
        for identity, priority in asked:
            ticket = batcher.open("m", now=0.0, expected_edges=0, identity=identity, priority=priority)
            batcher.add(ticket, [(0, 1, 100)], now=0.0, expected_edges=0)
            tickets.append(ticket)
        order = [take(batcher).items[0].ticket for _ in asked]
        assert order == [tickets[3], tickets[1], tickets[2], tickets[0]]

    def test_work_that_its_own_callers_urgent_work_passes_over_has_turns_too(self) -> None:
        batcher = Batcher(ENDLESS, pace=0.01)
        urgent, low, turns = dict[int, int](), set[int](), [0]

        def ask(key: str, edges: int, priority: Priority) -> int:
            ticket = batcher.open(key, now=now, expected_edges=0, priority=priority)
            batcher.add(ticket, [(0, 1, edges)], now=now, expected_edges=0)
            return ticket

        for now in range(300):
            # Twice what the engine can do; of the rest, what is small finds room in those batches.
            for _ in range(2):
                urgent[ask("m", 79, Priority.NORMAL)] = now
            low |= {ask("m", 79, Priority.LOW), ask("other", 79, Priority.LOW)}
            ask("m", 20, Priority.LOW)
            for item in take(batcher, 1.0, float(now)).items:
                batcher.remove(item.ticket)
                urgent.pop(item.ticket, None)
                if item.ticket in low:
                    # Nothing urgent is left that came before these had been passed over for so long.
                    assert min(urgent.values()) >= turns[-1] + ENDLESS.ageing_seconds - 1
                    turns.append(now)
        assert 3 < len(turns) <= 300 / ENDLESS.ageing_seconds

    def test_many_requests_of_one_identity_get_no_more_than_one_of_another(self) -> None:
        batcher = Batcher(ENDLESS)
        for _ in range(50):
            ticket = batcher.open("m", now=0.0, expected_edges=0, identity="many")
            batcher.add(ticket, [(i, 1, 50) for i in range(20)], now=0.0, expected_edges=0)
        one = batcher.open("m", now=0.0, expected_edges=0, identity="one")
        batcher.add(one, [(i, 1, 50) for i in range(20)], now=0.0, expected_edges=0)
        for _ in range(22):
            take(batcher)
        assert batcher.waiting_edges(one) == 0

    def test_turns_are_given_by_work_and_not_by_edges(self) -> None:
        batcher = Batcher(ENDLESS)
        for key, price in (("light", 1.0), ("heavy", 9.0)):
            terms = Terms(BatchLimit(edges=100, atoms=40), price=price)
            ticket = batcher.open(key, now=0.0, expected_edges=0, identity=key, terms=terms)
            batcher.add(ticket, [(i, 1, 100) for i in range(200)], now=0.0, expected_edges=0)
        keys = Counter(take(batcher).key for _ in range(100))
        assert 88 <= keys["light"] <= 92

    def test_one_that_comes_back_has_saved_up_nothing_and_owes_what_it_took(self) -> None:
        batcher = Batcher(ENDLESS)
        served = Counter[str]()
        owners = {}

        def ask(identity: str, count: int) -> None:
            ticket = batcher.open("m", now=0.0, expected_edges=0, identity=identity)
            batcher.add(ticket, [(i, 1, 50) for i in range(count)], now=0.0, expected_edges=0)
            owners[ticket] = identity

        ask("steady", 400)
        for _ in range(40):
            take(batcher)
        ask("new", 400)
        for _ in range(20):
            served.update(owners[item.ticket] for item in take(batcher).items)
        assert abs(served["steady"] - served["new"]) <= 4

    @pytest.mark.parametrize("patient", ["other", "new"])
    def test_work_that_waits_as_less_urgent_saves_up_nothing_for_anybody(self, patient: str) -> None:
        batcher = Batcher(ENDLESS)
        owners: dict[int, tuple[str, Priority]] = {}

        def ask(identity: str, priority: Priority, now: float) -> None:
            ticket = batcher.open("m", now=now, expected_edges=0, identity=identity, priority=priority)
            batcher.add(ticket, [(0, 1, 100)], now=now, expected_edges=0)
            owners[ticket] = identity, priority

        for identity, priority in (("old", Priority.NORMAL), (patient, Priority.LOW)):
            for _ in range(2):
                ask(identity, priority, 0.0)
        served = Counter[str]()
        for batch in range(2_000):
            now = 0.1 * batch
            if batch == 1_000:
                served.clear()
                for _ in range(2):
                    ask("new", Priority.NORMAL, now)
            for item in take(batcher, 0.1, now).items:
                identity, priority = owners.pop(item.ticket)
                batcher.remove(item.ticket)
                served[identity] += priority is Priority.NORMAL
                ask(identity, priority, now + 0.1)
        assert abs(served["old"] - served["new"]) <= 0.1 * served["old"]

    def test_identities_that_left_are_forgotten(self) -> None:
        batcher = Batcher(ENDLESS)
        for number in range(1_000):
            ticket = batcher.open("m", now=0.0, expected_edges=0, identity=str(number))
            batcher.add(ticket, [(0, 1, 10)], now=0.0, expected_edges=0)
            if number % 3:
                batcher.remove(ticket)
            else:
                take(batcher)
                batcher.remove(ticket)
        assert len(batcher._flows) <= 2

    @pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
    def test_a_weight_must_be_a_positive_number(self, weight: float) -> None:
        with pytest.raises(ValueError, match="weight"):
            Share(weight=weight)


class TestDeadlines:
    def test_one_whose_deadline_comes_near_is_next(self) -> None:
        batcher = Batcher(BUDGET)
        queue(batcher, [99])
        take(batcher, seconds=1.0)
        others = [batcher.open("m", now=0.0, expected_edges=0) for _ in range(20)]
        large = batcher.open("m", now=0.0, expected_edges=0, deadline=12.0)
        batcher.add(large, [(i, 1, 99) for i in range(3)], now=0.0, expected_edges=0)
        for other in others:
            batcher.add(other, [(0, 1, 99)], now=0.0, expected_edges=0)
        assert take(batcher, now=0.0).items[0].ticket != large
        assert take(batcher, now=5.0).items[0].ticket == large

    def test_more_work_than_time_and_what_is_let_in_is_done_in_time(self) -> None:
        batcher = Batcher(Budget(batch_edges=100, batch_atoms=100, queue_edges=10**9))
        queue(batcher, [99])
        take(batcher, seconds=0.1)
        now, done, dropped, refused = 0.0, 0, 0, 0
        open_items: dict[int, int] = {}
        for _ in range(1_000):
            # Ten times as much as the engine can do: ten requests of four batches in four batches' time.
            for _ in range(3):
                try:
                    ticket = batcher.open("m", now=now, expected_edges=400, deadline=now + 4.0)
                except DeadlineUnreachable:
                    refused += 1
                    continue
                open_items[ticket] = 4
                batcher.add(ticket, [(i, 1, 99) for i in range(4)], now=now, expected_edges=0)
            dropped += len([ticket for ticket in batcher.expire(now) if open_items.pop(ticket)])
            batch = batcher.next_batch(now)
            assert batch is not None
            now += 0.1
            batcher.finished(batch, 0.1)
            for item in batch.items:
                open_items[item.ticket] -= 1
                if not open_items[item.ticket]:
                    del open_items[item.ticket]
                    batcher.remove(item.ticket)
                    done += 1
        assert refused > 2_000
        assert done >= 0.95 * 250
        assert dropped <= 0.1 * done

    def test_what_cannot_be_done_in_time_any_more_makes_room_for_what_can(self) -> None:
        batcher = Batcher(BUDGET)
        queue(batcher, [100] * 2)
        take(batcher, seconds=10.0)
        late = batcher.open("m", now=0.0, expected_edges=1, deadline=15.0)
        batcher.add(late, [(0, 1, 50)], now=0.0, expected_edges=0)
        assert batcher.expire(4.0) == []
        assert batcher.expire(6.0) == [late]

    def test_alone_it_is_tried_however_slow_the_engine_was(self) -> None:
        batcher = Batcher(BUDGET)
        queue(batcher, [100])
        take(batcher, seconds=100.0)
        ticket = batcher.open("m", now=0.0, expected_edges=100, deadline=1.0)
        batcher.add(ticket, [(0, 1, 100)], now=0.0, expected_edges=0)
        assert batcher.expire(0.5) == []
        assert indices(take(batcher), ticket) == [0]

    def test_one_slow_moment_does_not_refuse_for_ever(self) -> None:
        batcher = Batcher(BUDGET)
        queue(batcher, [100])
        take(batcher, seconds=100.0)
        refused = 0
        for _ in range(60):
            queue(batcher, [10])
            try:
                batcher.remove(batcher.open("m", now=0.0, expected_edges=10, deadline=1.0))
            except DeadlineUnreachable:
                refused += 1
            take(batcher, seconds=0.01)
        assert 0 < refused < 60

    def test_the_wait_is_foretold_by_what_is_ahead(self) -> None:
        shares = {"x": Share(weight=1.0), "y": Share(weight=3.0), "": Share()}
        batcher = Batcher(
            Budget(batch_edges=100, batch_atoms=100, queue_edges=10**6), share_of=shares.__getitem__
        )
        queue(batcher, [99])
        take(batcher, seconds=1.0)

        def wait(identity: str, priority: Priority = Priority.NORMAL, edges: int = 100) -> float:
            return batcher.check(
                now=0.0, expected_edges=edges, deadline=None, identity=identity, priority=priority
            )

        assert wait("x") == 0.0
        first = batcher.open("m", now=0.0, expected_edges=1_000, identity="x")
        batcher.add(first, [(i, 1, 99) for i in range(10)], now=0.0, expected_edges=0)
        assert wait("x") == 0.0  # it is small, and overtakes the other of its own, which came just now
        assert wait("y") == pytest.approx(1 / 3, rel=0.1)
        assert wait("x", edges=2_000) == pytest.approx(10.0, rel=0.1)
        assert wait("y", Priority.LOW) == pytest.approx(10.0, rel=0.1)
        batch = batcher.next_batch(0.0)
        assert batch is not None
        assert wait("y") == pytest.approx(1.0 + 1 / 3, rel=0.1)
