"""Many callers and one engine: shared batches, fair turns, deadlines, cancellation, a full queue."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status
from tests.serve.conftest import Bundles, Inside, ask, inside, molecule, read, run

from equipot.model.batch import Graph
from equipot.serve import dispatcher
from equipot.serve.batcher import Budget
from equipot.serve.config import ServeConfig
from equipot.serve.engine import LocalEngine, Result
from equipot.serve.errors import Fault
from equipot.serve.servicer import PotentialServicer
from equipot.serve.status import Context
from equipot.serve.trust import STREAMS
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

Compute = Callable[..., list[Result | Fault]]

ROOMY = Budget(batch_edges=100_000, batch_atoms=100_000, queue_edges=10**9)
ONE_BY_ONE = Budget(batch_edges=1, batch_atoms=1, queue_edges=10**9)
"""Each structure is a batch of its own: the engine is busy for long with little work."""


def config(bundle: Path, budget: Budget) -> ServeConfig:
    return ServeConfig(
        bundles=(bundle,), port=0, metrics_port=None, dtype="float64", threads=1, budget=budget
    )


async def busy(there: Inside, n_structures: int) -> asyncio.Task[Any]:
    """A request that keeps the engine busy, once it does."""
    request = ask([molecule(seed) for seed in range(n_structures)])
    before = there.value("batches_total", model="tiny")
    task = asyncio.ensure_future(there.stub.Predict(request))
    await there.until(lambda: there.value("batches_total", model="tiny") > before)
    return task


def slowly(compute: Compute) -> Compute:
    """As an engine with a large model: a tiny one is done before the next call is read."""

    def delayed(self: LocalEngine, graphs: Sequence[Graph], **wanted: bool) -> list[Result | Fault]:
        time.sleep(0.03)
        return compute(self, graphs, **wanted)

    return delayed


def code_of(error: BaseException | None) -> grpc.StatusCode:
    assert isinstance(error, grpc.aio.AioRpcError)
    return error.code()


def test_a_busy_loop_gives_way_to_the_engine_at_once(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's thread asks for the interpreter after each operation: by Python's own 5 ms it starves."""
    compute, seen = LocalEngine.compute, []

    def watched(*args: Any, **words: Any) -> list[Result | Fault]:
        seen.append(sys.getswitchinterval())
        return compute(*args, **words)

    monkeypatch.setattr(LocalEngine, "compute", watched)

    async def test() -> None:
        async with inside(config(bundles.tiny, ROOMY)) as at:
            await at.stub.Predict(ask([molecule(1)]))

    run(test())
    assert max(seen) <= 0.0005


