"""The size of batches is measured, within time and memory, and shrinks when memory runs out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.serve.conftest import Bundles, ask, inside, molecule, read, run
from tests.serve.test_sharing import ROOMY, config

from equipot.model.batch import Graph
from equipot.serve import capacity
from equipot.serve.batcher import Batcher
from equipot.serve.capacity import LATENCY_SECONDS, LEAST_SECONDS, Capacity, measure
from equipot.serve.config import CPU_BUDGET, DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, Result
from equipot.serve.errors import Fault
from equipot.serve.machine import MemoryMeter
from equipot.serve.pace import Size
from equipot.serve.shares import Priority
from equipot.serve.terms import BatchLimit, Terms


class Timed:
    """Stands for an engine of any speed: the clock that measures it goes by the work, not by the machine."""

    def __init__(self, engine: LocalEngine, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        self.largest = 0
        self.card, self.measurable, self.prepare = engine.card, True, engine.prepare
        self._seconds = seconds

    def perf_counter(self) -> float:
        return self.now

    def compute(self, graphs: Sequence[Graph], *, forces: bool, stress: bool) -> list[Result | Fault]:
        edges = sum(graph.n_edges for graph in graphs)
        self.largest = max(self.largest, edges)
        self.now += self._seconds(edges)
        return [Result(0.0, np.zeros((graph.n_atoms, 3)), None) for graph in graphs]


@pytest.fixture
def engine(bundles: Bundles) -> LocalEngine:
    return LocalEngine.load(bundles.tiny, dtype=None, device="cpu", limits=DEFAULT_LIMITS, threads=1)


def measured(
    engine: LocalEngine,
    seconds: Callable[[int], float],
    monkeypatch: pytest.MonkeyPatch,
    *,
    calibrate: bool = True,
) -> tuple[capacity.Capacity, Timed]:
    timed = Timed(engine, seconds)
    monkeypatch.setattr(capacity.time, "perf_counter", timed.perf_counter)  # type: ignore[attr-defined]
    return measure(timed, CPU_BUDGET, calibrate=calibrate, device="cpu"), timed  # type: ignore[arg-type]


class TestCalibration:
    def test_batches_grow_until_speed_does_not(
        self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # 5 ms for whatever is in it: half of the speed at 5,000 edges, 95 % at 95,000.
        found, timed = measured(engine, lambda edges: 0.005 + 1e-6 * edges, monkeypatch)
        assert 60_000 < found.limit.edges < 200_000
        assert timed.now < capacity.CALIBRATION_SECONDS

    def test_a_slow_model_gets_batches_that_others_can_wait_for(
        self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, timed = measured(engine, lambda edges: 0.05 + 1e-4 * edges, monkeypatch)
        assert found.limit.edges * found.terms.price < 1.01 * LATENCY_SECONDS
        assert timed.now < 2 * capacity.CALIBRATION_SECONDS

    def test_a_quick_model_gets_batches_worth_handing_over(
        self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, timed = measured(engine, lambda edges: 1e-6 * edges, monkeypatch)
        assert found.limit.edges * found.terms.price > 0.9 * LEAST_SECONDS
        assert timed.now < 0.5

    def test_a_model_that_takes_seconds_is_tried_once(
        self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, timed = measured(engine, lambda edges: 5.0 + 0.05 * edges, monkeypatch)
        assert found.limit.edges == timed.largest

    def test_an_explicit_number_is_kept_and_only_a_glance_taken(
        self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, timed = measured(engine, lambda edges: 1e-6 * edges, monkeypatch, calibrate=False)
        assert found.limit.edges == CPU_BUDGET.batch_edges
        assert timed.now <= capacity.GLANCE_SECONDS
        assert found.terms.price == pytest.approx(1e-6, rel=0.1)

    def test_little_memory_makes_small_batches(
        self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(MemoryMeter, "free_bytes", lambda meter: 2_000_000)
        monkeypatch.setattr(MemoryMeter, "stop", lambda meter: setattr(meter, "grown", 1_000_000))
        found, _ = measured(engine, lambda edges: 0.005 + 1e-6 * edges, monkeypatch)
        assert found.limit.edges < 1_000
        assert found.memory_bytes(Size(1, 10, found.limit.edges)) < 1_100_000

    def test_made_up_crystals_that_fail_leave_the_defaults(
        self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def failing(edges: int) -> float:
            raise RuntimeError("no such element")

        caplog.set_level(logging.INFO)
        found, _ = measured(engine, failing, monkeypatch)
        assert found.limit.edges == CPU_BUDGET.batch_edges
        assert "no such element" in caplog.text

    def test_where_nothing_is_measured_the_price_follows_what_batches_take(
        self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "measurable", False)
        found = measure(engine, CPU_BUDGET, calibrate=True, device="cpu")
        small, large = Size(1, 2, 2), Size(1, 64, 3_000)
        found.learn(small, 0.5, forces=True, stress=False)
        for _ in range(100):
            found.learn(large, 0.1, forces=True, stress=False)
        assert found.terms.price == pytest.approx(0.1 / 3_064, rel=0.05)
        # What is small is dear, but it is the large ones that take the time.
        for size, seconds in 50 * [(small, 0.001), (large, 0.1)]:
            found.learn(size, seconds, forces=True, stress=False)
        assert found.terms.price == pytest.approx(0.101 / 3_068, rel=0.05)

    @pytest.mark.parametrize("seconds_per_edge", [1e-8, 5e-5])
    def test_a_guessed_price_spoils_neither_shares_nor_forecasts(self, seconds_per_edge: float) -> None:
        def opened(name: str, terms: Terms, n_structures: int) -> None:
            ticket = batcher.open("m", now=now, expected_edges=0, identity=name, terms=terms)
            batcher.add(ticket, [(i, 64, 4_000) for i in range(n_structures)], now=now, expected_edges=0)
            owners[ticket] = name

        limit = BatchLimit(edges=8_192, atoms=16_384)
        guessed, known = (Capacity(limit, neighbors=60.0) for _ in range(2))
        known.settle(price=2e-6, bytes_per_edge=0.0)
        batcher, now = Batcher(replace(CPU_BUDGET, queue_edges=10**9), pace=1.0), 0.0
        owners, served = dict[int, str](), Counter[str]()
        for _ in range(40):
            opened("early", guessed.terms, 10)
        for number in range(40):
            batch = batcher.next_batch(now)
            assert batch is not None
            seconds = batch.cost * seconds_per_edge
            now += seconds
            batcher.finished(batch, seconds)
            guessed.learn(
                Size(len(batch.items), batch.n_atoms, batch.n_edges), seconds, forces=True, stress=False
            )
            served.update(owners[item.ticket] for item in batch.items)
            if number == 0:
                # What came before and what comes after the price is known cost the same.
                for _ in range(10):
                    opened("late", guessed.terms, 10)
            for capacity_, price in ((guessed, seconds_per_edge), (known, 2e-6)):
                wait = batcher.check(
                    now=now,
                    expected_edges=4_000,
                    deadline=None,
                    identity="new",
                    priority=Priority.NORMAL,
                    terms=capacity_.terms,
                )
                # As much as its own for each of the others.
                assert wait <= 1.02 * 2 * 4_000 * price
            assert batcher.depth.seconds <= 1.02 * 500 * 4_064 * seconds_per_edge
        assert abs(served["early"] - served["late"]) <= 4

    def test_what_was_measured_is_the_price_whatever_batches_take(
        self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found, _ = measured(engine, lambda edges: 1e-6 * edges, monkeypatch)
        before = found.terms.price
        found.learn(Size(1, 2, 2), 0.5, forces=True, stress=False)
        assert found.terms.price == before

    def test_a_real_engine_is_measured_in_no_time(self, engine: LocalEngine) -> None:
        found = measure(engine, CPU_BUDGET, calibrate=True, device="cpu")
        size = Size(10, 80, 1_000)
        assert 0 < found.seconds(size, forces=True, stress=False) < 10
        assert found.seconds(size, forces=False, stress=False) < found.seconds(
            size, forces=True, stress=False
        )


def test_memory_is_measured(tmp_path: object) -> None:
    meter = MemoryMeter("cpu")
    meter.start()
    block = np.ones(50 * 2**17)
    meter.stop()
    assert block.nbytes * 0.8 < meter.grown < block.nbytes * 1.5
    assert meter.free_bytes() > 2**20


def test_a_batch_that_runs_out_of_memory_is_halved_and_the_next_ones_are_smaller(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, most, batches = LocalEngine._compute, 500, list[int]()

    def limited(self: LocalEngine, graphs: Sequence[Graph], *, forces: bool, stress: bool) -> object:
        edges = sum(graph.n_edges for graph in graphs)
        batches.append(edges)
        if edges > most and len(graphs) > 1:
            raise torch.OutOfMemoryError("out of memory, as a GPU would say")
        return compute(self, graphs, forces=forces, stress=stress)

    monkeypatch.setattr(LocalEngine, "_compute", limited)

    async def test() -> None:
        large = replace(ROOMY, batch_edges=3_000)
        async with inside(config(bundles.tiny, large)) as there:
            batches.clear()
            systems = [molecule(seed, 20) for seed in range(40)]
            answer = read(await there.stub.Predict(ask(systems)), systems)
            assert not answer.failures
            assert max(batches) > most
            batches.clear()
            answer = read(await there.stub.Predict(ask(systems)), systems)
            assert not answer.failures
            # Half of what failed last: no batch fails a second time.
            assert max(batches) <= most

    run(test())
