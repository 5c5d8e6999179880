"""Load on a server: closed, as much as it answers, to find its capacity; open, whatever it answers.

Callers of an open load do not wait for each other: they come at random at the rate that is asked for, as the
users of a service do. Only so does overload show: callers who wait for answers slow down with the server.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import grpc
import grpc.aio
import numpy as np

from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

if TYPE_CHECKING:
    from equipot.wire.v1.potential_pb2_grpc import PotentialServiceAsyncStub

OK = "OK"
GRACE_SECONDS = 5.0
"""Beyond its deadline a call must have ended in some way by then; else it hangs."""

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(slots=True)
class Outcomes:
    """What became of the calls of one load.

    Attributes:
        statuses: how many ended with which status.
        seconds: that each answered call took.
        structures: that were answered, and had no failure.
        elapsed: from the first call to the end of arrivals, in seconds.
        hung: calls that ended in no way in time.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    structures: int = 0
    elapsed: float = 0.0
    hung: int = 0

    def quantile(self, part: float) -> float:
        """Of the seconds of answered calls; NaN if there are none."""
        return float(np.quantile(self.seconds, part)) if self.seconds else float("nan")


def stub_of(channel: grpc.aio.Channel) -> PotentialServiceAsyncStub:
    """The service's stub; at run time one class serves both kinds of channel."""
    return cast("PotentialServiceAsyncStub", PotentialServiceStub(channel))


async def closed_load(
    address: str, requests: Sequence[pb.PredictRequest], *, callers: int, seconds: float
) -> Outcomes:
    """So many callers, each asking again as soon as it is answered.

    Raises:
        grpc.RpcError: a call fails: a capacity is none if not all is answered.
    """
    outcomes = Outcomes()
    begun = time.perf_counter()

    async def caller(stub: PotentialServiceAsyncStub, number: int) -> None:
        while (now := time.perf_counter()) < begun + seconds:
            request = requests[number % len(requests)]
            number += callers
            reply = await stub.Predict(request, timeout=600)
            _note(outcomes, request, reply, time.perf_counter() - now)

    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = stub_of(channel)
        await asyncio.gather(*(caller(stub, number) for number in range(callers)))
    outcomes.elapsed = time.perf_counter() - begun
    return outcomes


async def open_load(
    address: str,
    requests: Sequence[pb.PredictRequest],
    *,
    rate: float,
    seconds: float,
    deadline: float,
    seed: int = 0,
) -> Outcomes:
    """Calls that come at random, so many a second on average, each with a deadline in seconds."""
    outcomes = Outcomes()
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate, int(rate * seconds)))
    under_way: set[asyncio.Task[None]] = set()

    async def call(stub: PotentialServiceAsyncStub, request: pb.PredictRequest) -> None:
        sent = time.perf_counter()
        try:
            reply = await asyncio.wait_for(stub.Predict(request, timeout=deadline), deadline + GRACE_SECONDS)
        except grpc.aio.AioRpcError as error:
            outcomes.statuses[error.code().name] += 1
        except TimeoutError:
            outcomes.hung += 1
        else:
            _note(outcomes, request, reply, time.perf_counter() - sent)

    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = stub_of(channel)
        begun = time.perf_counter()
        for number, arrival in enumerate(arrivals):
            if (pause := begun + arrival - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            elif number % 64 == 0:
                # Late: the answers must be read all the same.
                await asyncio.sleep(0)
            task = asyncio.create_task(call(stub, requests[number % len(requests)]))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        outcomes.elapsed = time.perf_counter() - begun
        if under_way:
            await asyncio.wait(under_way)
    return outcomes


def _note(outcomes: Outcomes, request: pb.PredictRequest, reply: pb.PredictResponse, seconds: float) -> None:
    outcomes.statuses[OK] += 1
    outcomes.seconds.append(seconds)
    outcomes.structures += len(request.structures.n_atoms) - len(reply.failures)
