"""Dynamics as a client sees them: each frame once, whatever happens to the connection."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from ase import units

from equipot.client import (
    AsyncClient,
    Client,
    InvalidRequest,
    LimitExceeded,
    ModelChanged,
    Resumed,
    RetryPolicy,
    ServerUnavailable,
)
from equipot.client.dynamics import Ended, MotionFrame, Observation, Restart, Trajectory
from equipot.wire.v1 import potential_pb2 as pb

THRICE = RetryPolicy(attempts=3, initial_delay=0.0, max_delay=0.0)
MANY = 20
"""More interruptions than a call outlives."""


def steps_of(trajectory: Trajectory) -> list[int]:
    return [frame.step for frame in trajectory.frames]


def quiet(message: str) -> None:
    pass


class TestTrajectories:
    def test_come_in_the_order_given(self, server: Any, cluster: Any) -> None:
        items = [cluster(2), {"atomic_numbers": [18, 18], "positions": np.zeros((3, 3))}, cluster(3)]
        with Client(server.address) as client:
            found = client.simulate(items, steps=10, frame_every=4, observe_every=5, seed=7, on_warning=quiet)
        assert [steps_of(one) for one in found] == [[0, 4, 8, 10], [], [0, 4, 8, 10]]
        assert [seen.step for seen in found[2].observations] == [0, 5, 10]
        assert found[1].failure is not None
        assert found[1].failure.index == 1
        assert [one.ended.seed for one in (found[0], found[2]) if one.ended] == [7, 9]
        assert found[0].ended is not None
        assert found[0].ended.model is not None
        assert found[0].ended.model.pinned == server.pinned
        np.testing.assert_allclose(
            found[2].frames[-1].positions[:, 0] - cluster(3).positions[:, 0], 0.1, atol=1e-12
        )

    def test_settings_travel(self, server: Any, crystal: Any, cluster: Any) -> None:
        moving = cluster(3)
        moving.set_masses([1.0, 2.0, 3.0])
        moving.set_velocities(np.full((3, 3), 0.02) / units.fs)
        with Client(server.address) as client:
            client.simulate(
                [cluster(2), moving], steps=3, integrator="langevin", timestep=0.5, temperature=300,
                final_temperature=400, friction=0.02, seed=1, forces=True, on_warning=quiet,
            )  # fmt: skip
            asked = server.simulated[-1]
            client.simulate(
                crystal, steps=3, integrator="mtk", temperature=100, thermostat_time=50, pressure=0.1,
                barostat_time=500, stress=True, token_every=0, on_warning=quiet,
            )  # fmt: skip
        assert (asked.integrator, asked.timestep, asked.temperature) == (pb.INTEGRATOR_LANGEVIN, 0.5, 300)
        assert (asked.final_temperature, asked.friction) == (400, 0.02)
        assert (asked.frame_forces, asked.frame_stress) == (True, False)
        assert list(asked.seeds) == [1, 2]
        assert asked.drawn == b"\1\0"
        velocities = np.frombuffer(asked.velocities).reshape(5, 3)
        np.testing.assert_allclose(velocities[2:], 0.02)
        masses = np.frombuffer(asked.masses)
        np.testing.assert_allclose(masses, [39.95, 39.95, 1, 2, 3], rtol=1e-3)
        cell = server.simulated[-1]
        assert (cell.integrator, cell.thermostat_time, cell.barostat_time) == (pb.INTEGRATOR_MTK, 50, 500)
        assert (cell.pressure, cell.frame_stress, cell.token_every) == (0.1, True, 0)
        assert not cell.HasField("final_temperature")
        assert not cell.masses

    def test_warnings_are_told_once(self, server: Any, cluster: Any) -> None:
        server.interruptions = [2]
        with Client(server.address) as client, pytest.warns(UserWarning, match="it flies") as caught:
            client.simulate(cluster(2), steps=4)
        assert len(caught) == 1


class TestLostConnections:
    def test_are_not_noticed(self, server: Any, cluster: Any) -> None:
        items = [cluster(2), cluster(3), cluster(4)]
        words: dict[str, Any] = {
            "steps": 20, "frame_every": 2, "observe_every": 3, "token_every": 7, "on_warning": quiet,
        }  # fmt: skip
        with Client(server.address) as client:
            whole = client.simulate(items, **words)
            # Before the first token, between two, right behind one, at the end.
            server.interruptions = [3, 12, 14, 20]
            found = client.simulate(items, **words)
        assert len(server.simulated) == 6
        assert [steps_of(one) for one in found] == [steps_of(one) for one in whole]
        for here, there in zip(found, whole, strict=True):
            assert [seen.step for seen in here.observations] == [seen.step for seen in there.observations]
            for frame, other in zip(here.frames, there.frames, strict=True):
                np.testing.assert_array_equal(frame.positions, other.positions)
        first, second, third = server.simulated[1:4]
        assert (first.model, second.model, third.model) == ("", server.pinned, server.pinned)
        # Nothing had a token yet; then the first had one.
        assert (list(second.tokens), list(third.tokens)) == ([], [b"7", b"", b""])
        assert first.seeds == second.seeds

    def test_of_a_caller_of_asyncio_neither(self, server: Any, cluster: Any) -> None:
        async def test() -> list[Trajectory]:
            async with AsyncClient(server.address) as client:
                return await client.simulate(
                    [cluster(2), cluster(3)], steps=20, frame_every=2, token_every=7, on_warning=quiet
                )

        server.interruptions = [3, 12]
        found = asyncio.run(test())
        assert [steps_of(one) for one in found] == [list(range(0, 21, 2))] * 2
        assert len(server.simulated) == 3

    @pytest.mark.parametrize(
        ("interruptions", "tried"),
        [
            # After the first frame and before the first token, each time.
            ([1] * MANY, 3),
            # A token begins the count anew; frames behind it do not.
            ([1, 1, 8] + [10] * MANY, 5),
        ],
    )
    def test_that_let_it_get_no_further_end_it(
        self, server: Any, cluster: Any, interruptions: list[int], tried: int
    ) -> None:
        words: dict[str, Any] = {"steps": 20, "frame_every": 1, "token_every": 7, "on_warning": quiet}

        async def test() -> None:
            async with AsyncClient(server.address, retry=THRICE) as client:
                await client.simulate(cluster(2), **words)

        no_further = pytest.raises(ServerUnavailable, match="3 tries in a row got no further")
        server.interruptions = list(interruptions)
        with Client(server.address, retry=THRICE) as client, no_further:
            client.simulate(cluster(2), **words)
        assert len(server.simulated) == tried
        server.interruptions = list(interruptions)
        with no_further:
            asyncio.run(test())
        assert len(server.simulated) == 2 * tried

    def test_with_another_bundle_behind_them(self, server: Any, cluster: Any) -> None:
        server.interruptions = [5]
        with Client(server.address) as client:
            running = client.simulate_iter(cluster(2), steps=9, frame_every=1, on_warning=quiet)
            next(running)
            server.digest = "sha256:" + "cd" * 32
            with pytest.raises(ModelChanged):
                list(running)

    def test_other_faults_are_not_repeated(self, server: Any, cluster: Any) -> None:
        server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
        with Client(server.address) as client, pytest.raises(LimitExceeded):
            client.simulate(cluster(2), steps=9, on_warning=quiet)
        assert len(server.simulated) == 1


class TestResuming:
    def test_goes_on_behind_what_is_there(self, server: Any, cluster: Any) -> None:
        resume = [Resumed(b"7", frames=8, observations=6), None]
        with Client(server.address) as client:
            told = list(
                client.simulate_iter(
                    [cluster(2), cluster(3)],
                    steps=12,
                    frame_every=2,
                    observe_every=3,
                    token_every=5,
                    resume=resume,
                    on_warning=quiet,
                )
            )
        mine = [one for index, one in told if index == 0]
        assert [one.step for one in mine if isinstance(one, MotionFrame)] == [10, 12]
        assert [one.step for one in mine if isinstance(one, Observation)] == [9, 12]
        assert [one.step for one in mine if isinstance(one, Restart)] == [10]
        assert isinstance(mine[-1], Ended)
        other = [one.step for index, one in told if index == 1 and isinstance(one, MotionFrame)]
        assert other == [0, 2, 4, 6, 8, 10, 12]

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ({"resume": [None]}, "resume has 1 entries for 2 structures"),
            ({"seed": -1}, "seed is -1"),
            ({"frame_every": -2}, "frame_every is -2"),
            ({"timestep": 0.0}, "timestep is 0.0"),
            ({"friction": float("nan")}, "friction is nan"),
            ({"integrator": "leapfrog"}, "one of velocity_verlet, langevin, nose_hoover, bussi"),
        ],
    )
    def test_words_that_are_none(self, server: Any, cluster: Any, words: Any, says: str) -> None:
        with Client(server.address) as client, pytest.raises(InvalidRequest, match=says):
            client.simulate([cluster(2), cluster(3)], steps=5, **words)
        assert not server.simulated
