"""Hours of mixed load: sizes, deadlines and callers of all kinds. What must stay flat is the memory."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc.aio
import numpy as np

from equipot.serve.bench.load import OK, OPTIONS, stub_of
from equipot.serve.bench.mutate import mutated
from equipot.serve.bench.requests import crystal, request
from equipot.serve.bench.subject import Subject
from equipot.wire.v1 import potential_pb2 as pb

CALLERS = 6
SAMPLE_SECONDS = 1.0
WARM_UP = 0.25
"""Part of the time after which memory must have settled: pools fill, and the largest batch has come."""


@dataclass(slots=True)
class Soak:
    """What was seen.

    Attributes:
        statuses: how many calls ended with which status.
        memory: (seconds, bytes) of the server, again and again.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Bytes by which the last quarter's median is above that of the first after the warm-up."""
        settled = [size for _, size in self.memory[int(WARM_UP * len(self.memory)) :]]
        quarter = max(1, len(settled) // 4)
        return float(np.median(settled[-quarter:]) - np.median(settled[:quarter])) if settled else 0.0

    @property
    def level(self) -> float:
        """Bytes: the median after the warm-up."""
        settled = [size for _, size in self.memory[int(WARM_UP * len(self.memory)) :]]
        return float(np.median(settled)) if settled else 0.0


async def soak(
    subject: Subject, elements: Sequence[int], *, seconds: float, level_of_theory: str = "", seed: int = 0
) -> Soak:
    """Loads the server for so long; callers leave in the middle, ask nonsense, and have no time."""
    seen, begun = Soak(), time.perf_counter()
    random = np.random.default_rng(seed)
    sizes = (2, 8, 8, 20, 20, 64, 64, 200, 600)
    systems = [crystal(random, n_atoms, elements) for n_atoms in sizes for _ in range(4)]

    def left() -> float:
        return begun + seconds - time.perf_counter()

    async def caller(channel: grpc.aio.Channel) -> None:
        stub, raw = stub_of(channel), channel.unary_unary(PREDICT, None, None)
        while left() > 0:
            chosen = [systems[k] for k in random.integers(len(systems), size=random.integers(1, 9))]
            asked = request(chosen, priority=int(random.integers(4)), level_of_theory=level_of_theory)
            timeout = float(random.choice([0.005, 0.1, 5.0, 60.0, 60.0, 60.0]))
            try:
                match random.integers(10):
                    case 0:
                        await raw(mutated([asked], random), timeout=60.0)
                    case 1:
                        call = asyncio.ensure_future(stub.Predict(asked, timeout=60.0))
                        await asyncio.sleep(float(random.exponential(0.02)))
                        call.cancel()
                        await asyncio.gather(call, return_exceptions=True)
                    case 2:
                        await stub.Explain(asked, timeout=60.0)
                    case _:
                        await stub.Predict(asked, timeout=timeout)
                seen.statuses[OK] += 1
            except grpc.aio.AioRpcError as error:
                seen.statuses[error.code().name] += 1

    async def caller_who_comes_back() -> None:
        while left() > 0:
            # A connection of its own each time: those that go must leave nothing.
            async with grpc.aio.insecure_channel(subject.address, options=OPTIONS) as channel:
                await stub_of(channel).ListModels(pb.ListModelsRequest(), timeout=60.0)
            await asyncio.sleep(0.2)

    async def watch() -> None:
        while left() > 0:
            seen.memory.append((time.perf_counter() - begun, subject.resident_bytes()))
            await asyncio.sleep(SAMPLE_SECONDS)

    async with grpc.aio.insecure_channel(subject.address, options=OPTIONS) as channel:
        await asyncio.gather(watch(), caller_who_comes_back(), *(caller(channel) for _ in range(CALLERS)))
    return seen


PREDICT = "/equipot.wire.v1.PotentialService/Predict"
