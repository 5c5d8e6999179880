"""Who moves structures shares the server: no crowd starves a single one, no idle reader holds up the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.serve.conftest import Bundles, Inside, inside, molecule, run, running
from tests.serve.test_relax import as_atoms
from tests.serve.test_relax import asked as relaxing
from tests.serve.test_simulate import asked, courses

from equipot.client import Client, MotionFrame
from equipot.serve.config import CPU_BUDGET, RequestLimits, ServeConfig, SessionLimits
from equipot.serve.motion.mover import Errands, Mover
from equipot.serve.shares import Share
from equipot.wire.v1 import potential_pb2 as pb

ANN, BOB = "ann-has-this-token", "bob-has-that-token"
ENDLESS: dict[str, Any] = {"fmax": 1e-12, "max_steps": 100_000}


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def read_to_end(call: Any) -> list[pb.SimulateReply]:
    return [reply async for reply in call]


async def crowd(at: Inside, metadata: Any, *, requests: int, structures: int) -> list[Any]:
    """Calls that relax for ever, all of them on their way."""
    systems = [molecule(seed, 5) for seed in range(structures)]
    request = relaxing(systems, **ENDLESS)
    calls: list[Any] = [at.stub.Relax(request, metadata=metadata) for _ in range(requests)]
    for call in calls:
        assert (await call.read()).HasField("begun")
    await at.until(lambda: at.value("structures_total") > requests * 10)
    return calls


class TestShares:
    @pytest.mark.parametrize("named", [True, False])
    def test_a_crowd_does_not_starve_a_single_molecule(
        self, bundles: Bundles, tmp_path: Path, *, named: bool
    ) -> None:
        tokens = tmp_path / "tokens"
        tokens.write_text(f"ann: {ANN}\nbob: {BOB}\n")
        ann, bob = (bearer(ANN), bearer(BOB)) if named else ((), ())
        steps, largest = 30, 100

        async def test() -> None:
            config = ServeConfig(
                bundles=(bundles.tiny,),
                port=0,
                metrics_port=None,
                threads=1,
                tokens=tokens if named else None,
                budget=replace(CPU_BUDGET, batch_edges=20 * largest),
            )
            async with inside(config) as at:
                calls = await crowd(at, ann, requests=8, structures=300)
                before = at.value("structures_total")
                single = at.stub.Simulate(asked([molecule(1)], steps=steps), metadata=bob)
                (course,) = courses(await read_to_end(single))
                assert course.result is not None
                assert course.result.steps == steps
                others = at.value("structures_total") - before - steps
                for call in calls:
                    call.cancel()
            # The crowd has 2,400 structures under way, each of up to 20 edges. A step of the single one may
            # wait for a batch of theirs, has them beside it in its own, and then waits for a slice of the
            # thread that moves; whatever the machine's pace, that is a few batches, and not all of the crowd.
            assert others < 6 * largest * steps
            assert others > 0

        run(test())

    def test_the_moving_thread_goes_by_weight(self) -> None:
        async def test() -> None:
            mover = Mover(lambda identity: Share(weight=3.0 if identity == "ann" else 1.0))
            order: list[str] = []

            def work(name: str) -> Iterator[None]:
                for _ in range(400):
                    order.append(name)
                    sum(range(5_000))
                    yield

            async with asyncio.timeout(30):
                moves = [mover.move(Errands(name), work(name)) for name in ("bob", "ann", "bob", "ann")]
                await asyncio.gather(*moves)
            half = order[: len(order) // 2]
            # While both wait, three of ann's go for one of bob's.
            assert 2.0 < half.count("ann") / max(1, half.count("bob")) < 5.0
            assert order.count("ann") == order.count("bob") == 800
            mover.close()

        run(test())

    def test_the_few_of_one_identity_do_not_wait_for_its_many(self) -> None:
        async def test() -> None:
            mover = Mover()
            done: list[str] = []

            def work(name: str, count: int) -> Iterator[None]:
                for _ in range(count):
                    done.append(name)
                    sum(range(20_000))
                    yield

            async with asyncio.timeout(30):
                crowd = [
                    asyncio.ensure_future(mover.move(Errands("ann"), work("many", 100))) for _ in range(9)
                ]
                few = Errands("ann")
                waits = []
                for _ in range(5):
                    before = len(done)
                    await mover.move(few, work("few", 1))
                    waits.append(len(done) - before)
                in_all = len(done)
                await asyncio.gather(*crowd)
            assert in_all < 9 * 100
            # The first comes in line with the others; later ones wait for a slice that is under way.
            assert sorted(waits)[2] < 9 * 100 / 10
            mover.close()

        run(test())

    def test_what_the_moved_raise_ends_their_call_alone(self) -> None:
        async def test() -> None:
            mover = Mover()

            done: list[int] = []

            def some(count: int) -> Iterator[None]:
                for number in range(count):
                    done.append(number)
                    yield
                raise ValueError("no")

            with pytest.raises(ValueError, match="no"):
                await mover.move(Errands("ann"), some(2))
            await mover.move(Errands("ann"), (None for _ in range(3)))
            assert done == [0, 1]
            mover.close()

        run(test())


class TestIdleReaders:
    def test_wait_alone_and_are_let_go(self, bundles: Bundles) -> None:
        async def test() -> None:
            config = ServeConfig(
                bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1,
                limits=RequestLimits(request_atoms=1_200), sessions=SessionLimits(idle_seconds=10.0),
            )  # fmt: skip
            async with inside(config) as at:
                many = [molecule(seed, 100) for seed in range(11)]
                words: dict[str, Any] = {
                    "steps": 100_000,
                    "frame_every": 1,
                    "token_every": 1,
                    "timestep": 0.01,
                }
                idle = at.stub.Simulate(asked(many, **words))
                replies = aiter(idle)
                assert (await anext(replies)).HasField("begun")
                # It is full of what nobody reads, and stands still; others go on.
                await at.until(lambda: at.value("moving_structures") == 11)
                await standstill(at)
                other = courses(await read_to_end(at.stub.Simulate(asked([molecule(1)], steps=20))))
                assert max(other[0].frames) == 20
                with pytest.raises(grpc.RpcError) as caught:
                    await read_to_end(at.stub.Simulate(asked(many, steps=2)))
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                # Then it is let go, and its place is free.
                await at.until(lambda: at.value("moving_structures") == 0)
                courses(await read_to_end(at.stub.Simulate(asked(many, steps=2, timestep=0.01))), 11)
                # Whoever reads on is told to ask again.
                with pytest.raises(grpc.RpcError) as caught:
                    await read_to_end(replies)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "nothing was read for" in (caught.value.details() or "")

        run(test())


async def standstill(at: Inside) -> None:
    """Returns once nothing was computed for a while."""
    before = -1.0
    while at.value("structures_total") != before:
        before = at.value("structures_total")
        await asyncio.sleep(0.4)


@pytest.mark.slow
def test_a_client_goes_on_after_the_server_was_killed(bundles: Bundles, tmp_path: Path) -> None:
    systems = [as_atoms(molecule(seed, 9)) for seed in range(3)]
    words = [bundles.tiny, "--dtype", "float64", "--threads", 1]
    how: dict[str, Any] = {
        "steps": 150, "integrator": "langevin", "timestep": 0.5, "temperature": 200.0, "seed": 4,
        "frame_every": 10, "token_every": 25,
    }  # fmt: skip
    with running(*words, stderr=tmp_path / "one") as first, Client(first.address) as client:
        port = int(first.address.rpartition(":")[2])
        expected = client.simulate(systems, **how)
        found: list[dict[int, MotionFrame]] = [{}, {}, {}]
        simulating = client.simulate_iter(systems, **how)
        for index, told in simulating:
            if isinstance(told, MotionFrame):
                found[index][told.step] = told
                if told.step == 80:
                    break
        first.popen.kill()
        first.popen.wait()
        with running(*words, port=port, stderr=tmp_path / "two"):
            for index, told in simulating:
                if isinstance(told, MotionFrame):
                    assert told.step not in found[index]
                    found[index][told.step] = told
    for frames, whole in zip(found, expected, strict=True):
        assert list(frames) == [frame.step for frame in whole.frames]
        for frame in whole.frames:
            np.testing.assert_array_equal(frames[frame.step].positions, frame.positions)
            np.testing.assert_array_equal(frames[frame.step].velocities, frame.velocities)
