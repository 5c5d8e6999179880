"""What was freed goes back to the system, in time, while a server runs."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from tests.serve.conftest import Bundles, inside, run

from equipot.serve import server
from equipot.serve.config import ServeConfig
from equipot.serve.memory import trim
from equipot.serve.metrics import Metrics
from equipot.serve.opening import open_models

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give memory back by themselves")
def test_the_gaps_between_what_stays_go_back() -> None:
    def resident() -> int:
        return int(psutil.Process().memory_info().rss)

    before = resident()
    # Blocks of 100 kB lie on the heap; the small ones between them keep it from shrinking at its end.
    taken = [(np.ones(100_000, dtype=np.uint8), np.ones(100, dtype=np.uint8)) for _ in range(2_000)]
    kept = [small for _, small in taken]
    assert resident() - before > 150 * MIB
    del taken
    trim()
    assert resident() - before < 50 * MIB
    assert len(kept) == 2_000


def test_a_server_does_so_while_it_runs(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = []
    monkeypatch.setattr(server, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(server, "TRIM_SECONDS", 0.05)
    monkeypatch.setattr(server, "trim", lambda: trimmed.append(True))

    async def test() -> None:
        config = ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1)
        async with inside(config) as there:
            opened = await open_models(config, Metrics())
            watching = asyncio.create_task(there.server.watch(opened.registry))
            await there.until(lambda: len(trimmed) >= 3)
            watching.cancel()
            opened.close()

    run(test())
