"""Dynamics as jobs: every frame once and in order, whoever ends in between; no bit lost by a restart."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms
from ase.io import read, write
from tests.serve.conftest import Bundles, Process, arrays, inside, molecule, running
from tests.serve.job_helpers import get
from tests.serve.test_jobs import attach, refusal, stopped, until
from tests.serve.test_jobs_client import command, equipot, frames_of

from equipot.client import Client, InvalidRequest
from equipot.client.dynamics import Ended, MotionFrame, Observation
from equipot.serve.config import ServeConfig
from equipot.serve.jobs.desk import Desk
from equipot.serve.jobs.kinds import room_for
from equipot.serve.jobs.records import Move, StoreFull
from equipot.serve.jobs.settings import JobSettings
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import encode_structures
from equipot.wire.v1.jobs_pb2_grpc import JobServiceStub
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

ENDLESS = 1_000_000


def asked(which: Any, **fields: Any) -> pb.SimulateRequest:
    words = {"model": "tiny", "steps": 25, "temperature": 200.0, "timestep": 0.5, "frame_every": 4, **fields}
    structures = encode_structures(arrays([molecule(seed, 3 + seed % 4) for seed in which]))
    return pb.SimulateRequest(structures=structures, **words)


def submission(name: str, which: Any, **fields: Any) -> jpb.SubmitJobRequest:
    return jpb.SubmitJobRequest(id=name, last=True, simulate=asked(which, **fields))


def told(replies: Any) -> tuple[dict[int, list[Any]], dict[int, pb.SimulateResult]]:
    """Frames in the order in which they came, and how each structure ended, by index; numbered one by one."""
    frames: dict[int, list[Any]] = defaultdict(list)
    ends: dict[int, pb.SimulateResult] = {}
    last = None
    for reply in replies:
        if not reply.HasField("result"):
            continue
        result = reply.result
        assert last is None or result.number == last + 1
        last = result.number
        assert result.index not in ends, "nothing comes behind the end"
        if result.HasField("simulated"):
            ends[result.index] = result.simulated
        else:
            assert result.frame.index == result.index
            frames[result.index].append(result.frame)
    return frames, ends


def steps(frames: list[Any]) -> list[int]:
    return [frame.step for frame in frames]


class TestOne:
    def test_brings_what_a_call_brings(self, jobs_server: Process) -> None:
        with grpc.insecure_channel(jobs_server.address) as channel:
            stub = JobServiceStub(channel)
            request = submission("md", range(5), integrator=pb.INTEGRATOR_LANGEVIN, frame_forces=True)
            job = stub.SubmitJob(request)
            assert (job.kind, job.priority, job.n_steps_asked) == ("simulate", pb.PRIORITY_LOW, 125)
            frames, ends = told(attach(stub, "md"))
            assert sorted(ends) == list(range(5))
            assert all(end.steps == 25 and not end.HasField("failure") for end in ends.values())
            expected: dict[int, list[Any]] = defaultdict(list)
            for reply in PotentialServiceStub(channel).Simulate(request.simulate):
                if reply.HasField("frame"):
                    expected[reply.frame.index].append(reply.frame)
            for index, found in frames.items():
                assert steps(found) == [0, 4, 8, 12, 16, 20, 24, 25]
                for one, other in zip(found, expected[index], strict=True):
                    assert one.step == other.step
                    for name in ("positions", "velocities", "forces"):
                        np.testing.assert_allclose(
                            np.frombuffer(getattr(one, name)), np.frombuffer(getattr(other, name)), atol=1e-7
                        )
            done = stub.GetJob(get("md"))
            assert (done.state, done.n_done, done.n_results) == (jpb.JOB_STATE_DONE, 5, 45)
            assert done.n_steps == 125
            later, rest = told(attach(stub, "md", after=40))
            assert sum(map(len, later.values())) + len(rest) == 5

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ({"steps": 0}, "steps is 0"),
            ({"timestep": -1.0}, "timestep is -1"),
            ({"friction": 0.1}, "velocity_verlet has none"),
            ({"integrator": pb.INTEGRATOR_MTK}, "not periodic"),
            ({"seeds": [1, 2, 3]}, "seeds has 3 entries for 2 structures"),
            ({"velocities": b"12345678"}, "velocities"),
            ({"masses": b"12345678"}, "masses"),
            ({"integrator": 99}, "no integrator"),
        ],
    )
    def test_bad_settings_are_refused_as_by_a_call(
        self, jobs_server: Process, words: dict[str, Any], said: str
    ) -> None:
        request = submission("wrong", range(2), **words)
        with grpc.insecure_channel(jobs_server.address) as channel:
            stub = JobServiceStub(channel)
            found = refusal(stub.SubmitJob, request)
            assert found[0] is grpc.StatusCode.INVALID_ARGUMENT
            assert said in found[1]
            assert refusal(PotentialServiceStub(channel).Simulate, request.simulate) == found
            assert refusal(stub.GetJob, get("wrong"))[0] is grpc.StatusCode.NOT_FOUND

    def test_ends_when_it_is_cancelled_or_deleted(self, jobs_server: Process) -> None:
        with grpc.insecure_channel(jobs_server.address) as channel:
            stub = JobServiceStub(channel)
            stub.SubmitJob(submission("long", range(3), steps=ENDLESS))
            until(lambda: stub.GetJob(get("long")).n_results > 20)
            assert stub.GetJob(get("long")).n_steps_moving > 0
            ended = stub.CancelJob(jpb.CancelJobRequest(id="long"))
            assert ended.state == jpb.JOB_STATE_CANCELLED
            frames, ends = told(attach(stub, "long"))
            assert not ends
            for found in frames.values():
                assert steps(found) == list(range(0, 4 * len(found), 4))
            stub.DeleteJob(jpb.DeleteJobRequest(id="long"))
            assert refusal(stub.GetJob, get("long"))[0] is grpc.StatusCode.NOT_FOUND


def test_room_is_set_aside_for_every_frame(bundles: Bundles, tmp_path: Path) -> None:
    few, many = asked(range(3), frame_every=0), asked(range(3), frame_every=1, steps=10_000)
    n_atoms = sum(few.structures.n_atoms)
    assert room_for(many, 0) > 10_001 * n_atoms * 52 > 1_000 * room_for(few, 0)
    jobs = JobSettings(folder=tmp_path / "jobs", identity_bytes=100_000)
    config = ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1, jobs=jobs)

    async def test() -> None:
        async with inside(config) as at, grpc.aio.insecure_channel(at.address) as channel:
            stub: Any = JobServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError, match="ask for less"):
                await stub.SubmitJob(jpb.SubmitJobRequest(id="many", last=True, simulate=many))
            await stub.SubmitJob(jpb.SubmitJobRequest(id="few", last=True, simulate=few))
            frames, ends = told([reply async for reply in stub.AttachJob(jpb.AttachJobRequest(id="few"))])
            assert [steps(frames[index]) for index in range(3)] == [[25]] * 3
            assert len(ends) == 3
            # What is set aside is no less than what came of it.
            record = await stub.GetJob(get("few"))
            assert record.bytes > sum(frame.ByteSize() for found in frames.values() for frame in found)

    asyncio.run(asyncio.wait_for(test(), 60))


class TestClient:
    def test_velocities_and_masses_have_room_in_its_messages(self, jobs_server: Process) -> None:
        frames = frames_of(25, 60)
        for frame in frames:
            frame.set_masses([2.0] * 60)
            frame.set_momenta(np.full((60, 3), 0.3))
        # The positions alone would go in one.
        with Client(jobs_server.address, max_message_bytes=2**16) as client:
            sent: list[int] = []
            client.jobs.simulate(frames, steps=10**6, timestep=0.1, id="wide", on_sent=sent.append)
            client.jobs.delete("wide")
        assert len(sent) > 1
        assert sent[-1] == 25

    def test_submits_and_fetches(self, jobs_server: Process) -> None:
        frames = frames_of(6)
        frames[0].set_constraint(FixAtoms([0]))
        frames[1].set_momenta(np.full((len(frames[1]), 3), 0.3))
        frames[2] = Atoms()
        frames[4].set_masses([2.0] * len(frames[4]))
        words: Any = {
            "steps": 12,
            "temperature": 100.0,
            "timestep": 0.2,
            "frame_every": 5,
            "observe_every": 6,
        }
        with Client(jobs_server.address) as client:
            info = client.jobs.simulate(frames, id="six", **words)
            assert (info.kind, info.n_steps_asked, info.priority) == ("simulate", 72, "low")
            # The same once more is the same job: its seeds are no others.
            assert client.jobs.simulate(frames, id="six", **words).id == "six"
            found = list(client.jobs.attach("six"))
            assert client.jobs.get("six").n_failed == 1
            there = client.simulate(frames, seed=[_seed(found, index) for index in range(6)], **words)
            assert len({_seed(found, index) for index in range(6)}) == 6
            for index, trajectory in enumerate(there):
                own = [result for result in found if result.index == index]
                ended = own[-1].found
                assert isinstance(ended, Ended)
                if index == 2:
                    assert ended.failure is not None
                    assert ended.failure.index == 2
                    assert len(own) == 1
                    continue
                assert (ended.failure, ended.steps) == (None, 12)
                moved = [result.found for result in own if isinstance(result.found, MotionFrame)]
                assert [frame.step for frame in moved] == [0, 5, 10, 12]
                seen = [result.found for result in own if isinstance(result.found, Observation)]
                assert [one.step for one in seen] == [0, 6, 12]
                for one, other in zip(moved, trajectory.frames, strict=True):
                    np.testing.assert_allclose(one.positions, other.positions, atol=1e-7)
                    np.testing.assert_allclose(one.velocities, other.velocities, atol=1e-7)
                assert (own[0].atomic_numbers == frames[index].numbers).all()
            still = [result.found for result in found if result.index == 0]
            assert all(
                (one.positions[0] == frames[0].positions[0]).all()
                for one in still
                if isinstance(one, MotionFrame)
            )
            with pytest.raises(TypeError, match="look at `found`"):
                _ = found[0].relaxed
            with pytest.raises(InvalidRequest, match="velocity_verlet has none"):
                client.jobs.simulate(frames, **words, friction=0.1)
            long = client.jobs.simulate(frames[:1], steps=1, timestep=20.0)
            assert "20 fs is long" in long.warnings[0]


def _seed(found: Any, index: int) -> int:
    (ended,) = (one.found for one in found if one.index == index and isinstance(one.found, Ended))
    return ended.seed


class TestCommand:
    def test_writes_what_a_run_without_a_job_writes(self, jobs_server: Process, tmp_path: Path) -> None:
        frames = frames_of(3)
        write(tmp_path / "in.extxyz", frames)
        words = ["--address", jobs_server.address, "--steps", 20, "--timestep", 0.2, "--temperature", 100]
        # Of molecules, which have none.
        words += ["--seed", 5, "--frame-every", 6, "--stress"]
        done = equipot("md", "in.extxyz", "--job", "--out", "job.extxyz", *words, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "3 of 3 moved" in done.stdout
        assert equipot("md", "in.extxyz", "--out", "run.extxyz", *words, folder=tmp_path).returncode == 0
        (job,) = [word.rstrip(":") for word in done.stdout.split() if word.startswith("md-")]
        at = ["jobs", "--address", jobs_server.address, "attach", job]
        assert equipot(*at, "--out", "again.extxyz", folder=tmp_path).returncode == 0
        for place in range(3):
            one, other, again = (
                read(tmp_path / f"{name}-{place}.extxyz", ":") for name in ("job", "run", "again")
            )
            assert [frame.info["equipot_step"] for frame in one] == [0, 6, 12, 18, 20]
            assert one[0].info["seed"] == place
            assert "stress" not in one[0].calc.results
            seen = (tmp_path / f"job-{place}.extxyz.csv").read_text().splitlines()
            assert [line.split(",")[0] for line in seen[1:]] == ["0", "10", "20"]
            assert "nan" not in "".join(seen)
            for first, second, third in zip(one, other, again, strict=True):
                np.testing.assert_allclose(first.positions, second.positions, atol=1e-6)
                assert (first.positions == third.positions).all()
                assert first.info["equipot_step"] == third.info["equipot_step"]
        assert not list(tmp_path.glob("*.job*")) + list(tmp_path.glob("*.token*"))

    def test_what_is_refused_leaves_nothing(self, jobs_server: Process, tmp_path: Path) -> None:
        write(tmp_path / "in.extxyz", frames_of(1))
        words = ["--address", jobs_server.address, "--steps", 5, "--friction", 0.1, "--job"]
        done = equipot("md", "in.extxyz", *words, folder=tmp_path)
        assert done.returncode == 2
        assert "velocity_verlet has none" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["in.extxyz"]

    def test_detaches_and_comes_back(self, jobs_server: Process, tmp_path: Path) -> None:
        write(tmp_path / "in.extxyz", frames_of(1))
        words = ["--address", jobs_server.address, "--steps", 1500, "--timestep", 0.1, "--temperature", 50]
        words += ["--frame-every", 3, "--job", "--out", "out.extxyz"]
        out, begun = tmp_path / "out.extxyz", [*command("md", "in.extxyz"), *map(str, words)]
        with subprocess.Popen(begun, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            until(lambda: out.exists() and out.read_bytes().count(b"equipot_step") > 10)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert "detached: job md-" in errors
        assert "attach md-" in errors
        early = out.read_bytes().count(b"equipot_step")
        assert early < 501
        refused = equipot("md", "in.extxyz", *words, folder=tmp_path)
        assert refused.returncode == 2
        assert "--resume goes on with it" in refused.stderr
        # Torn by a crash, and part of what was fetched is gone: neither lost nor there twice.
        out.write_bytes(out.read_bytes()[:-200])
        done = equipot("md", "in.extxyz", *words, "--resume", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [frame.info["equipot_step"] for frame in read(out, ":")] == list(range(0, 1501, 3))


def test_an_older_way_is_never_written_behind_a_newer_move() -> None:
    """A way that could not be written must not come after a move with results that came meanwhile."""
    written: list[list[Move]] = []
    broken = [True]
    loop: Any = None
    come: Any = None
    arrived: Any = None

    class Paper:
        def advance(self, moves: dict[int, list[Move]]) -> dict[int, Any]:
            if broken.pop() if broken else False:
                # It comes while the disk is waited for.
                loop.call_soon_threadsafe(lambda: come.set_result(None))
                arrived.result(10)
                raise StoreFull("for a moment")
            written.extend(moves.values())
            return {}

        def close(self) -> None:
            pass

    async def test() -> None:
        nonlocal loop, come, arrived
        loop, come = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        desk = Desk(Paper(), save_seconds=1.0, on_written=lambda record: None)  # type: ignore[arg-type]

        async def bring() -> None:
            await come
            await desk.note(1, Move(place=0, results=(b"frame",), walk=b"newer"))

        arrived = asyncio.run_coroutine_threadsafe(bring(), loop)
        await desk.note(1, Move(place=0, walk=b"older"))
        with pytest.raises(StoreFull):
            await desk.write(ways=True)
        await desk.write(ways=True)
        # Nor one that waited when it came.
        await desk.note(1, Move(place=0, walk=b"old"))
        await desk.note(1, Move(place=0, results=(b"frame",), walk=b"new"))
        await desk.close()

    asyncio.run(asyncio.wait_for(test(), 30))
    assert [[move.walk for move in moves] for moves in written] == [[b"newer"], [b"new"]]


@pytest.mark.slow
def test_a_killed_server_goes_on_with_every_bit(bundles: Bundles, tmp_path: Path) -> None:
    """Killed twice: frames are those of a job that nothing stopped, numbered and each once."""
    settings = tmp_path / "serve.toml"
    settings.write_text(f'[jobs]\nfolder = "{tmp_path}/jobs"\nsave_seconds = 0.3\n')
    words = [bundles.tiny, "--config", settings, "--dtype", "float64", "--threads", 1]
    how: dict[str, Any] = {"integrator": pb.INTEGRATOR_LANGEVIN, "steps": 2_000, "frame_every": 7}
    how |= {"timestep": 0.1, "temperature": 50.0}
    before: list[bytes] = []
    for end in (True, True, False):
        with (
            running(*words, stderr=tmp_path / f"log-{len(before)}") as server,
            grpc.insecure_channel(server.address) as channel,
        ):
            stub = JobServiceStub(channel)
            stub.SubmitJob(submission("long", range(6), **how))
            had = stub.GetJob(get("long")).n_results
            assert had >= len(before)
            if end:
                enough = had + 200
                until(lambda: stub.GetJob(get("long")).n_results > enough, 60)  # noqa: B023
            kept = [
                reply.result.SerializeToString(deterministic=True)
                for reply in attach(stub, "long", now=end)
                if reply.HasField("result")
            ]
            # What anybody was given keeps its number and its bits.
            assert kept[: len(before)] == before
            before = kept
            if end:
                assert stub.GetJob(get("long")).n_done == 0, "it was over before it could be stopped"
                stopped(server, signal.SIGKILL)
                continue
            frames, ends = told(attach(stub, "long"))
            stub.SubmitJob(submission("whole", range(6), **how))
            expected, expected_ends = told(attach(stub, "whole"))
    assert sorted(ends) == list(range(6))
    for index in range(6):
        # What flies apart does so at the same step.
        assert ends[index] == expected_ends[index]
        assert frames[index] == expected[index]
        taken = ends[index].steps
        assert steps(frames[index]) == [*range(0, taken + 1, 7), *([2_000] if taken == 2_000 else [])]
    assert 2_000 in [end.steps for end in ends.values()]
