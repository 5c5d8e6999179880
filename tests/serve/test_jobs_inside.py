"""Jobs of a server in this process: stopped and started again, and with what fails once."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.serve.conftest import Bundles, inside, molecule
from tests.serve.job_helpers import get, part, positions, results

from equipot.serve.config import ServeConfig
from equipot.serve.jobs import kinds, runner
from equipot.serve.jobs.kinds import TOKEN_STEPS
from equipot.serve.jobs.records import StoreFull
from equipot.serve.jobs.settings import JobSettings
from equipot.serve.jobs.store import Store
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1.jobs_pb2_grpc import JobServiceStub


def test_a_server_that_drains_goes_on_later(bundles: Bundles, tmp_path: Path) -> None:
    systems = [molecule(seed, 3 + seed % 9) for seed in range(30)]
    jobs = JobSettings(folder=tmp_path / "jobs", save_seconds=0.2)
    config = ServeConfig(
        bundles=(bundles.tiny,), port=0, metrics_port=None, dtype="float64", threads=1, jobs=jobs
    )

    async def first() -> float:
        async with inside(config) as at, grpc.aio.insecure_channel(at.address) as channel:
            stub: Any = JobServiceStub(channel)
            await stub.SubmitJob(part("long", systems, fmax=1e-3, max_steps=400))
            await at.until(lambda: at.value("job_structures_total") >= 3)
            waiting = asyncio.create_task(stub.AttachJob(jpb.AttachJobRequest(id="long", after=1)).read())
            await at.server.drain(20.0)
            with contextlib.suppress(grpc.RpcError):
                await waiting
            return at.value("structures_total", outcome="ok")

    async def second() -> tuple[dict[int, jpb.JobResult], dict[int, jpb.JobResult], float, float]:
        async with inside(config) as at, grpc.aio.insecure_channel(at.address) as channel:
            stub: Any = JobServiceStub(channel)
            before = (await stub.GetJob(get("long"))).n_done
            assert 3 <= before < 30
            found = results([reply async for reply in stub.AttachJob(jpb.AttachJobRequest(id="long"))])
            late = at.value("structures_total", outcome="ok")
            await stub.SubmitJob(part("whole", systems, fmax=1e-3, max_steps=400))
            whole = results([reply async for reply in stub.AttachJob(jpb.AttachJobRequest(id="whole"))])
            return found, whole, late, at.value("structures_total", outcome="ok") - late

    early = asyncio.run(asyncio.wait_for(first(), 60))
    found, expected, late, whole = asyncio.run(asyncio.wait_for(second(), 60))
    assert sorted(found) == sorted(expected) == list(range(30))
    for index, result in found.items():
        assert result.relaxed.steps == expected[index].relaxed.steps
        np.testing.assert_allclose(positions(result), positions(expected[index]), atol=1e-6)
    # At most the steps since the last token are taken again.
    assert late < whole
    assert early + late < whole + 30 * TOKEN_STEPS


@pytest.mark.parametrize("broken", ["walks", "chunk_of"])
def test_what_fails_once_is_done_later(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(runner, "RETRY_FAILED", 0.05)
    where: Any = Store if broken == "walks" else kinds
    right, calls = getattr(where, broken), []

    def once_wrong(*words: Any, **more: Any) -> Any:
        calls.append(words)
        # The first look at a chunk is the submission's own check.
        if len(calls) == (1 if broken == "walks" else 2):
            raise StoreFull("for a moment") if broken == "walks" else ValueError("for a moment")
        return right(*words, **more)

    monkeypatch.setattr(where, broken, once_wrong)
    jobs = JobSettings(folder=tmp_path / "jobs")
    config = ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1, jobs=jobs)

    async def test() -> None:
        async with inside(config) as at, grpc.aio.insecure_channel(at.address) as channel:
            stub: Any = JobServiceStub(channel)
            await stub.SubmitJob(part("shaky", [molecule(seed) for seed in range(5)], max_steps=2))
            found = results([reply async for reply in stub.AttachJob(jpb.AttachJobRequest(id="shaky"))])
            assert sorted(found) == list(range(5))
            assert (await stub.GetJob(get("shaky"))).state == jpb.JOB_STATE_DONE

    asyncio.run(asyncio.wait_for(test(), 60))
    assert len(calls) > 1
