"""Many large messages at once: a bounded number of bytes is read, and who sends little is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from equipot.serve import intake
from equipot.serve.config import RequestLimits, ServeConfig
from equipot.serve.intake import LARGEST_AT_ONCE, Intake
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

from .conftest import Bundles, ask, inside, molecule, run, running

if TYPE_CHECKING:
    from equipot.wire.v1.potential_pb2_grpc import PotentialServiceAsyncStub

MIB = 2**20
CALLERS = 100


def large(n_bytes: int) -> pb.PredictRequest:
    """One that is refused for what it holds, once it is read."""
    return pb.PredictRequest(structures=pb.Structures(positions=bytes(n_bytes)))


def resident(pid: int, what: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def test_memory_is_bounded_and_small_calls_go_on(bundles: Bundles, tmp_path: Path) -> None:
    size = 8 * MIB

    async def attack(address: str) -> list[grpc.aio.AioRpcError]:
        refusals: list[grpc.aio.AioRpcError] = []
        channels = [
            grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(CALLERS)
        ]
        raw = large(size - 4096).SerializeToString()

        async def send(channel: grpc.aio.Channel) -> None:
            call = channel.unary_unary("/equipot.wire.v1.PotentialService/Predict", None, None)
            for _ in range(2):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(raw, timeout=60)
                refusals.append(caught.value)

        sending = [asyncio.create_task(send(channel)) for channel in channels]
        answered = 0
        async with grpc.aio.insecure_channel(address) as channel:
            stub = cast("PotentialServiceAsyncStub", PotentialServiceStub(channel))
            while not all(task.done() for task in sending):
                await stub.Predict(ask([molecule(answered)]), timeout=20)
                answered += 1
        await asyncio.gather(*sending, *(channel.close(None) for channel in channels))
        assert answered
        return refusals

    with running(bundles.tiny, "--max-message-mb", 8, stderr=tmp_path / "log") as server:
        with grpc.insecure_channel(server.address) as channel:
            PotentialServiceStub(channel).Predict(ask([molecule(1)]), timeout=20)
        before = resident(server.popen.pid, "VmRSS:")
        refusals = asyncio.run(asyncio.wait_for(attack(server.address), 120))
        # More than what may be held: gRPC has a message in pieces, then whole, then it is decoded.
        most = resident(server.popen.pid, "VmHWM:") - before
        assert most < 6 * LARGEST_AT_ONCE * size < CALLERS * size
        codes = {error.code() for error in refusals}
        assert codes <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
        for error in refusals:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                assert retry_delay(error) > 0


def retry_delay(error: grpc.aio.AioRpcError) -> float:
    status = rpc_status.from_call(cast("grpc.Call", error))
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            return cast("float", retry.retry_delay.ToMilliseconds() / 1000)
    return 0.0


async def silent_calls(
    channel: grpc.aio.Channel, method: str, count: int
) -> list[grpc.aio.StreamUnaryCall[bytes, bytes]]:
    """Calls of headers alone, once these have left."""
    ask = channel.stream_unary(method, None, None)
    calls = [ask(None) for _ in range(count)]
    for call in calls:
        await call.wait_for_connection()
    return calls


def test_strangers_who_send_nothing_take_no_room_of_others_and_have_a_second(bundles: Bundles) -> None:
    async def test() -> None:
        config = ServeConfig(bundles=(bundles.tiny,), port=0, limits=RequestLimits(message_bytes=MIB))
        async with inside(config) as served, grpc.aio.insecure_channel(served.address) as channel:
            silent = await silent_calls(channel, "/grpc.health.v1.Health/Check", LARGEST_AT_ONCE)
            await served.until(lambda: served.server.held_bytes > 0)
            assert served.server.held_bytes <= MIB
            # For what it holds, so it was read.
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.stub.Predict(large(MIB - 4096), timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            ended = {await call.code() for call in silent}
            assert ended <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}
            await served.until(lambda: served.server.held_bytes == 0)

    run(test())


def test_who_sends_headers_alone_holds_room_for_a_time(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "ARRIVES_SECONDS", 0.5)

    async def test() -> None:
        config = ServeConfig(bundles=(bundles.tiny,), port=0, limits=RequestLimits(message_bytes=MIB))
        async with inside(config) as served, grpc.aio.insecure_channel(served.address) as channel:
            silent = await silent_calls(channel, "/equipot.wire.v1.PotentialService/Predict", 3)
            await served.until(lambda: served.server.held_bytes == 3 * MIB)
            for call in silent:
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "did not come within 0.5 s" in (await call.details() or "")
            await served.until(lambda: served.server.held_bytes == 0)

    run(test())


def test_replies_that_nobody_reads_count_as_long_as_they_are_held() -> None:
    async def test() -> None:
        reading = Intake(MIB, open_to_all=(), on_refusal=lambda reason: None)

        async def answer(request: bytes, context: object) -> bytes:
            return bytes(16 * MIB)

        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        server = grpc.aio.server(interceptors=[reading], options=unlimited)
        behaviours = {"Ask": grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", behaviours),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()

        async def held(n_bytes: int) -> None:
            async with asyncio.timeout(20):
                while reading.held != n_bytes:
                    await asyncio.sleep(0.01)

        try:
            # Without probes of bandwidth, by which a client takes in whole replies that nobody reads.
            options = [*unlimited, ("grpc.http2.bdp_probe", 0)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
                # As streams: of these a client reads what it asks for.
                calls = [channel.unary_stream("/test/Ask", None, None)(bytes(1_000)) for _ in range(5)]
                await held(5_000)
                await asyncio.sleep(0.3)
                assert reading.held == 5_000
                assert await calls[0].read() == bytes(16 * MIB)
                await held(4_000)
            await held(0)
        finally:
            await server.stop(0)

    run(test())


def test_slow_senders_shut_out_no_small_call_and_large_ones_are_told_when_to_come_again(
    bundles: Bundles,
) -> None:
    async def test() -> None:
        config = ServeConfig(bundles=(bundles.tiny,), port=0, limits=RequestLimits(message_bytes=MIB))
        async with inside(config) as served:
            release = asyncio.Event()

            async with grpc.aio.insecure_channel(served.address) as channel:
                call = channel.stream_unary("/equipot.wire.v1.PotentialService/Predict", None, None)

                async def silence() -> object:
                    async def nothing() -> AsyncIterator[bytes]:
                        # Headers alone: such a call has room for the largest message until it ends.
                        await release.wait()
                        return
                        yield b""

                    return await call(nothing(), timeout=60)

                silent = [asyncio.create_task(silence()) for _ in range(LARGEST_AT_ONCE)]
                await served.until(lambda: served.server.held_bytes == LARGEST_AT_ONCE * MIB)
                for seed in range(3):
                    await served.stub.Predict(ask([molecule(seed)]), timeout=20)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await served.stub.Predict(large(MIB - 4096), timeout=20)
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert retry_delay(caught.value) > 0
                assert served.value("requests_total", outcome="queue_full") == 1
                # A silent ninth is given up at once, and those who end leave their room.
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await silence()
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                release.set()
                ended = await asyncio.gather(*silent, return_exceptions=True)
                assert all(isinstance(error, grpc.aio.AioRpcError) for error in ended)
                assert {cast("grpc.aio.AioRpcError", error).code() for error in ended} == {
                    grpc.StatusCode.INVALID_ARGUMENT
                }
                await served.until(lambda: served.server.held_bytes == 0)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await served.stub.Predict(large(MIB - 4096), timeout=20)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(test())
