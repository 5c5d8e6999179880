"""Requests that are wrong in ways nobody thought of: valid ones with bytes or arrays changed at random."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio
import numpy as np

from equipot.serve.bench.load import OPTIONS
from equipot.wire.v1 import potential_pb2 as pb

METHODS = ("Predict", "Predict", "Predict", "Explain", "GetModel", "ListModels")
CALLERS = 16
CALL_SECONDS = 60.0
"""A call that takes longer hangs: nothing that is sent here needs a second."""

MAY_SAY = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
)
"""What a server may answer to nonsense, besides answering it."""

STRANGE = np.array(
    [0.0, -0.0, 1e-300, 1e300, -1e300, 1e6, np.inf, -np.inf, np.nan, 5e-324, 1e9, 0.1], dtype="<f8"
)


@dataclass(slots=True)
class Verdict:
    """How a server took it.

    Attributes:
        statuses: how many calls ended with which status.
        wrong: the first calls whose status is none that nonsense may have: method and request.
        slowest: seconds of the slowest call.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str, bytes]] = field(default_factory=list)
    slowest: float = 0.0


def mutated(valid: Sequence[pb.PredictRequest], random: np.random.Generator) -> bytes:
    """One of these requests, changed somewhere: in its bytes, its arrays, or its fields."""
    request = pb.PredictRequest()
    request.CopyFrom(valid[int(random.integers(len(valid)))])
    kind = random.integers(3)
    if kind == 0:
        return _bytes_changed(request.SerializeToString(), random)
    if kind == 1:
        _numbers_changed(request.structures, random)
    else:
        _fields_changed(request, random)
    return request.SerializeToString()


async def send_mutated(
    address: str, valid: Sequence[pb.PredictRequest], *, count: int, seed: int = 0
) -> Verdict:
    """Sends so many of them, a few at a time."""
    verdict, random = Verdict(), np.random.default_rng(seed)
    left = iter(range(count))

    async def caller(channel: grpc.aio.Channel) -> None:
        for _ in left:
            method = METHODS[random.integers(len(METHODS))]
            raw = mutated(valid, random)
            call = channel.unary_unary(f"/equipot.wire.v1.PotentialService/{method}", None, None)
            sent = time.perf_counter()
            try:
                await call(raw, timeout=CALL_SECONDS)
                status = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                status = error.code()
            verdict.slowest = max(verdict.slowest, time.perf_counter() - sent)
            verdict.statuses[status.name] += 1
            if status is not grpc.StatusCode.OK and status not in MAY_SAY and len(verdict.wrong) < 10:
                verdict.wrong.append((method, status.name, raw))

    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        await asyncio.gather(*(caller(channel) for _ in range(CALLERS)))
    return verdict


def _bytes_changed(raw: bytes, random: np.random.Generator) -> bytes:
    data = bytearray(raw)
    for _ in range(random.integers(1, 8)):
        at = int(random.integers(len(data) + 1))
        match random.integers(5):
            case 0 if at < len(data):
                data[at] = random.integers(256)
            case 1:
                del data[at : at + int(random.integers(1, 32))]
            case 2:
                data[at:at] = random.bytes(int(random.integers(1, 32)))
            case 3:
                data[at:at] = data[at : at + 64]
            case _ if random.integers(4) == 0:
                del data[at:]
    return bytes(data)


def _numbers_changed(structures: pb.Structures, random: np.random.Generator) -> None:
    name, dtype = (("positions", "<f8"), ("cell", "<f8"), ("atomic_numbers", "<i4"))[random.integers(3)]
    array = np.frombuffer(getattr(structures, name), dtype).copy()
    if not len(array):
        return
    places = random.integers(len(array), size=random.integers(1, 6))
    if dtype == "<f8":
        array[places] = random.choice(STRANGE, len(places))
        if random.integers(4) == 0:
            array *= random.choice([1e-8, 1e-3, 0.1, 1e3, 1e8])
    else:
        array[places] = random.integers(-(2**31), 2**31, len(places))
    setattr(structures, name, array.tobytes())


def _fields_changed(request: pb.PredictRequest, random: np.random.Generator) -> None:
    structures = request.structures
    match random.integers(7):
        case 0:
            structures.n_atoms.append(int(random.integers(2**32)))
        case 1 if structures.n_atoms:
            structures.n_atoms[int(random.integers(len(structures.n_atoms)))] = int(random.integers(200))
        case 2:
            structures.pbc = random.bytes(int(random.integers(12)))
        case 3:
            structures.charge = random.bytes(int(random.integers(16)))
        case 4:
            request.model = random.bytes(int(random.integers(64))).decode("latin-1")
        case 5:
            request.level_of_theory = "x" * int(random.integers(10_000))
        case _:
            request.properties.append(int(random.integers(-5, 9)))  # type: ignore[arg-type]
            request.priority = int(random.integers(-5, 9))  # type: ignore[assignment]
