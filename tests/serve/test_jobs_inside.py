"""Jobs of a server in this process: stopped and started again, and with what fails once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.serve.conftest import Bundles, inside, molecule
from tests.serve.job_helpers import get, part, positions, results
from tests.serve.test_simulate import asked as simulating

from equipot.serve.config import RequestLimits, ServeConfig
from equipot.serve.errors import NotReady
from equipot.serve.jobs import kinds, runner
from equipot.serve.jobs.kinds import TOKEN_STEPS
from equipot.serve.jobs.records import StoreFull
from equipot.serve.jobs.settings import JobSettings
from equipot.serve.jobs.store import Store
from equipot.serve.motion.servicer import MotionServicer
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1 import potential_pb2 as pb
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


@pytest.mark.parametrize("written", [True, False])
def test_what_is_ended_while_its_structures_are_read_does_not_begin(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, written: bool
) -> None:
    """And goes on with all of them if its end could not be written."""
    monkeypatch.setattr(runner, "RETRY_FAILED", 0.5)
    chunk_of, end, moved = kinds.chunk_of, Store.end, MotionServicer.moved
    loading, ending = threading.Event(), threading.Event()
    begun: list[bool] = []

    def read(*words: Any) -> Any:
        # The first look at a chunk is the submission's own check.
        if not loading.is_set() and threading.current_thread() is not threading.main_thread():
            loading.set()
            assert ending.wait(10)
        return chunk_of(*words)

    def write(*words: Any, **more: Any) -> Any:
        if not ending.is_set():
            ending.set()
            time.sleep(0.2)
            if not written:
                raise StoreFull("for a moment")
        return end(*words, **more)

    def move(*words: Any) -> Any:
        begun.append(True)
        return moved(*words)

    monkeypatch.setattr(kinds, "chunk_of", read)
    monkeypatch.setattr(Store, "end", write)
    monkeypatch.setattr(MotionServicer, "moved", move)
    jobs = JobSettings(folder=tmp_path / "jobs")
    config = ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1, jobs=jobs)

    async def test() -> None:
        async with inside(config) as at, grpc.aio.insecure_channel(at.address) as channel:
            stub: Any = JobServiceStub(channel)
            systems = [molecule(seed) for seed in range(5)]
            await stub.SubmitJob(part("short", systems, max_steps=2))
            assert await asyncio.to_thread(loading.wait, 10)
            cancelling = stub.CancelJob(jpb.CancelJobRequest(id="short"))
            if written:
                assert (await cancelling).state == jpb.JOB_STATE_CANCELLED
                await asyncio.sleep(0.1)
                assert not begun
                return
            with pytest.raises(grpc.RpcError, match="for a moment"):
                await cancelling
            assert not begun
            found = results([reply async for reply in stub.AttachJob(jpb.AttachJobRequest(id="short"))])
            assert sorted(found) == list(range(5))

    asyncio.run(asyncio.wait_for(test(), 60))


def test_what_is_given_back_while_more_is_read_brings_no_frame_again(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that fails while the next one is read, with steps that nobody has written yet."""
    monkeypatch.setattr(kinds, "PIECE_STRUCTURES", 1)
    monkeypatch.setattr(runner.Runner, "_chunk_atoms", lambda self, run, model: 12)
    ends, moved = Store.ends, MotionServicer.moved
    loading, failing = threading.Event(), threading.Event()
    begun: list[float] = []

    def read(store: Store, key: int, piece: Any) -> set[int]:
        if piece.first == 2 and not loading.is_set():
            loading.set()
            assert failing.wait(10)
            time.sleep(0.1)
        return ends(store, key, piece)

    async def once(replies: Any) -> AsyncGenerator[Any, None]:
        tokens = 0
        async for reply in replies:
            yield reply
            tokens += reply.HasField("token")
            if tokens == 2:
                await asyncio.to_thread(loading.wait, 10)
                failing.set()
                begun.append(time.monotonic())
                raise NotReady("a rank died", retry_after=0.4)

    def move(servicer: MotionServicer, request: Any, model: Any) -> Any:
        begun.append(time.monotonic())
        replies = moved(servicer, request, model)
        return once(replies) if len(begun) == 1 else replies

    monkeypatch.setattr(Store, "ends", read)
    monkeypatch.setattr(MotionServicer, "moved", move)
    jobs = JobSettings(folder=tmp_path / "jobs")
    config = ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1, jobs=jobs)

    async def test() -> list[tuple[int, int]]:
        async with inside(config) as at, grpc.aio.insecure_channel(at.address) as channel:
            stub: Any = JobServiceStub(channel)
            request = simulating([molecule(seed) for seed in range(3)], steps=25, frame_every=4)
            await stub.SubmitJob(jpb.SubmitJobRequest(id="md", last=True, simulate=request))
            replies = [reply async for reply in stub.AttachJob(jpb.AttachJobRequest(id="md"))]
            frames = [reply.result.frame for reply in replies if reply.result.HasField("frame")]
            return [(frame.index, frame.step) for frame in frames]

    seen = Counter(asyncio.run(asyncio.wait_for(test(), 60)))
    assert seen == Counter((index, step) for index in range(3) for step in (0, 4, 8, 12, 16, 20, 24, 25))
    # Nor did the next one begin before the time that the failure gave.
    assert begun[2] >= begun[1] + 0.4


