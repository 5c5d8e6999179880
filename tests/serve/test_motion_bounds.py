"""What one caller of motions must not do to others: forged tokens, cells without volume, replies unread."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from equipot.serve.motion.dynamics import Dynamics, IntegratorName, Start, Watch
from equipot.serve.motion.outbox import MOST_UNREAD_BYTES, UNREAD_BYTES, Outbox, Unread
from equipot.serve.motion.relaxation import begun
from equipot.serve.motion.relaxing import Relaxing
from equipot.serve.motion.state import BadState, Origin, State, seal, unseal
from equipot.serve.motion.walker import Halt, Walker
from equipot.wire.v1 import potential_pb2 as pb

ORIGIN = Origin(model="m", level_of_theory="l", algorithm="a", settings="s", structure="x")
ZEROS = np.zeros((1, 3))
GOOD = {"energy": 0.0, "dt": 0.1, "a": 0.1, "Nsteps": 1}


def resumed(words: dict[str, Any]) -> None:
    state = State(step=1, words=words, arrays={"positions": ZEROS, "forces": ZEROS, "cell": np.eye(3)})
    begun(Relaxing(), ZEROS, np.eye(3), np.zeros(1, bool), unseal(seal(state, ORIGIN), ORIGIN))


@pytest.mark.parametrize(
    "change",
    [{"energy": None}, {"energy": "x"}, {"energy": float("nan")}, {"Nsteps": float("nan")}, {"dt": 10**400}],
)
def test_a_forged_token_is_a_bad_one_of_its_structure(change: dict[str, Any]) -> None:
    resumed(GOOD)
    with pytest.raises(BadState, match="lacks"):
        resumed(GOOD | change)


@pytest.mark.parametrize("integrator", ["mtk_isotropic", "mtk"])
def test_a_cell_without_volume_does_not_move(integrator: IntegratorName) -> None:
    atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]], cell=np.zeros((3, 3)), pbc=True)
    how = Dynamics(integrator=integrator, steps=5, temperature=300.0)
    with pytest.raises(Halt, match="no volume") as halted:
        Walker(atoms, how.algorithm(Start(velocities=None, seed=1), Watch())).advance()
    assert halted.value.fault.field == "cell"


def test_what_nobody_reads_is_counted_over_all_callers_until_they_leave() -> None:
    async def run() -> None:
        unread = Unread()
        message = pb.RelaxReply(progress=pb.RelaxProgress(positions=bytes(UNREAD_BYTES)))
        boxes: list[Outbox[pb.RelaxReply]] = []
        while not unread.full:
            assert len(boxes) <= MOST_UNREAD_BYTES // UNREAD_BYTES
            boxes.append(Outbox(unread, patience=1.0))
            await boxes[-1].put(message)
        assert await boxes[0].get() is message
        assert not unread.full
        for box in boxes:
            box.leave()
            await box.put(message)
        assert unread.bytes == 0

    asyncio.run(run())
