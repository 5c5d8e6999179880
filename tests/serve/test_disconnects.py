"""Clients of all kinds that are cut off or stop reading: the others notice nothing, and nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.serve.conftest import Bundles, Process, arrays, molecule, running
from tests.serve.test_hostile import resident
from tests.serve.test_intruders import descriptors
from tests.serve.test_relax import as_atoms
from tests.serve.test_sessions import opening, stepping
from tests.serve.test_simulate import asked as simulating
from tests.serve.unreliable import Link, links

from equipot.client import AsyncClient, MotionFrame, RetryPolicy, ServerUnavailable
from equipot.model.batch import Graph, System
from equipot.serve.config import RequestLimits
from equipot.serve.engine import LocalEngine, Result
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import FloatArray, encode_structures
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

CALL_SECONDS, WORK_SECONDS = 30.0, 120.0
"""More than a call and what is made of many take here: who needs longer was held up."""

AT_REST = (
    *("calls", "sessions", "moving_structures", "in_flight_requests", "request_bytes"),
    *("queue_requests", "queue_atoms", "queue_edges"),
)
"""Gauges of the server that are zero when nobody asks anything."""

SYSTEMS = [molecule(seed, 4 + seed % 5) for seed in range(6)]
COURSE: dict[str, Any] = {"steps": 40, "timestep": 0.2, "temperature": 50.0, "seed": 1}
FRAMES: dict[str, Any] = {"frame_every": 5, "token_every": 10, "forces": True}


class Truth:
    """What is right, by the engine itself."""

    def __init__(self, bundle: Path) -> None:
        limits = RequestLimits(structure_atoms=100, structure_edges=10_000)
        self._engine = LocalEngine.load(bundle, dtype="float64", device="cpu", limits=limits)
        self.course: list[MotionFrame] = []

    def check(self, system: System, positions: FloatArray, energy: float, forces: FloatArray | None) -> None:
        there = System(system.atomic_numbers, positions, system.cell, system.pbc)
        (graph,) = self._engine.prepare([there])
        assert isinstance(graph, Graph)
        (right,) = self._engine.compute([graph], forces=True, stress=False)
        assert isinstance(right, Result)
        assert energy == pytest.approx(right.energy, abs=1e-9)
        assert forces is not None
        assert right.forces is not None
        np.testing.assert_allclose(forces, right.forces, atol=1e-9)


Work = Callable[[AsyncClient, Truth], Awaitable[None]]


async def predict(client: AsyncClient, truth: Truth) -> None:
    answers = await client.predict([as_atoms(system) for system in SYSTEMS])
    for index, system in enumerate(SYSTEMS):
        one = answers[index]
        truth.check(system, system.positions, one.energy, one.forces)


async def step(client: AsyncClient, truth: Truth) -> None:
    system = SYSTEMS[0]
    async with client.session(as_atoms(system)) as session:
        for number in range(12):
            positions = system.positions + 0.01 * number
            positions[0] += 0.02 * number
            (one,) = await session.predict(positions)
            truth.check(system, positions, one.energy, one.forces)


async def relax(client: AsyncClient, truth: Truth) -> None:
    ended = await client.relax([as_atoms(system) for system in SYSTEMS], fmax=1e-6, steps=25)
    assert len(ended) == len(SYSTEMS)
    for system, one in zip(SYSTEMS, ended, strict=True):
        assert one.failure is None
        truth.check(system, one.positions, one.energy, one.forces)


async def simulate(client: AsyncClient, truth: Truth) -> None:
    frames = await course_of(client)
    assert [frame.step for frame in frames] == list(range(0, COURSE["steps"] + 1, FRAMES["frame_every"]))
    for frame, right in zip(frames, truth.course, strict=True):
        np.testing.assert_allclose(frame.positions, right.positions, atol=1e-8)
        truth.check(SYSTEMS[1], frame.positions, frame.energy, frame.forces)


async def course_of(client: AsyncClient) -> list[MotionFrame]:
    (trajectory,) = await client.simulate(as_atoms(SYSTEMS[1]), **COURSE, **FRAMES)
    assert trajectory.failure is None
    return trajectory.frames


KINDS: tuple[Work, ...] = (predict, step, relax, simulate)


async def steady(address: str, work: Work, truth: Truth, over: asyncio.Event) -> int:
    """One whose connection holds: no call of it fails or takes long, whatever happens to others."""
    rounds = 0
    async with AsyncClient(address, timeout=CALL_SECONDS, retry=RetryPolicy(attempts=1)) as client:
        while not over.is_set():
            async with asyncio.timeout(WORK_SECONDS):
                await work(client, truth)
            rounds += 1
            await asyncio.sleep(0.1)
    return rounds


async def returning(link: Link, work: Work, truth: Truth, cuts: int) -> None:
    """One who is cut off again and again, comes back each time, and has the right answers in the end."""
    retry = RetryPolicy(attempts=50, max_delay=0.2)
    async with AsyncClient(link.address, timeout=CALL_SECONDS, retry=retry) as client:
        cutting = asyncio.create_task(cut_now_and_then(link, cuts))
        while not cutting.done():
            await work(client, truth)
        await cutting
        await work(client, truth)


async def cut_now_and_then(link: Link, cuts: int) -> None:
    while link.cuts < cuts:
        await asyncio.sleep(random.uniform(0.02, 0.3))
        link.cut()


async def leaving(link: Link, work: Work, truth: Truth) -> None:
    """One who is cut off for ever in the middle of something."""
    async with AsyncClient(link.address, timeout=CALL_SECONDS, retry=RetryPolicy(attempts=2)) as client:
        working = asyncio.create_task(work_on(client, work, truth))
        await asyncio.sleep(random.uniform(0.05, 0.6))
        link.cut(for_ever=True)
        with pytest.raises(ServerUnavailable):
            await working


async def work_on(client: AsyncClient, work: Work, truth: Truth) -> None:
    while True:
        await work(client, truth)


Idle = Callable[[Any], Awaitable[Any]]


async def unread_frames(stub: Any) -> Any:
    large = [molecule(seed, 60) for seed in range(4)]
    call: Any = stub.Simulate(simulating(large, steps=10**6, timestep=0.01, frame_every=1, token_every=1))
    assert (await call.read()).HasField("begun")
    return call


async def unread_progress(stub: Any) -> Any:
    structures = encode_structures(arrays([molecule(seed, 60) for seed in range(4)]))
    words: dict[str, Any] = {"fmax": 1e-12, "max_steps": 10**5, "progress_every": 1, "progress_frames": True}
    call: Any = stub.Relax(pb.RelaxRequest(structures=structures, **words))
    assert (await call.read()).HasField("begun")
    return call


async def unread_steps(stub: Any) -> Any:
    call: Any = stub.Session(None)
    await call.write(opening([molecule(1, 60)]))
    asyncio.get_running_loop().create_task(write_on(call))
    return call


async def write_on(call: Any) -> None:
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError):
        for number in itertools.count(1):
            await call.write(stepping([molecule(1, 60)], number))


async def silent_session(stub: Any) -> Any:
    call: Any = stub.Session(None)
    await call.write(opening([molecule(1, 60)]))
    return call


IDLERS: tuple[Idle, ...] = (unread_frames, unread_progress, unread_steps, silent_session)


@contextlib.asynccontextmanager
async def idle(address: str, begin: Idle) -> AsyncIterator[None]:
    """One who asks for much, reads none of it, and stays."""
    # Else megabytes are taken in before anything stands still.
    small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**16)]
    async with grpc.aio.insecure_channel(address, options=small) as channel:
        call = await begin(PotentialServiceStub(channel))
        yield
        call.cancel()


async def everybody(server: Process, truth: Truth, *, clients: int, cuts: int) -> None:
    """So many at once, of each kind and each fate; nothing of them is left on the server."""
    address, over = server.address, asyncio.Event()
    a_fate = clients // 4
    works = [KINDS[number % len(KINDS)] for number in range(a_fate)]
    async with links(address, 3 * a_fate) as cables, contextlib.AsyncExitStack() as stack:
        ways, last, slack = cables[:a_fate], cables[a_fate : 2 * a_fate], cables[2 * a_fate :]
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        holding = [tasks.create_task(steady(address, work, truth, over)) for work in works]
        for number, link in enumerate(slack):
            await stack.enter_async_context(idle(link.address, IDLERS[number % len(IDLERS)]))
            if number % 2:
                link.stall()
        async with asyncio.TaskGroup() as breaking:
            for work, cable, way in zip(works, last, ways, strict=True):
                breaking.create_task(leaving(cable, work, truth))
                breaking.create_task(returning(way, work, truth, cuts))
        over.set()
        assert all(rounds > 1 for rounds in await asyncio.gather(*holding))
        assert sum(link.cuts for link in ways) >= cuts * a_fate
        # The idle are still connected.
        await at_rest(server)


def gauges(server: Process) -> dict[str, float]:
    """Their values."""
    found = (line.split() for line in server.scrape().splitlines())
    values = {words[0]: words[1] for words in found if len(words) == 2}
    return {name: float(values[f"equipot_{name}"]) for name in AT_REST}


async def at_rest(server: Process) -> None:
    """Returns once the server holds nothing of anybody."""
    until = time.monotonic() + WORK_SECONDS
    held = {"": 1.0}
    while held and time.monotonic() < until:
        await asyncio.sleep(0.1)
        values = await asyncio.to_thread(gauges, server)
        held = {name: value for name, value in values.items() if value}
    assert not held


async def mixed(server: Process, bundle: Path, *, clients: int, cuts: int, rounds: int) -> list[int]:
    """Bytes of memory after each round."""
    truth, memory = Truth(bundle), []
    async with AsyncClient(server.address) as client:
        truth.course = await course_of(client)
    before = descriptors(server)
    for _ in range(rounds):
        await everybody(server, truth, clients=clients, cuts=cuts)
        # Two are those of a scrape, which ends when it likes.
        while descriptors(server) > before + 2:
            await asyncio.sleep(0.1)
        memory.append(resident(server))
    assert server.popen.poll() is None
    assert not server.tracebacks()
    return memory


@pytest.mark.parametrize(
    ("clients", "cuts", "rounds", "idle_seconds"),
    [(16, 2, 1, 5), pytest.param(52, 5, 4, 10, marks=pytest.mark.slow)],
)
def test_mixed_clients_with_random_disconnects(
    bundles: Bundles, tmp_path: Path, clients: int, cuts: int, rounds: int, idle_seconds: int
) -> None:
    words = ["--dtype", "float64", "--threads", 1, "--session-idle", idle_seconds, "--keepalive", 10]
    with running(bundles.tiny, *words, stderr=tmp_path / "log") as server:
        whole = mixed(server, bundles.tiny, clients=clients, cuts=cuts, rounds=rounds)
        memory = asyncio.run(asyncio.wait_for(whole, 300 * rounds))
    settled = memory[rounds // 4 :]
    assert settled[-1] - settled[0] < 20 * 2**20
