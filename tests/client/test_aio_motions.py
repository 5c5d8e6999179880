"""Sessions and relaxations for asyncio: as the blocking client's."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from equipot.client import AsyncClient, Client, ClientError, DeadlineExceeded, ModelChanged


def test_relaxations_are_those_of_the_blocking_client(server: Any, cluster: Any) -> None:
    systems = [cluster(size) for size in (2, 3, 4)]

    async def test() -> list[Any]:
        async with AsyncClient(server.address) as client:
            server.faults_after = [(grpc.StatusCode.UNAVAILABLE, [])]
            return await client.relax(systems, fmax=0.1)

    found = asyncio.run(test())
    assert len(server.relaxed) == 2
    with Client(server.address) as client:
        for here, there in zip(found, client.relax(systems, fmax=0.1), strict=True):
            np.testing.assert_array_equal(here.positions, there.positions)
            assert here.energy == there.energy


class TestSessions:
    def test_answer_as_predict_does(self, server: Any, cluster: Any) -> None:
        atoms = cluster(4)

        async def test() -> None:
            async with AsyncClient(server.address) as client, client.session(atoms) as session:
                for step in range(5):
                    positions = atoms.positions + 0.01 * step
                    answer = await session.predict(positions, stress=False)
                    once = await client.predict({"atomic_numbers": atoms.numbers, "positions": positions})
                    np.testing.assert_array_equal(answer.forces, once.forces)
                assert session.model is not None
                assert session.model.pinned == server.pinned
            with pytest.raises(ClientError, match="closed"):
                await session.predict(atoms.positions)

        asyncio.run(test())
        assert len(server.opened) == 1

    def test_a_lost_connection_is_opened_again_with_the_same_bundle(self, server: Any, cluster: Any) -> None:
        atoms, pinned = cluster(4), server.pinned

        async def test() -> None:
            async with AsyncClient(server.address) as client, client.session(atoms) as session:
                first = await session.predict(atoms.positions)
                server.stop()
                server.start()
                second = await session.predict(atoms.positions)
                np.testing.assert_array_equal(first.forces, second.forces)
                server.stop()
                server.digest = "sha256:" + "cd" * 32
                server.start()
                with pytest.raises(ModelChanged):
                    await session.predict(atoms.positions)

        asyncio.run(test())
        assert [opened.model for opened in server.opened[:2]] == ["", pinned]

    def test_a_step_that_takes_too_long(self, server: Any, cluster: Any) -> None:
        async def test() -> None:
            async with AsyncClient(server.address) as client, client.session(cluster(2)) as session:
                await session.predict(cluster(2).positions)
                server.delay = 2.0
                with pytest.raises(DeadlineExceeded):
                    await session.predict(cluster(2).positions, timeout=0.3)
                server.delay = 0.0
                await session.predict(cluster(2).positions)

        asyncio.run(test())
