"""Clients before several real servers: calls go round, and what drains is left alone before it refuses."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from equipot.client import AsyncClient
from equipot.client.retry import RetryPolicy
from equipot.serve.config import ServeConfig

from .conftest import Bundles, Inside, inside, molecule, run


def config(bundle: Path) -> ServeConfig:
    return ServeConfig(bundles=(bundle,), port=0, metrics_port=None, threads=1)


def answered(server: Inside) -> float:
    return server.value("requests_total", model="tiny", outcome="ok")


def test_calls_go_round_and_leave_a_draining_server_without_one_refusal(bundles: Bundles) -> None:
    structure = {"atomic_numbers": molecule(1).atomic_numbers, "positions": molecule(1).positions}

    async def test() -> None:
        async with inside(config(bundles.tiny)) as one, inside(config(bundles.tiny)) as two:
            address = f"ipv4:{one.address},{two.address}"
            never = RetryPolicy(attempts=1)
            async with AsyncClient(address, retry=never) as client:
                first = await client.predict([structure])
                # Until both connections stand, all calls go to the one that stands.
                while not (answered(one) and answered(two)):
                    await client.predict([structure])
                before = answered(one), answered(two)
                for _ in range(20):
                    np.testing.assert_array_equal((await client.predict([structure])).energy, first.energy)
                assert (answered(one) - before[0], answered(two) - before[1]) == pytest.approx(
                    (10, 10), abs=1
                )
                draining = asyncio.create_task(one.server.drain(20.0, linger=2.0))
                await asyncio.sleep(0.5)
                before = answered(one), answered(two)
                while not draining.done():
                    await client.predict([structure])
                assert answered(one) == before[0]
                assert answered(two) > before[1]

    run(test())
