"""How often requests answered by streams are tried again, and how long is waited."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from typing import Any

import grpc
import pytest
from ase import Atoms

from equipot.cli.main import main
from equipot.client import AsyncClient, Client, Health, RetryPolicy, ServerUnavailable
from equipot.client.errands import AsyncWay, Way, run, run_async
from equipot.wire.v1 import potential_pb2 as pb

THRICE = RetryPolicy(attempts=3, initial_delay=0.0, max_delay=0.0)
BEGUN = pb.RelaxReply(begun=pb.MotionBegun())
RESULT = pb.RelaxReply(result=pb.RelaxResult())
MOST = 50


class Endless:
    """A request that is never answered in full."""

    waits_for = 1
    begun = ""

    def __init__(self) -> None:
        self.asked = self.headway = 0

    def refused(self) -> Iterable[int]:
        return ()

    def request(self) -> int:
        self.asked += 1
        assert self.asked < MOST, "it is tried for ever"
        return self.asked

    def take(self, reply: pb.RelaxReply) -> Iterable[int]:
        self.headway += reply.HasField("result")
        return ()


def replies_to(number: int, headway_until: int) -> list[pb.RelaxReply]:
    return [BEGUN, RESULT] if number <= headway_until else [BEGUN]


@pytest.mark.parametrize(("headway_until", "tried"), [(0, 3), (5, 7)])
def test_only_headway_begins_the_count_of_attempts_anew(headway_until: int, tried: int) -> None:
    def ask(number: int) -> Generator[pb.RelaxReply, None, None]:
        yield from replies_to(number, headway_until)
        raise grpc.RpcError

    async def ask_async(number: int) -> AsyncGenerator[pb.RelaxReply, None]:
        for reply in replies_to(number, headway_until):
            yield reply
        raise grpc.RpcError

    async def understand(error: grpc.RpcError) -> ServerUnavailable:
        return ServerUnavailable("a rank died")

    async def all_async(errand: Endless) -> None:
        async for _ in run_async(errand, AsyncWay(ask_async, understand, THRICE)):
            pass

    errand = Endless()
    with pytest.raises(ServerUnavailable):
        list(run(errand, Way(ask, lambda error: ServerUnavailable("a rank died"), THRICE)))
    assert errand.asked == tried
    errand = Endless()
    with pytest.raises(ServerUnavailable):
        asyncio.run(all_async(errand))
    assert errand.asked == tried


def test_the_delay_is_bounded_at_any_number_of_attempts() -> None:
    delay = RetryPolicy(attempts=5000, max_delay=4.0).delay(ServerUnavailable("x"), 1025, 1e9)
    assert delay is not None
    assert 2.0 <= delay <= 4.0


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 1e12])
def test_longer_than_grpc_can_count_is_no_moment_that_is_past(
    server: Any, cluster: Callable[..., Atoms], timeout: float
) -> None:
    atoms = cluster(3)
    with Client(server.address, timeout=timeout) as client, client.session(atoms) as session:
        assert client.health() is Health.SERVING
        expected = client.predict(atoms).energy
        assert client.predict(atoms, timeout=timeout).energy == expected
        assert session.predict(atoms.positions).energy == expected

    async def run() -> Any:
        async with (
            AsyncClient(server.address, timeout=timeout) as client,
            client.session(atoms, timeout=timeout) as session,
        ):
            assert await client.health() is Health.SERVING
            return (await client.predict(atoms)).energy, (await session.predict(atoms.positions)).energy

    assert asyncio.run(run()) == (expected, expected)
    assert main(["probe", server.address, "--service", "", "--timeout", str(timeout)]) == 0


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.nan])
def test_a_timeout_that_is_none(server: Any, timeout: float) -> None:
    with pytest.raises(ValueError, match="give a positive number"):
        Client(server.address, timeout=timeout)
    with Client(server.address) as client, pytest.raises(ValueError, match="give a positive number"):
        client.health(timeout=timeout)
