"""What gRPC took of its core is given back however a call ends: its operations are not cut short."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable

import grpc
import pytest

from equipot.serve.errors import NotServed
from equipot.serve.operation import to_its_end
from equipot.serve.status import Context, refuse


class Operation:
    """One that ends when it is let, and says whether it came to its end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.ended = False

    async def __call__(self) -> str:
        await self.may_end.wait()
        self.ended = True
        return "done"


def test_an_operation_outlives_the_call_that_waits_for_it() -> None:
    async def check() -> None:
        operation = Operation()
        waiting = asyncio.ensure_future(to_its_end(operation()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        operation.may_end.set()
        await asyncio.sleep(0.01)
        assert operation.ended

    asyncio.run(check())


def test_what_an_operation_returns_and_raises_is_told() -> None:
    async def fails() -> None:
        raise KeyError("core")

    async def check() -> None:
        operation = Operation()
        operation.may_end.set()
        assert await to_its_end(operation()) == "done"
        with pytest.raises(KeyError, match="core"):
            await to_its_end(fails())

    asyncio.run(check())


@pytest.mark.parametrize("ticks", [1, 2, 3])
def test_what_fails_when_its_caller_has_left_is_not_in_the_log(ticks: int) -> None:
    """A client that leaves while it is refused: the status cannot be sent, and that is no fault."""
    complaints: list[dict[str, object]] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("the call has gone")

    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told))
        waiting = asyncio.ensure_future(to_its_end(fails()))
        for _ in range(ticks):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0.01)
        gc.collect()

    asyncio.run(check())
    assert not complaints


async def ended_by_grpc(handler: Callable[[Context], Awaitable[None]]) -> list[grpc.StatusCode]:
    """Codes that reach a caller whose deadline passes while a real server answers."""

    async def answer(request: bytes, context: Context) -> bytes:
        await handler(context)
        return b""

    seen = []
    server = grpc.aio.server()
    behaviours = {"Ask": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", behaviours),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                await channel.unary_unary("/test/Ask", bytes, bytes)(b"", timeout=0.3)
            except grpc.aio.AioRpcError as error:
                seen.append(error.code())
    finally:
        await server.stop(1)
    return seen


@pytest.mark.parametrize("early", [True, False])
def test_a_call_is_refused_before_its_deadline_and_left_to_grpc_at_it(early: bool) -> None:
    cancelled = []

    async def handler(context: Context) -> None:
        remaining = context.time_remaining()
        assert remaining is not None
        if not early:
            # Not in this loop: gRPC would cancel the handler before it refuses.
            time.sleep(remaining + 0.001)
        try:
            await refuse(context, NotServed("no such model"))
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    codes = asyncio.run(ended_by_grpc(handler))
    assert codes == [grpc.StatusCode.NOT_FOUND if early else grpc.StatusCode.DEADLINE_EXCEEDED]
    assert cancelled == ([] if early else [True])
