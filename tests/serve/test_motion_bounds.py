"""What one caller of motions must not do to others: forged tokens, cells without volume, replies unread."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms
from tests.serve.conftest import Bundles, ask, inside, molecule, run
from tests.serve.test_disconnects import idle, unread_frames
from tests.serve.test_intake import retry_delay
from tests.serve.test_relax import asked as relaxing
from tests.serve.test_simulate import asked as simulating

from equipot.serve.config import ServeConfig, SessionLimits
from equipot.serve.motion import servicer
from equipot.serve.motion.dynamics import Dynamics, IntegratorName, Start, Watch
from equipot.serve.motion.outbox import Outbox, Unread
from equipot.serve.motion.relaxation import begun
from equipot.serve.motion.relaxing import Relaxing
from equipot.serve.motion.state import BadState, Origin, State, seal, unseal
from equipot.serve.motion.walker import Halt, Walker
from equipot.wire.v1 import potential_pb2 as pb

ORIGIN = Origin(model="m", level_of_theory="l", algorithm="a", settings="s", structure="x")
ZEROS = np.zeros((1, 3))
GOOD = {"energy": 0.0, "dt": 0.1, "a": 0.1, "Nsteps": 1}


def resumed(words: dict[str, Any], *, step: int = 1, **how: Any) -> None:
    arrays = {"positions": ZEROS, "forces": ZEROS, "cell": np.eye(3), "coordinates": np.zeros(12)}
    state = State(step=step, words=words, arrays=arrays)
    begun(Relaxing(**how), ZEROS, np.eye(3), np.zeros(1, bool), unseal(seal(state, ORIGIN), ORIGIN))


@pytest.mark.parametrize(
    "change",
    [{"energy": None}, {"energy": "x"}, {"energy": float("nan")}, {"Nsteps": float("nan")}, {"dt": 10**400}],
)
def test_a_forged_token_is_a_bad_one_of_its_structure(change: dict[str, Any]) -> None:
    resumed(GOOD)
    with pytest.raises(BadState, match="lacks"):
        resumed(GOOD | change)


def test_a_forged_token_has_no_more_steps_than_a_message_holds_and_the_stress_of_a_cell_that_moves() -> None:
    with pytest.raises(BadState, match="no state"):
        resumed(GOOD, step=2**32)
    with pytest.raises(BadState, match="lacks stress"):
        resumed(GOOD, cell="full")


def test_the_neighbour_lists_of_what_moves_are_bounded_and_change_no_number(bundles: Bundles) -> None:
    systems = [molecule(seed, 9) for seed in range(400)]
    request = relaxing(systems, fmax=1e-12, max_steps=4)

    async def moved(most: int) -> tuple[list[float], list[float]]:
        """Energies, and how much was kept meanwhile."""
        kept: list[float] = []
        config = ServeConfig(
            bundles=(bundles.tiny,),
            port=0,
            metrics_port=None,
            threads=1,
            dtype="float64",
            sessions=SessionLimits(memory_bytes=most),
        )
        async with inside(config) as at:
            found: dict[int, float] = {}
            async for reply in at.stub.Relax(request):
                kept.append(at.value("session_bytes"))
                if reply.HasField("result"):
                    found[reply.result.index] = reply.result.energy
            await at.until(lambda: at.value("session_bytes") == 0)
        return [found[index] for index in range(len(systems))], kept

    async def test() -> None:
        amply, much = await moved(2**30)
        tightly, little = await moved(2**20)
        assert max(much) > 2**20
        assert 2**18 < max(little) <= 0.75 * 2**20
        np.testing.assert_allclose(tightly, amply, rtol=0, atol=1e-9)

    run(test())


@pytest.mark.parametrize("integrator", ["mtk_isotropic", "mtk"])
def test_a_cell_without_volume_does_not_move(integrator: IntegratorName) -> None:
    atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]], cell=np.zeros((3, 3)), pbc=True)
    how = Dynamics(integrator=integrator, steps=5, temperature=300.0)
    with pytest.raises(Halt, match="no volume") as halted:
        Walker(atoms, how.algorithm(Start(velocities=None, seed=1), Watch())).advance()
    assert halted.value.fault.field == "cell"


def test_what_nobody_reads_is_counted_over_all_callers_until_they_leave() -> None:
    async def fill() -> None:
        unread = Unread(each=1_000, most=10_000)
        message = pb.RelaxReply(progress=pb.RelaxProgress(positions=bytes(1_000)))
        boxes: list[Outbox[pb.RelaxReply]] = []
        while not unread.full:
            assert len(boxes) <= 10
            boxes.append(Outbox(unread, patience=1.0))
            await boxes[-1].put(message)
        assert await boxes[0].get() is message
        assert not unread.full
        for box in boxes:
            box.leave()
            await box.put(message)
        assert unread.bytes == 0

    run(fill())


def test_nobody_is_let_in_while_too_much_waits_unread(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two who read nothing leave room for others; three leave none, until one of them goes."""
    monkeypatch.setattr(servicer, "Unread", lambda: Unread(each=60_000, most=150_000))
    config = ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, dtype="float64", threads=1)

    async def refusal(stub: Any) -> grpc.aio.AioRpcError | None:
        """Of one who reads; None: it is let in, and sees its end."""
        try:
            replies = [reply async for reply in stub.Simulate(simulating([molecule(1)], steps=1))]
        except grpc.aio.AioRpcError as error:
            return error
        assert replies[-1].result.steps == 1
        return None

    async def test() -> None:
        async with inside(config) as there:
            address = there.address
            async with idle(address, unread_frames), idle(address, unread_frames):
                for _ in range(20):
                    assert await refusal(there.stub) is None
                async with idle(address, unread_frames):
                    while (refused := await refusal(there.stub)) is None:
                        await asyncio.sleep(0.02)
                    # What moves nothing is answered as ever.
                    await there.stub.Predict(ask([molecule(1)]))
                while await refusal(there.stub) is not None:
                    await asyncio.sleep(0.02)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "bytes of results wait to be read; the limit is 150000" in str(refused.details())
        assert retry_delay(refused) == servicer.RETRY_MOVING

    run(test())