def test_jobs_keep_to_limits_that_their_parts_kept_to(bundles: Bundles, tmp_path: Path) -> None:
    """To those of the server and of an identity, also where they were wider when the parts came."""
    (tmp_path / "tokens").write_text("ann: ann-has-this-token\n")
    limits = tmp_path / "limits.toml"
    limits.write_text("[identities.ann]\nrequest_atoms = 30\nrequest_edges = 60\n")
    ann = (("authorization", "Bearer ann-has-this-token"),)

    def config(**words: Any) -> ServeConfig:
        return ServeConfig(
            bundles=(bundles.tiny,),
            port=0,
            metrics_port=None,
            threads=1,
            jobs=JobSettings(folder=tmp_path / "jobs"),
            tokens=tmp_path / "tokens",
            **words,
        )

    def submissions(start: int, systems: Any, *, last: bool) -> list[jpb.SubmitJobRequest]:
        steps = simulating(systems, temperature=30.0, steps=4, seeds=range(start, start + len(systems)))
        relax = part("relax", systems, start=start, last=last, max_steps=4, fmax=1e-6)
        return [relax, jpb.SubmitJobRequest(id="md", start=start, last=last, simulate=steps)]

    async def first() -> None:
        async with inside(config()) as at, grpc.aio.insecure_channel(at.address) as channel:
            stub: Any = JobServiceStub(channel)
            for request in submissions(0, [molecule(seed) for seed in range(12)], last=False):
                await stub.SubmitJob(request, metadata=ann)

    async def second() -> None:
        narrow = config(limits=RequestLimits(request_structures=5, request_atoms=30), identity_limits=limits)
        async with inside(narrow) as at, grpc.aio.insecure_channel(at.address) as channel:
            stub: Any = JobServiceStub(channel)
            for start in (12, 17, 22):
                systems = [molecule(seed) for seed in range(start, start + 5)]
                for request in submissions(start, systems, last=False):
                    await stub.SubmitJob(request, metadata=ann)
            for request in submissions(27, [molecule(27, 24)], last=True):
                await stub.SubmitJob(request, metadata=ann)
            for name in ("relax", "md"):
                replies = stub.AttachJob(jpb.AttachJobRequest(id=name), metadata=ann)
                ends = [
                    reply.result.relaxed if name == "relax" else reply.result.simulated
                    async for reply in replies
                    if reply.result.WhichOneof("kind") in ("relaxed", "simulated")
                ]
                job = await stub.GetJob(get(name), metadata=ann)
                assert (job.state, job.reason, job.n_done) == (jpb.JOB_STATE_DONE, "", 28)
                # One is alone more than one request may be.
                (failed,) = [end for end in ends if end.HasField("failure")]
                assert failed.failure.index == 27
                assert failed.failure.reason == pb.FAILURE_REASON_TOO_LARGE
                assert "the limit of ann is 60" in failed.failure.message
            # A caller's steps, too, are as many requests as it takes.
            relax = part("", [molecule(seed) for seed in range(5)], max_steps=4).relax
            ends = [reply.result async for reply in at.stub.Relax(relax, metadata=ann) if reply.result.steps]
            assert [end.HasField("failure") for end in ends] == [False] * 5

    asyncio.run(asyncio.wait_for(first(), 60))
    asyncio.run(asyncio.wait_for(second(), 60))
