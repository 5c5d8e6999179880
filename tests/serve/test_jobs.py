"""Jobs on a real server: submitted, fetched, ended; whose they are; what a killed server does not lose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from tests.serve.conftest import Bundles, Process, arrays, molecule, running

from equipot.model.batch import System
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import encode_structures
from equipot.wire.v1.jobs_pb2_grpc import JobServiceStub
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub


def part(name: str, systems: list[System], *, start: int = 0, last: bool = True, **fields: Any) -> Any:
    words = {"model": "tiny", "fmax": 0.02, "max_steps": 40, **fields}
    relax = pb.RelaxRequest(structures=encode_structures(arrays(systems)), **words)
    return jpb.SubmitJobRequest(id=name, start=start, last=last, relax=relax)


def results(replies: Any) -> dict[int, jpb.JobResult]:
    """By index; each once, numbered in order."""
    found: dict[int, jpb.JobResult] = {}
    numbers = []
    for reply in replies:
        if reply.HasField("result"):
            assert reply.result.index not in found
            found[reply.result.index] = reply.result
            numbers.append(reply.result.number)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    return found


@pytest.fixture(scope="module")
def server(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("jobs")
    words = [bundles.tiny, "--dtype", "float64", "--threads", 1, "--jobs", folder / "jobs"]
    with running(*words, stderr=folder / "log") as process:
        yield process


@pytest.fixture
def channel(server: Process) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> JobServiceStub:
    return JobServiceStub(channel)


class TestOne:
    def test_finds_what_a_call_finds(self, stub: JobServiceStub, channel: grpc.Channel) -> None:
        systems = [molecule(seed, n_atoms) for seed, n_atoms in enumerate((3, 6, 9, 4, 7))]
        job = stub.SubmitJob(part("one", systems))
        assert job.n_structures == 5
        found = results(stub.AttachJob(jpb.AttachJobRequest(id="one")))
        assert sorted(found) == list(range(5))
        request = part("one", systems).relax
        for reply in PotentialServiceStub(channel).Relax(request):
            there, here = found[reply.result.index].relaxed, reply.result
            assert there.steps == here.steps
            np.testing.assert_allclose(
                np.frombuffer(there.positions), np.frombuffer(here.positions), atol=1e-7
            )
            assert there.energy == pytest.approx(here.energy, abs=1e-9)
        for index, result in found.items():
            assert np.frombuffer(result.atomic_numbers, "<i4").tolist() == list(systems[index].atomic_numbers)
        done = stub.GetJob(jpb.GetJobRequest(id="one"))
        assert (done.state, done.n_done, done.n_results) == (jpb.JOB_STATE_DONE, 5, 5)