def test_callers_share_batches_and_each_gets_its_own_answer(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Callers and server take turns in one loop here, and nobody's next call is as quick as it would be.
    monkeypatch.setattr(dispatcher, "ROUND_TRIP", 60.0)
    monkeypatch.setattr(LocalEngine, "compute", slowly(LocalEngine.compute))

    async def test() -> None:
        async with inside(config(bundles.tiny, ROOMY)) as there:
            systems = [molecule(seed, 3 + seed % 9) for seed in range(64)]
            alone = [read(await there.stub.Predict(ask([s])), [s]) for s in systems]
            batches = there.value("batches_total", model="tiny")
            responses = await asyncio.gather(*(there.stub.Predict(ask([s])) for s in systems))
            assert there.value("batches_total", model="tiny") - batches < 32
            assert there.value("batch_structures_bucket", model="tiny", le="2.0") < there.value(
                "batch_structures_count", model="tiny"
            )
            for system, response, expected in zip(systems, responses, alone, strict=True):
                answer = read(response, [system])
                np.testing.assert_allclose(answer.energy, expected.energy, rtol=0, atol=1e-10)
                assert answer.forces is not None
                assert expected.forces is not None
                np.testing.assert_allclose(answer.forces, expected.forces, rtol=0, atol=1e-10)

    run(test())


def test_one_structure_overtakes_the_rest_of_a_large_request(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalEngine, "compute", slowly(LocalEngine.compute))

    async def test() -> None:
        async with inside(config(bundles.tiny, ONE_BY_ONE)) as there:
            large = await busy(there, 300)
            for _ in range(5):
                before = there.value("batches_total", model="tiny")
                await there.stub.Predict(ask([molecule(1)]))
                # Its own, and those that were begun while it travelled; not the 300 that wait.
                assert there.value("batches_total", model="tiny") - before <= 20
            assert not large.done()
            response = await large
            assert len(read(response, [molecule(seed) for seed in range(300)]).failures) == 0

    run(test())


def test_a_large_request_is_cut_into_batches_and_prepared_as_it_goes(bundles: Bundles) -> None:
    async def test() -> None:
        budget = Budget(batch_edges=2_000, batch_atoms=10_000, queue_edges=10**9)
        async with inside(config(bundles.tiny, budget)) as there:
            systems = [molecule(seed, 20) for seed in range(600)]
            call = asyncio.ensure_future(there.stub.Predict(ask(systems)))
            most = 0.0
            while not call.done():
                most = max(most, there.value("queue_edges"))
                await asyncio.sleep(0.001)
            answer = read(await call, systems)
            total = there.value("edges_total", model="tiny")
            assert there.value("batches_total", model="tiny") >= total / 2_000
            assert 0 < most < 0.5 * total, "the whole request was prepared before it was needed"
            assert not np.isnan(answer.energy).any()
            for index in (0, 299, 599):
                alone = read(await there.stub.Predict(ask([systems[index]])), [systems[index]])
                np.testing.assert_allclose(answer.energy[index], alone.energy[0], rtol=0, atol=1e-10)

    run(test())


def test_a_cancelled_call_leaves_the_queue(bundles: Bundles) -> None:
    async def test() -> None:
        async with inside(config(bundles.tiny, ONE_BY_ONE)) as there:
            large = await busy(there, 2_000)
            large.cancel()
            await there.until(lambda: there.value("in_flight_requests") == 0)
            assert there.value("queue_edges") == 0
            computed = there.value("batches_total", model="tiny")
            await there.stub.Predict(ask([molecule(1)]))
            assert there.value("batches_total", model="tiny") <= computed + 20
            assert there.value("requests_total", model="tiny", outcome="cancelled") == 1

    run(test())


def test_a_deadline_that_passes_while_waiting(bundles: Bundles) -> None:
    async def test() -> None:
        async with inside(config(bundles.tiny, ONE_BY_ONE)) as there:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await there.stub.Predict(ask([molecule(seed) for seed in range(2_000)]), timeout=0.5)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await there.until(lambda: there.value("in_flight_requests") == 0)
            assert there.value("queue_edges") == 0
            assert there.value("requests_total", model="tiny", outcome="deadline_passed") == 1
            await there.stub.Predict(ask([molecule(1)]), timeout=20)

    run(test())


def test_a_deadline_that_cannot_be_met_is_refused_at_the_door(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalEngine, "compute", slowly(LocalEngine.compute))

    async def test() -> None:
        async with inside(config(bundles.tiny, ONE_BY_ONE)) as there:
            request = ask([molecule(seed) for seed in range(2_000)])
            large = await busy(there, 2_000)
            await there.until(lambda: there.value("batches_total", model="tiny") > 5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await there.stub.Predict(request, timeout=1.0)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert retry_seconds(caught.value) > 0
            large.cancel()

    run(test())


def retry_seconds(error: grpc.aio.AioRpcError) -> float:
    status = rpc_status.from_call(cast("grpc.Call", error))
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    (packed,) = [detail for detail in status.details if detail.Is(retry.DESCRIPTOR)]
    packed.Unpack(retry)
    return float(retry.retry_delay.ToTimedelta().total_seconds())


def test_a_full_queue_refuses_and_serves_on(bundles: Bundles) -> None:
    async def test() -> None:
        budget = Budget(batch_edges=1, batch_atoms=1, queue_edges=1_000)
        async with inside(config(bundles.tiny, budget)) as there:
            await there.stub.Predict(ask([molecule(1)]))
            calls = [
                asyncio.ensure_future(there.stub.Predict(ask([molecule(s) for s in range(10)])))
                for _ in range(20)
            ]
            results = await asyncio.gather(*calls, return_exceptions=True)
            refused = [result for result in results if isinstance(result, BaseException)]
            answered = [result for result in results if isinstance(result, pb.PredictResponse)]
            assert refused
            assert answered
            for error in refused:
                assert code_of(error) is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert isinstance(error, grpc.aio.AioRpcError)
                assert retry_seconds(error) > 0
            assert not any(response.failures for response in answered)
            await there.stub.Predict(ask([molecule(1)]))

    run(test())


def test_different_wishes_at_once_are_answered_each_by_its_own_kind(bundles: Bundles) -> None:
    async def test() -> None:
        both = ServeConfig(
            bundles=(bundles.tiny, bundles.direct), port=0, metrics_port=None, dtype="float64", budget=ROOMY
        )
        async with inside(both) as there:
            wishes: list[dict[str, Any]] = [
                {"model": "tiny"},
                {"model": "direct", "level_of_theory": "PBE"},
                {"model": "direct", "level_of_theory": "B3LYP"},
            ]
            kinds = [(pb.PROPERTY_ENERGY,), (pb.PROPERTY_ENERGY, pb.PROPERTY_FORCES)]
            asked = [(wish, kind) for wish in wishes for kind in kinds] * 6
            systems = [molecule(seed) for seed in range(len(asked))]
            responses = await asyncio.gather(
                *(
                    there.stub.Predict(ask([system], *kind, **wish))
                    for system, (wish, kind) in zip(systems, asked, strict=True)
                )
            )
            for system, (wish, kind), response in zip(systems, asked, responses, strict=True):
                assert response.model.name == wish["model"]
                assert bool(response.forces) == (pb.PROPERTY_FORCES in kind)
                alone = await there.stub.Predict(ask([system], *kind, **wish))
                np.testing.assert_allclose(
                    read(response, [system]).energy, read(alone, [system]).energy, rtol=0, atol=1e-10
                )

    run(test())


def test_an_only_caller_is_answered_in_the_loop_and_callers_that_meet_share_batches(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[bool] = []
    compute = LocalEngine.compute

    def noted(self: LocalEngine, graphs: Sequence[Graph], **wanted: bool) -> list[Result | Fault]:
        where.append(threading.current_thread() is threading.main_thread())
        return compute(self, graphs, **wanted)

    async def test() -> None:
        async with inside(config(bundles.tiny, ROOMY)) as there:
            monkeypatch.setattr(LocalEngine, "compute", noted)
            # However slow the machine is that tests run on.
            monkeypatch.setattr(dispatcher, "AT_ONCE_SECONDS", 60.0)
            monkeypatch.setattr(dispatcher, "ROUND_TRIP", 0.0)
            for _ in range(3):
                await there.stub.Predict(ask([molecule(1)]))
            assert where == [True, True, True]
            where.clear()
            with monkeypatch.context() as patch:
                patch.setattr(dispatcher, "ROUND_TRIP", 60.0)
                patch.setattr(LocalEngine, "compute", slowly(noted))
                await asyncio.gather(*(there.stub.Predict(ask([molecule(seed)])) for seed in range(64)))
            assert len(where) < 32
            assert not any(where)
            await asyncio.sleep(1.1 * dispatcher.ALONE_SECONDS)
            where.clear()
            await there.stub.Predict(ask([molecule(1)]))
            assert where == [True]

    run(test())


def test_calls_that_nobody_looked_at_in_time_are_not_read(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = 50
    seen: list[pb.PredictRequest] = []
    predict = PotentialServicer.Predict

    async def noted(self: PotentialServicer, request: pb.PredictRequest, context: Context) -> Any:
        seen.append(request)
        return await predict(self, request, context)

    monkeypatch.setattr(PotentialServicer, "Predict", noted)

    async def test() -> None:
        async with inside(config(bundles.tiny, ROOMY)) as there:
            with grpc.insecure_channel(there.address) as channel:
                # Threads of gRPC's own send them while this loop, which is the server's, does not turn.
                grpc.channel_ready_future(channel).result(10)
                stub = PotentialServiceStub(channel)
                calls = [stub.Predict.future(ask([molecule(1)]), timeout=0.2) for _ in range(late)]
                time.sleep(0.5)
                assert {call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
            await there.until(
                lambda: there.value("requests_total", model="", outcome="deadline_passed") == late
            )
            assert seen == []
            await there.stub.Predict(ask([molecule(1)]), timeout=20)
            assert len(seen) == 1

    run(test())


def test_more_callers_than_a_connection_has_calls_wait_and_are_all_answered(bundles: Bundles) -> None:
    async def test() -> None:
        async with inside(config(bundles.tiny, ROOMY)) as there:

            async def caller() -> None:
                for _ in range(3):
                    await there.stub.ListModels(pb.ListModelsRequest(), timeout=50)

            await asyncio.gather(*(caller() for _ in range(STREAMS + 100)))

    run(test())
