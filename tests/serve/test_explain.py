"""What a request would cost: exact sizes and failures, and seconds that a warm server keeps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace

import grpc
import numpy as np
import pytest
from tests.serve.conftest import Bundles, Process, arrays, ask, crystal, inside, molecule, run
from tests.serve.test_sharing import ONE_BY_ONE, ROOMY, busy, config, slowly

from equipot.client import AsyncClient, Client
from equipot.model.batch import Graph
from equipot.serve import dispatcher
from equipot.serve.config import DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, Result
from equipot.serve.errors import Fault, NotReady
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import FailureReason
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub


def test_sizes_and_failures_are_those_of_predict_and_nothing_is_computed(
    stub: PotentialServiceStub, server: Process, bundles: Bundles
) -> None:
    systems = [molecule(1), crystal(2, 20), molecule(3), molecule(4, 201)]
    systems[2] = replace(systems[2], atomic_numbers=np.full(6, 79))
    batches = server.sample("equipot_batches_total", model="tiny")
    reply = stub.Explain(ask(systems))
    assert server.sample("equipot_batches_total", model="tiny") == batches
    predicted = stub.Predict(ask(systems))
    assert list(reply.failures) == list(predicted.failures)
    assert [failure.index for failure in reply.failures] == [2, 3]
    assert reply.model == predicted.model
    engine = LocalEngine.load(bundles.tiny, dtype=None, device="cpu", limits=DEFAULT_LIMITS)
    graphs = engine.prepare(systems[:2])
    assert list(reply.n_edges[:2]) == [graph.n_edges for graph in graphs if isinstance(graph, Graph)]
    assert [bool(count) for count in reply.n_edges] == [True, True, False, False]
    assert sum(reply.n_edges) == reply.total_edges
    assert reply.total_atoms == 26
    assert (reply.n_batches, reply.refusal) == (1, "")
    assert reply.priority == pb.PRIORITY_NORMAL
    assert "cpu" in reply.replica
    assert 0 < reply.compute_seconds < reply.total_seconds < 10


def test_an_empty_request_costs_nothing(stub: PotentialServiceStub) -> None:
    reply = stub.Explain(ask([]))
    assert (reply.total_atoms, reply.n_batches, reply.compute_seconds) == (0, 0, 0)


@pytest.mark.parametrize("priority", [-1, 7])
def test_a_priority_that_nobody_knows(stub: PotentialServiceStub, priority: int) -> None:
    for method in (stub.Explain, stub.Predict):
        request = ask([molecule(1)])
        request.priority = priority  # type: ignore[assignment]
        with pytest.raises(grpc.RpcError) as caught:
            method(request)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_nobody_is_more_urgent_than_the_operator_lets(stub: PotentialServiceStub) -> None:
    for asked, granted in [
        (pb.PRIORITY_LOW, pb.PRIORITY_LOW),
        (pb.PRIORITY_HIGH, pb.PRIORITY_NORMAL),
    ]:
        assert stub.Explain(ask([molecule(1)], priority=asked)).priority == granted


def test_both_clients_tell_the_same_and_put_parts_together(server: Process) -> None:
    systems = [molecule(seed, 3 + seed % 5) for seed in range(40)]
    systems[7] = replace(systems[7], atomic_numbers=np.full(systems[7].n_atoms, 79))
    structures = arrays(systems)

    async def asynchronously() -> object:
        async with AsyncClient(server.address, atoms_per_request=50) as client:
            return await client.explain(structures)

    with Client(server.address, atoms_per_request=50) as client:
        parts = client.explain(structures)
    with Client(server.address) as client:
        whole = client.explain(structures)
        failures = client.predict(structures).failures
    other = asyncio.run(asynchronously())
    assert parts.n_requests > 3
    for one in (parts, other):
        np.testing.assert_array_equal(one.n_edges, whole.n_edges)  # type: ignore[attr-defined]
        assert one.failures == whole.failures == failures  # type: ignore[attr-defined]
    assert whole.failures[0].reason is FailureReason.UNSUPPORTED
    assert whole.model is not None
    assert 0 < whole.total_seconds < whole.seconds


def test_the_queue_is_told_and_the_refusal(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "compute", slowly(LocalEngine.compute))

    async def test() -> None:
        async with inside(config(bundles.tiny, ONE_BY_ONE)) as there:
            request = ask([molecule(seed) for seed in range(50)])
            idle = await there.stub.Explain(request)
            assert idle.queue_seconds == 0
            assert idle.n_batches == 50
            large = await busy(there, 500)
            waiting = await there.stub.Explain(request)
            assert waiting.queue_seconds > 0
            assert waiting.total_seconds > idle.total_seconds
            hopeless = await there.stub.Explain(request, timeout=0.3)
            assert hopeless.refusal == "DEADLINE_UNREACHABLE"
            large.cancel()

    run(test())


@pytest.mark.parametrize("how", ["refused", "broken"])
def test_what_fails_tells_nothing_of_the_wait(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    # Else the first batch, an only caller's, would be computed in the loop.
    monkeypatch.setattr(dispatcher, "AT_ONCE_SECONDS", 0.0)
    gate = threading.Event()

    def failing(self: LocalEngine, graphs: Sequence[Graph], **wanted: bool) -> list[Result | Fault]:
        gate.wait(20.0)
        if how == "refused":
            raise NotReady("the ranks are away", retry_after=1.0)
        return [Fault("internal", "", "it broke", "") for _ in graphs]

    async def test() -> None:
        async with inside(config(bundles.tiny, ONE_BY_ONE)) as there:
            await there.stub.Predict(ask([molecule(1)]))
            monkeypatch.setattr(LocalEngine, "compute", failing)
            told = []
            for pause in (0.0, 1.0, 0.0):
                calls = [asyncio.ensure_future(there.stub.Predict(ask([molecule(1)]))) for _ in range(20)]
                await there.until(lambda: there.value("queue_requests") == 19)
                last = await there.stub.Explain(ask([molecule(1)], priority=pb.PRIORITY_LOW))
                told.append(last.queue_seconds)
                # As a batch that hangs; those that wait behind it fail at once.
                await asyncio.sleep(pause)
                gate.set()
                await asyncio.gather(*calls, return_exceptions=True)
                gate.clear()
            assert told[1:] == pytest.approx([told[0]] * 2, rel=0.1)

    run(test())


def test_a_full_queue_is_told(bundles: Bundles) -> None:
    async def test() -> None:
        few = replace(ONE_BY_ONE, queue_edges=1)
        async with inside(config(bundles.tiny, few)) as there:
            large = await busy(there, 2_000)
            reply = await there.stub.Explain(ask([molecule(1)]))
            assert reply.refusal == "QUEUE_FULL"
            large.cancel()

    run(test())


def test_compute_time_is_foretold_from_what_was_computed(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalEngine, "compute", slowly(LocalEngine.compute))

    async def test() -> None:
        async with inside(config(bundles.tiny, ROOMY)) as there:
            request = ask([molecule(1)])
            for _ in range(5):
                await there.stub.Predict(request)
            reply = await there.stub.Explain(request)
            # The engine sleeps for 10 ms a batch, which no model of its size would take.
            assert reply.compute_seconds > 0.009
            assert reply.total_seconds > reply.compute_seconds

    run(test())
