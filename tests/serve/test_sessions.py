"""Sessions on a real server: the same answers as Predict, for as long as its atoms are the same."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms
from tests.serve.conftest import (
    Bundles,
    Inside,
    Process,
    arrays,
    ask,
    crystal,
    inside,
    molecule,
    read,
    run,
    running,
)

from equipot.client import Client, EquipotCalculator
from equipot.model.batch import System
from equipot.serve.config import ServeConfig, SessionLimits
from equipot.serve.dispatcher import Dispatcher
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import FloatArray, encode_structures
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub


def opening(systems: list[System], *properties: pb.Property.ValueType, **fields: Any) -> pb.SessionRequest:
    structures = encode_structures(arrays(systems))
    structures.positions = b""
    words = {"model": "tiny", "structures": structures, "properties": properties, **fields}
    return pb.SessionRequest(open=pb.SessionOpen(**words))


def stepping(systems: list[System], number: int = 1, **fields: Any) -> pb.SessionRequest:
    positions = np.concatenate([system.positions for system in systems])
    return pb.SessionRequest(step=pb.SessionStep(number=number, positions=positions.tobytes(), **fields))


class Talk:
    """One session, a message at a time."""

    def __init__(self, stub: PotentialServiceStub, first: pb.SessionRequest, *, metadata: Any = None) -> None:
        self._outbox: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        self.call: Any = stub.Session(iter(self._outbox.get, None), timeout=60, metadata=metadata)
        self._outbox.put(first)

    def step(self, request: pb.SessionRequest) -> pb.SessionReply:
        self._outbox.put(request)
        reply: pb.SessionReply = next(self.call)
        return reply

    def close(self) -> None:
        self._outbox.put(None)


def refused(stub: PotentialServiceStub, *requests: pb.SessionRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Session(iter(requests), timeout=60))
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), caught.value.details() or ""


def moved(systems: list[System], seed: int, size: float) -> list[System]:
    random = np.random.default_rng(seed)
    return [
        replace(system, positions=system.positions + random.uniform(-size, size, system.positions.shape))
        for system in systems
    ]


def close(one: FloatArray | None, other: FloatArray | None) -> None:
    assert one is not None
    assert other is not None
    np.testing.assert_allclose(one, other, atol=1e-10)


class TestAnswers:
    def test_are_those_of_predict_as_atoms_move(self, stub: PotentialServiceStub) -> None:
        systems = [molecule(1), crystal(2), crystal(3, 27)]
        wanted = (pb.PROPERTY_ENERGY, pb.PROPERTY_FORCES, pb.PROPERTY_STRESS)
        talk = Talk(stub, opening(systems, *wanted, skin=0.2))
        for number in range(1, 13):
            systems = moved(systems, number, 0.04)
            reply = talk.step(stepping(systems, number))
            assert reply.number == number
            kept = read(reply.answer, systems)
            fresh = read(stub.Predict(ask(systems, *wanted, model="tiny")), systems)
            assert not kept.failures
            np.testing.assert_allclose(kept.energy, fresh.energy, rtol=1e-12)
            close(kept.forces, fresh.forces)
            close(kept.stress, fresh.stress)
        talk.close()
        assert list(talk.call) == []

    def test_with_a_cell_that_changes(self, stub: PotentialServiceStub) -> None:
        system = crystal(4)
        talk = Talk(stub, opening([system], pb.PROPERTY_STRESS))
        talk.step(stepping([system]))
        wider = replace(system, cell=1.05 * system.cell, positions=1.05 * system.positions)
        expected = read(stub.Predict(ask([wider], pb.PROPERTY_STRESS, model="tiny")), [wider])
        with_cell = talk.step(stepping([wider], 2, cell=wider.cell.tobytes()))
        without = talk.step(stepping([wider], 3))
        for reply in (with_cell, without):
            got = read(reply.answer, [wider])
            close(got.stress, expected.stress)

    def test_a_step_may_ask_for_something_else(self, stub: PotentialServiceStub) -> None:
        talk = Talk(stub, opening([crystal(1)], pb.PROPERTY_ENERGY))
        assert not talk.step(stepping([crystal(1)])).answer.forces
        assert talk.step(stepping([crystal(1)], 2, properties=[pb.PROPERTY_STRESS])).answer.stress
        assert not talk.step(stepping([crystal(1)], 3)).answer.stress

    def test_a_bad_step_of_one_structure_ends_nothing(self, stub: PotentialServiceStub) -> None:
        good, bad = molecule(1), molecule(2)
        broken = replace(bad, positions=np.where(np.arange(6)[:, None] == 2, np.nan, bad.positions))
        talk = Talk(stub, opening([good, bad]))
        first = read(talk.step(stepping([good, bad])).answer, [good, bad])
        second = read(talk.step(stepping([good, broken], 2)).answer, [good, bad])
        third = read(talk.step(stepping([good, bad], 3)).answer, [good, bad])
        assert [failure.index for failure in second.failures] == [1]
        np.testing.assert_allclose(second.energy[0], first.energy[0], rtol=1e-12)
        assert np.isnan(second.energy[1])
        np.testing.assert_allclose(third.energy, first.energy, rtol=1e-12)

    def test_of_more_atoms_than_are_prepared_at_once(self, stub: PotentialServiceStub) -> None:
        systems = [crystal(seed, 64) for seed in range(40)]
        talk = Talk(stub, opening(systems))
        for number in (1, 2, 3):
            systems = moved(systems, number, 0.02)
            kept = read(talk.step(stepping(systems, number)).answer, systems)
            fresh = read(stub.Predict(ask(systems, model="tiny")), systems)
            close(kept.forces, fresh.forces)


class TestRefusals:
    def test_messages_out_of_turn(self, stub: PotentialServiceStub) -> None:
        first, step = opening([molecule(1)]), stepping([molecule(1)])
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        assert refused(stub, step) == (invalid, "a session begins with `open`")
        assert refused(stub, first, first) == (invalid, "a session that is open takes steps alone")
        assert list(stub.Session(iter(()), timeout=60)) == []

    @pytest.mark.parametrize(
        ("first", "words"),
        [
            (opening([molecule(1)], skin=-1.0), "skin is -1 Å"),
            (opening([molecule(1)], skin=float("nan")), "skin is nan Å"),
            (opening([molecule(1)], level_of_theory="B3LYP"), "does not know the level of theory"),
            (opening([molecule(1)], model="other"), "no model 'other' is served here"),
            (opening([molecule(1)], pb.PROPERTY_STRESS, model="direct"), "no stress"),
            (opening([molecule(1)] * 301), "the limit is 300"),
        ],
    )
    def test_openings(self, stub: PotentialServiceStub, first: pb.SessionRequest, words: str) -> None:
        assert words in refused(stub, first, stepping([molecule(1)]))[1]

    def test_a_structure_swapped_for_another(self, stub: PotentialServiceStub) -> None:
        code, words = refused(stub, opening([molecule(1)]), stepping([molecule(1, 7)]))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "positions: has 168 bytes, expected 144" in words

    def test_an_opening_that_claims_more_than_it_holds(self, stub: PotentialServiceStub) -> None:
        first = opening([molecule(1)])
        del first.open.structures.n_atoms[:]
        first.open.structures.n_atoms.append(2**31 - 1)
        assert refused(stub, first)[0] is grpc.StatusCode.INVALID_ARGUMENT

    @pytest.mark.parametrize("seconds", [-1.0, float("nan")])
    def test_a_timeout_that_is_none(self, stub: PotentialServiceStub, seconds: float) -> None:
        step = stepping([molecule(1)], timeout_seconds=seconds)
        assert "timeout_seconds" in refused(stub, opening([molecule(1)]), step)[1]


def test_what_is_open_is_counted(stub: PotentialServiceStub, server: Process) -> None:
    before = server.sample("equipot_sessions")
    talk = Talk(stub, opening([molecule(1)]))
    talk.step(stepping([molecule(1)]))
    assert server.sample("equipot_sessions") == before + 1
    over = {"model": "tiny", "method": "session", "outcome": "ok"}
    ended = server.sample("equipot_streams_total", **over)
    talk.close()
    assert not list(talk.call)
    deadline = time.monotonic() + 20
    while server.sample("equipot_streams_total", **over) <= ended:
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def replies(
    at: Inside, outbox: asyncio.Queue[pb.SessionRequest]
) -> AsyncGenerator[pb.SessionReply, None]:
    async def requests() -> AsyncIterator[pb.SessionRequest]:
        while True:
            yield await outbox.get()

    # The generated types are those of the blocking stub.
    call: Any = at.stub.Session(requests())
    try:
        async for reply in call:
            yield reply
    finally:
        call.cancel()


@pytest.fixture
def config(bundles: Bundles) -> ServeConfig:
    return ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1)


def test_a_server_that_stops_ends_idle_sessions_at_once(config: ServeConfig) -> None:
    async def test() -> None:
        async with inside(config) as at:
            outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
            outbox.put_nowait(opening([molecule(1)]))
            outbox.put_nowait(stepping([molecule(1)]))
            stream = replies(at, outbox)
            assert (await anext(stream)).number == 1
            async with asyncio.timeout(10):
                await at.server.drain(5.0)
                with pytest.raises(grpc.RpcError) as caught:
                    await anext(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            await at.until(lambda: at.value("sessions") == 0)

    run(test())


def test_sessions_left_idle_or_too_many_are_told_so(config: ServeConfig) -> None:
    async def test() -> None:
        limits = SessionLimits(most=1, idle_seconds=0.5)
        async with inside(replace(config, sessions=limits)) as at:
            outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
            outbox.put_nowait(opening([molecule(1)]))
            outbox.put_nowait(stepping([molecule(1)]))
            stream = replies(at, outbox)
            await anext(stream)
            with pytest.raises(grpc.RpcError) as caught:
                await anext(replies(at, asyncio.Queue()))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(grpc.RpcError) as caught:
                await anext(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert isinstance(caught.value, grpc.aio.AioRpcError)
            assert "no step came for 0.5 s" in (caught.value.details() or "")
            assert at.value("sessions") == 0

    run(test())


def test_what_sessions_keep_together_is_bounded(config: ServeConfig) -> None:
    limits = SessionLimits(memory_bytes=2**20)
    few, many = [crystal(1)], [molecule(seed, 4) for seed in range(800)]

    async def test() -> None:
        async with inside(replace(config, dtype="float64", sessions=limits)) as at:

            def talk(systems: list[System]) -> tuple[asyncio.Queue[pb.SessionRequest], Any]:
                outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
                outbox.put_nowait(opening(systems, skin=5.0))
                return outbox, replies(at, outbox)

            outbox, small = talk(few)
            outbox.put_nowait(stepping(few))
            await anext(small)
            kept = at.value("session_bytes")
            assert 10_000 < kept < limits.memory_bytes
            # There is no room for its lists: it goes on without, and keeps what it was opened with.
            systems, (crowd, large) = many, talk(many)
            for number in (1, 2):
                crowd.put_nowait(stepping(systems, number))
                answer = read((await anext(large)).answer, systems)
                fresh = read(await at.stub.Predict(ask(systems, model="tiny")), systems)
                close(answer.forces, fresh.forces)
                assert kept + 400_000 < at.value("session_bytes") < kept + 600_000
                systems = moved(systems, number, 0.02)
            for systems, words in ((many, "close some"), (3 * many, "this session would keep")):
                with pytest.raises(grpc.RpcError) as caught:
                    await anext(talk(systems)[1])
                assert isinstance(caught.value, grpc.aio.AioRpcError)
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert words in (caught.value.details() or "")
                assert "--max-session-mb" in (caught.value.details() or "")
            outbox.put_nowait(stepping(few, 2))
            assert (await anext(small)).number == 2
            await large.aclose()
            await small.aclose()
            await at.until(lambda: at.value("session_bytes") == 0)

    run(test())


def test_ase_goes_on_across_a_restart(bundles: Bundles, tmp_path: Any) -> None:
    from ase import Atoms

    from equipot.client import EquipotCalculator

    with running(bundles.tiny, "--dtype", "float64", stderr=tmp_path / "one") as first:
        port = first.address.rpartition(":")[2]
        system = molecule(1)
        atoms = Atoms(system.atomic_numbers, system.positions)
        with EquipotCalculator(first.address) as calculator:
            atoms.calc = calculator
            for seed in range(3):
                atoms.rattle(0.01, seed=seed)
                before = atoms.get_potential_energy()
            first.popen.kill()
            first.popen.wait()
            with running(bundles.tiny, "--dtype", "float64", port=int(port), stderr=tmp_path / "two"):
                atoms.positions += 1.0  # moved as a whole: the energy stays
                assert atoms.get_potential_energy() == pytest.approx(before, rel=1e-12)


def test_a_calculator_goes_on_by_calls_where_no_session_is_to_be_had(bundles: Bundles) -> None:
    def move(address: str) -> None:
        with EquipotCalculator(address, model="tiny") as calculator:
            system = molecule(1)
            atoms = Atoms(system.atomic_numbers, system.positions)
            atoms.calc = calculator
            for _ in range(4):
                assert np.isfinite(atoms.get_forces()).all()
                atoms.positions[1] += 0.01

    async def test() -> None:
        config = ServeConfig(
            bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1, sessions=SessionLimits(most=0)
        )
        async with inside(config) as at:
            await asyncio.to_thread(move, at.address)
            assert at.value("requests_total", outcome="ok") == 4

    run(test())


def test_steps_of_an_only_caller_change_no_thread(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere: list[object] = []
    hand_over = Dispatcher._run_elsewhere

    def count(self: Dispatcher, batch: Any, *rest: Any) -> None:
        elsewhere.append(batch)
        hand_over(self, batch, *rest)

    monkeypatch.setattr(Dispatcher, "_run_elsewhere", count)

    def step(address: str) -> None:
        atoms = molecule(1)
        with (
            Client(address) as client,
            client.session({"atomic_numbers": atoms.atomic_numbers, "positions": atoms.positions}) as session,
        ):
            for number in range(40):
                session.predict(atoms.positions + 1e-3 * number)

    async def test() -> None:
        config = ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1)
        async with inside(config) as at:
            await asyncio.to_thread(step, at.address)

    run(test())
    assert len(elsewhere) < 20
