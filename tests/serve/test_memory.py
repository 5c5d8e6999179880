"""What was freed goes back to the system, in time, while a server runs."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from tests.serve.conftest import Bundles, inside, run

from equipot.serve import server
from equipot.serve.config import ServeConfig
from equipot.serve.heap import trim
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


SHARED = """
import sys, threading
import numpy as np, psutil
from equipot.serve.heap import share_one, trim

if sys.argv[1] == "one":
    share_one()
resident = lambda: psutil.Process().memory_info().rss
np.ones(20 * 2**20, dtype=np.uint8)  # the largest block ever freed, by which heaps judge
before = resident()
freed, leave = threading.Barrier(5), threading.Event()

def compute():
    [np.ones(100_000, dtype=np.uint8) for _ in range(250)]
    freed.wait()
    leave.wait()

for _ in range(4):
    threading.Thread(target=compute).start()
freed.wait()
trim()
print(resident() - before)
leave.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give memory back by themselves")
def test_threads_keep_nothing_at_the_ends_of_heaps_of_their_own() -> None:
    kept = {
        heaps: int(
            subprocess.run([sys.executable, "-c", SHARED, heaps], capture_output=True, check=True).stdout
        )
        for heaps in ("one", "many")
    }
    assert kept["one"] < 10 * MIB
    assert kept["many"] > 20 * MIB, "the test shows nothing: there is no such memory to give back"


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
