"""Jobs from the client and the command line: fetched once each and in order, whoever ends in between."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms
from ase.io import read, write
from tests.serve.conftest import Bundles, Process, molecule, running
from tests.serve.unreliable import links

from equipot.client import (
    AsyncClient,
    Client,
    Ended,
    InvalidRequest,
    JobFailed,
    JobInfo,
    JobNotFound,
    JobResult,
    Refused,
    RetryPolicy,
)


def frames_of(count: int, n_atoms: int = 0) -> list[Atoms]:
    frames = []
    for seed in range(count):
        system = molecule(seed, n_atoms or 3 + seed % 5)
        frames.append(Atoms(system.atomic_numbers, system.positions, info={"seed": seed}))
    return frames


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "equipot.cli", *map(str, words)]


def equipot(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=120, cwd=folder, env=environment
    )


def positions(frames: Sequence[Atoms]) -> list[Any]:
    return [frame.positions for frame in frames]


def check(found: Sequence[Atoms], frames: Sequence[Atoms]) -> None:
    """Every frame once, in order, moved on, with its own words."""
    assert [frame.info["seed"] for frame in found] == list(range(len(frames)))
    for frame, before in zip(found, frames, strict=True):
        assert (frame.numbers == before.numbers).all()
        assert "equipot_place" not in frame.info
        assert ("equipot_failure" in frame.info) != (frame.calc is not None)
    moved = [not np.allclose(*pair) for pair in zip(positions(found), positions(frames), strict=True)]
    assert sum(moved) > len(frames) / 2


def test_the_client_for_asyncio_has_jobs_too(jobs_server: Process) -> None:
    frames = [*frames_of(6), Atoms()]

    async def test() -> None:
        retry = RetryPolicy(attempts=50, max_delay=0.2)
        async with links(jobs_server.address, 1) as (link,), AsyncClient(link.address, retry=retry) as client:
            sent: list[int] = []
            info = await client.jobs.relax(frames, id="aio-r", fmax=1e-3, on_sent=sent.append)
            again = await client.jobs.relax(frames, id="aio-r", fmax=1e-3)
            assert (info.id, again.n_structures, sent) == ("aio-r", 7, [7])
            with pytest.raises(JobNotFound):
                await client.jobs.get("nobodys")
            told: list[JobInfo] = []
            found: list[JobResult] = []
            async for result in client.jobs.attach("aio-r", on_progress=told.append):
                found.append(result)
                if result.number in (1, 4):
                    link.cut()
            assert [one.number for one in found] == list(range(1, 8))
            assert (await client.jobs.wait("aio-r")).state == told[-1].state == "done"
            await client.jobs.simulate(frames[:2], steps=30, id="aio-m", frame_every=10, temperature=50.0)
            ended = [one.found async for one in client.jobs.attach("aio-m")]
            assert [one.steps for one in ended if isinstance(one, Ended)] == [30, 30]
            assert (await client.jobs.cancel("aio-m")).state == "done"
            await client.jobs.delete("aio-m")
            ids = {info.id for info in await client.jobs.list()}
            assert "aio-r" in ids
            assert "aio-m" not in ids
        with Client(jobs_server.address) as other:
            both = {one.index: one.relaxed for one in other.jobs.attach("aio-r")}
        for one in found:
            np.testing.assert_array_equal(one.relaxed.positions, both[one.index].positions)

    asyncio.run(asyncio.wait_for(test(), 60))


class TestClient:
    def test_submits_and_fetches(self, jobs_server: Process) -> None:
        frames = frames_of(12)
        frames[3].set_constraint(FixAtoms([0]))
        frames[5] = Atoms()
        frames[7] = Atoms("H300", np.arange(900).reshape(-1, 3))
        with Client(jobs_server.address, atoms_per_request=10) as client:
            info = client.jobs.relax(frames, label="a dozen", steps=60)
            assert (info.n_structures, info.label, info.priority) == (12, "a dozen", "low")
            # The same once more is the same job.
            again = client.jobs.relax(frames, id=info.id, label="a dozen", steps=60)
            assert again.id == info.id
            told: list[str] = []
            found = list(client.jobs.attach(info.id, on_progress=lambda info: told.append(info.state)))
            assert told[-1] == "done"
            assert [result.number for result in found] == list(range(1, 13))
            by_index = {result.index: result for result in found}
            there = client.relax([frames[3], frames[4]], steps=60)
            for index, relaxed in zip((3, 4), there, strict=True):
                np.testing.assert_allclose(by_index[index].relaxed.positions, relaxed.positions, atol=1e-6)
            assert (by_index[3].relaxed.positions[0] == frames[3].positions[0]).all()
            for index, words in ((5, "no atoms"), (7, "300 atoms")):
                failure = by_index[index].relaxed.failure
                assert failure is not None
                assert failure.index == index
                assert words in failure.message
            failed = [result for result in found if result.relaxed.failure is not None]
            assert client.jobs.get(info.id).n_failed == len(failed)
            assert client.jobs.wait(info.id).state == "done"
            assert client.jobs.list()[0].id == info.id
            later = [result.number for result in client.jobs.attach(info.id, after=10, follow=False)]
            assert later == [11, 12]
            client.jobs.delete(info.id)
            with pytest.raises(JobNotFound, match=info.id):
                client.jobs.get(info.id)

    def test_what_is_wrong_is_said(self, jobs_server: Process, server: Process) -> None:
        with Client(jobs_server.address) as client:
            with pytest.raises(InvalidRequest, match="fmax"):
                client.jobs.relax(frames_of(1), fmax=-1.0)
            info = client.jobs.relax(frames_of(1), fmax=1e-12, steps=100_000)
            with pytest.raises(Refused, match="other settings"):
                client.jobs.relax(frames_of(1), id=info.id)
            with pytest.raises(JobFailed, match="cancelled"):
                client.jobs.cancel(info.id).raise_for_failure()
        with Client(server.address) as client, pytest.raises(Refused, match="--jobs DIR"):
            client.jobs.list()


def test_the_command_writes_all_in_order(jobs_server: Process, tmp_path: Path) -> None:
    frames = frames_of(20)
    write(tmp_path / "in.extxyz", frames)
    words = ["--address", jobs_server.address, "--fmax", 1e-6, "--steps", 5]
    done = equipot("relax", "in.extxyz", "--job", *words, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "20 ran out of steps" in done.stdout
    check(read(tmp_path / "in-relaxed.extxyz", ":"), frames)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in-relaxed.extxyz", "in.extxyz"]
    (job,) = [word.rstrip(":") for word in done.stdout.split() if word.startswith("relax-")]
    # What the server has suffices, if the file is lost.
    at = ["jobs", "--address", jobs_server.address]
    fetched = equipot(*at, "attach", job, "--out", "again.extxyz", folder=tmp_path)
    assert fetched.returncode == 1, fetched.stderr
    for one, other in zip(
        read(tmp_path / "again.extxyz", ":"), read(tmp_path / "in-relaxed.extxyz", ":"), strict=True
    ):
        np.testing.assert_allclose(one.positions, other.positions)
        assert one.get_potential_energy() == other.get_potential_energy()
    listed = equipot(*at, "list", folder=tmp_path)
    assert job in listed.stdout
    assert "in.extxyz" in listed.stdout
    write(tmp_path / "other.extxyz", frames[::-1])
    wrong = equipot(*at, "attach", job, "--file", "other.extxyz", folder=tmp_path)
    assert wrong.returncode == 2
    assert "was not made of these frames" in wrong.stderr
    assert equipot(*at, "delete", job, folder=tmp_path).returncode == 0
    gone = equipot(*at, "cancel", job, folder=tmp_path)
    assert gone.returncode == 2
    assert "no job" in gone.stderr


@pytest.mark.slow
class TestEnds:
    def test_of_whoever_fetches(self, jobs_server: Process, tmp_path: Path) -> None:
        frames = frames_of(300, 9)
        write(tmp_path / "in.extxyz", frames)
        words = ["relax", "in.extxyz", "--address", jobs_server.address, "--fmax", 0.05, "--job"]
        words += ["--steps", 400]
        partial = tmp_path / "in-relaxed.extxyz.partial"
        for number in (signal.SIGINT, signal.SIGKILL):
            resume = ["--resume"] if number is signal.SIGKILL else []
            before = partial.stat().st_size if partial.exists() else 0
            with subprocess.Popen(
                command(*words, *resume), cwd=tmp_path, stderr=subprocess.PIPE, text=True
            ) as fetching:
                end = time.monotonic() + 60
                while not (partial.exists() and partial.stat().st_size > before + 2_000):
                    assert time.monotonic() < end
                    time.sleep(0.02)
                fetching.send_signal(number)
                _, errors = fetching.communicate(timeout=60)
            if number is signal.SIGINT:
                assert fetching.returncode == 130
                assert "detached: job relax-" in errors
                refused = equipot(*words, folder=tmp_path)
                assert refused.returncode == 2
                assert "--resume goes on with it" in refused.stderr
                others = equipot(*words, "--cell", "full", "--resume", folder=tmp_path)
                assert others.returncode == 2
                assert "was asked for by --fmax 0.05 --steps 400" in others.stderr
        done = equipot(*words, "--resume", folder=tmp_path)
        assert done.returncode in (0, 1), done.stderr
        found = read(tmp_path / "in-relaxed.extxyz", ":")
        assert [frame.info["seed"] for frame in found] == list(range(300))
        with Client(jobs_server.address) as client:
            (job,) = [
                job for job in client.jobs.list() if job.label == "in.extxyz" and job.n_structures == 300
            ]
            whole = sorted(client.jobs.attach(job.id), key=lambda result: result.index)
        for frame, result in zip(found, whole, strict=True):
            failure = result.relaxed.failure
            assert ("equipot_failure" in frame.info) == (failure is not None)
            if failure is None:
                np.testing.assert_allclose(frame.positions, result.relaxed.positions, atol=1e-8)

    def test_of_the_server(self, bundles: Bundles, tmp_path: Path) -> None:
        frames = frames_of(200, 8)
        patient = RetryPolicy(attempts=200, max_delay=0.5)
        words = [bundles.tiny, "--jobs", tmp_path / "jobs", "--threads", 1]
        with running(*words, stderr=tmp_path / "one") as one:
            port = int(one.address.rpartition(":")[2])
            with Client(one.address, retry=patient) as client:
                info = client.jobs.relax(frames, fmax=0.02, steps=200)
                found = []
                attached = client.jobs.attach(info.id)
                found += [next(attached) for _ in range(5)]
                one.popen.kill()
                one.popen.wait()
                with running(*words, port=port, stderr=tmp_path / "two"):
                    found += list(attached)
        assert [result.number for result in found] == list(range(1, 201))
        assert sorted(result.index for result in found) == list(range(200))
