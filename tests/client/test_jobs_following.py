"""A job is followed through lost connections, and not for ever by calls that tell nothing new."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from equipot.client import AsyncClient, Client, RetryPolicy, ServerUnavailable
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1 import potential_pb2 as pb

THRICE = RetryPolicy(attempts=3, initial_delay=0.01)
RESULTS = 4


class Shaky:
    """Jobs that say how far they are, give as many results as `gives` has for each call, and break off."""

    def __init__(self, gives: list[int]) -> None:
        self.gives = gives
        self.calls = 0

    def attach(self, request: jpb.AttachJobRequest, context: Any) -> Iterator[jpb.AttachJobReply]:
        yield jpb.AttachJobReply(job=jpb.Job(id=request.id))
        count = self.gives[self.calls] if self.calls < len(self.gives) else 0
        self.calls += 1
        for number in range(request.after + 1, request.after + 1 + count):
            relaxed = pb.RelaxResult(failure=pb.Failure(message="made up"))
            yield jpb.AttachJobReply(result=jpb.JobResult(number=number, relaxed=relaxed))
        if request.after + count < RESULTS:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server is away")


@pytest.fixture
def shaky(request: pytest.FixtureRequest) -> Iterator[tuple[Shaky, str]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Shaky(request.param)
    attach = grpc.unary_stream_rpc_method_handler(
        servicer.attach, jpb.AttachJobRequest.FromString, jpb.AttachJobReply.SerializeToString
    )
    handler = grpc.method_handlers_generic_handler("equipot.wire.v1.JobService", {"AttachJob": attach})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(0).wait()


def follow(address: str) -> int:
    with Client(address, retry=THRICE) as client:
        return sum(1 for _ in client.jobs.attach("job"))


def follow_in_asyncio(address: str) -> int:
    async def test() -> int:
        async with AsyncClient(address, retry=THRICE) as client:
            return len([one async for one in client.jobs.attach("job")])

    return asyncio.run(test())


@pytest.mark.parametrize("way", [follow, follow_in_asyncio])
class TestLostConnections:
    @pytest.mark.parametrize("shaky", [[0, 1, 0, 2, 0, 1]], indirect=True)
    def test_results_come_once_each_as_long_as_there_are_new_ones(
        self, shaky: tuple[Shaky, str], way: Any
    ) -> None:
        assert way(shaky[1]) == RESULTS
        assert shaky[0].calls == 6

    @pytest.mark.parametrize("shaky", [[1]], indirect=True)
    def test_calls_that_tell_nothing_new_end_it(self, shaky: tuple[Shaky, str], way: Any) -> None:
        with pytest.raises(ServerUnavailable, match=r"the server is away.*; 3 tries in a row got no further"):
            way(shaky[1])
        assert shaky[0].calls == 3
