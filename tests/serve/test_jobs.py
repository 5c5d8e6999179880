"""Jobs on a real server: submitted, fetched, ended; whose they are; what a killed server does not lose."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.serve.conftest import Bundles, Process, crystal, molecule, running
from tests.serve.job_helpers import get, part, positions, results

from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.jobs_pb2_grpc import JobServiceStub
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

ENDLESS: dict[str, Any] = {"fmax": 1e-12, "max_steps": 100_000}


def refusal(call: Any, request: Any, **words: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        _finish(call(request, **words))
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), caught.value.details() or ""


def _finish(answer: Any) -> None:
    if hasattr(answer, "cancel"):
        list(answer)


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def attach(stub: JobServiceStub, name: str, **words: Any) -> Any:
    return stub.AttachJob(jpb.AttachJobRequest(id=name, **words), timeout=60)


@pytest.fixture
def server(jobs_server: Process) -> Process:
    return jobs_server


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
        assert (job.n_structures, job.priority) == (5, pb.PRIORITY_LOW)
        found = results(attach(stub, "one"))
        assert sorted(found) == list(range(5))
        for reply in PotentialServiceStub(channel).Relax(part("", systems).relax):
            if reply.HasField("result"):
                there, here = found[reply.result.index].relaxed, reply.result
                assert there.steps == here.steps
                np.testing.assert_allclose(
                    np.frombuffer(there.positions), np.frombuffer(here.positions), atol=1e-7
                )
                assert there.energy == pytest.approx(here.energy, abs=1e-9)
                assert there.model == here.model
        for index, result in found.items():
            assert np.frombuffer(result.atomic_numbers, "<i4").tolist() == list(systems[index].atomic_numbers)
        done = stub.GetJob(get("one"))
        assert (done.state, done.n_done, done.n_results) == (jpb.JOB_STATE_DONE, 5, 5)
        assert done.n_steps == sum(result.relaxed.steps for result in found.values())
        assert done.expires > done.ended > done.created

    def test_holds_atoms_and_moves_cells(self, stub: JobServiceStub) -> None:
        systems = [crystal(seed) for seed in range(3)]
        fixed = np.zeros(24, dtype=np.uint8)
        fixed[[0, 9, 18]] = 1
        stub.SubmitJob(part("cells", systems, cell=pb.CELL_MOTION_FULL, max_steps=8))
        stub.SubmitJob(part("held", systems, fixed=fixed.tobytes(), max_steps=8))
        for result in results(attach(stub, "cells")).values():
            assert len(result.relaxed.stress) == 72
            assert bytes(result.pbc) == b"\1\1\1"
        for index, result in results(attach(stub, "held")).items():
            moved = positions(result).reshape(-1, 3) - systems[index].positions
            assert (moved[index] == 0).all()
            assert (moved[[place for place in range(8) if place != index]] != 0).any()

    def test_of_nothing_is_done(self, stub: JobServiceStub) -> None:
        assert stub.SubmitJob(part("nothing", [])).state == jpb.JOB_STATE_DONE
        assert results(attach(stub, "nothing")) == {}

    def test_bad_structures_cost_the_others_nothing(self, stub: JobServiceStub) -> None:
        bad, empty = molecule(2), molecule(3, 0)
        bad.positions[1] = bad.positions[0]
        request = part("some", [molecule(1), bad, empty, molecule(4, 1), molecule(5)], max_steps=5)
        request.refused.add(index=2, reason=pb.FAILURE_REASON_TOO_LARGE, message="9999 atoms")
        stub.SubmitJob(request)
        found = results(attach(stub, "some"))
        failures = {index: result.relaxed.failure for index, result in found.items()}
        assert sorted(found) == list(range(5))
        assert [bool(failures[index].message) for index in range(5)] == [False, True, True, False, False]
        assert failures[1].index == 1
        assert (failures[2].index, failures[2].message) == (2, "9999 atoms")
        assert stub.GetJob(get("some")).n_failed == 2


class TestParts:
    def test_come_in_order_and_may_be_repeated(self, stub: JobServiceStub) -> None:
        systems = [molecule(seed, 4) for seed in range(150)]
        cuts = [systems[:70], systems[70:80], systems[80:]]
        requests = [
            part("parts", some, start=start, last=start == 80, max_steps=3)
            for start, some in zip((0, 70, 80), cuts, strict=True)
        ]
        # Numbers beyond those of the store, too, and with what is counted from them.
        far = part("parts", systems[:2], start=2**64 - 1, max_steps=3)
        for request, start in ((requests[1], 70), (far, far.start)):
            code, words = refusal(stub.SubmitJob, request)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert f"no structures before number {start}" in words
        for request in (requests[0], requests[0]):
            job = stub.SubmitJob(request)
            assert (job.state, job.n_structures) == (jpb.JOB_STATE_RECEIVING, 70)
        for request in (requests[2], far):
            code, words = refusal(stub.SubmitJob, request)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "has 70 structures" in words
        for request in (requests[1], requests[2], requests[0], requests[2]):
            job = stub.SubmitJob(request)
        assert job.n_structures == 150
        found = results(attach(stub, "parts"))
        assert sorted(found) == list(range(150))
        for index, result in found.items():
            assert np.frombuffer(result.atomic_numbers, "<i4").tolist() == list(systems[index].atomic_numbers)
        # And once more, when all is over.
        assert stub.SubmitJob(requests[2]).state == jpb.JOB_STATE_DONE

    def test_of_another_job_are_refused(self, stub: JobServiceStub) -> None:
        first = part("mine", [molecule(1)], last=False)
        stub.SubmitJob(first)
        for other, what in (
            (part("mine", [molecule(2)], last=False), "other structures from 0"),
            (part("mine", [molecule(1)], last=False, fmax=0.3), "other settings"),
            (part("mine", [molecule(1)], last=True), "other structures from 0"),
        ):
            code, words = refusal(stub.SubmitJob, other)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert what in words
        stub.DeleteJob(jpb.DeleteJobRequest(id="mine"))

    @pytest.mark.parametrize(
        ("change", "code", "words"),
        [
            ({"id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "1 to 64 letters"),
            ({"id": "../../etc"}, grpc.StatusCode.INVALID_ARGUMENT, "1 to 64 letters"),
            ({"label": "x" * 300}, grpc.StatusCode.INVALID_ARGUMENT, "label"),
            ({"relax": {"fmax": -1.0}}, grpc.StatusCode.INVALID_ARGUMENT, "fmax is -1"),
            ({"relax": {"fixed": b"\1"}}, grpc.StatusCode.INVALID_ARGUMENT, "fixed: has 1 bytes"),
            ({"relax": {"model": "none"}}, grpc.StatusCode.NOT_FOUND, "none"),
            ({"relax": {"cell": 2}}, grpc.StatusCode.INVALID_ARGUMENT, "not periodic"),
            ({"refused": [pb.Failure(index=0)]}, grpc.StatusCode.INVALID_ARGUMENT, "no atoms"),
        ],
    )
    def test_that_are_wrong_make_no_job(
        self, stub: JobServiceStub, change: dict[str, Any], code: grpc.StatusCode, words: str
    ) -> None:
        request = part("wrong", [molecule(1)])
        for name, value in change.pop("relax", {}).items():
            setattr(request.relax, name, value)
        request.refused.extend(change.pop("refused", []))
        for name, value in change.items():
            setattr(request, name, value)
        found, details = refusal(stub.SubmitJob, request)
        assert (found, words in details) == (code, True), details
        assert refusal(stub.GetJob, get("wrong"))[0] is grpc.StatusCode.NOT_FOUND


class TestAttached:
    def test_goes_on_behind_what_one_has(self, stub: JobServiceStub) -> None:
        stub.SubmitJob(part("cursor", [molecule(seed) for seed in range(20)], max_steps=5))
        whole = results(attach(stub, "cursor"))
        order = sorted(whole, key=lambda index: whole[index].number)
        later = results(attach(stub, "cursor", after=13))
        assert sorted(later, key=lambda index: later[index].number) == order[13:]
        assert all(later[index] == whole[index] for index in later)
        assert results(attach(stub, "cursor", after=20)) == {}
        code, words = refusal(stub.AttachJob, jpb.AttachJobRequest(id="cursor", after=21))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "20 results" in words

    def test_watches_until_it_is_cancelled(self, stub: JobServiceStub) -> None:
        done, endless = [molecule(seed) for seed in range(3)], [molecule(seed) for seed in range(3, 6)]
        stub.SubmitJob(part("watched", done, last=False, **ENDLESS))
        job = stub.SubmitJob(part("watched", endless, start=3, **ENDLESS))
        until(lambda: stub.GetJob(get("watched")).state == jpb.JOB_STATE_RUNNING)
        assert results(attach(stub, "watched", now=True)) == {}
        told: list[jpb.Job] = []

        def watch() -> None:
            told.extend(reply.job for reply in attach(stub, "watched") if reply.HasField("job"))

        watching = threading.Thread(target=watch)
        watching.start()
        until(lambda: bool(told))
        assert stub.CancelJob(jpb.CancelJobRequest(id="watched")).state == jpb.JOB_STATE_CANCELLED
        watching.join(20)
        assert not watching.is_alive()
        assert told[-1].state == jpb.JOB_STATE_CANCELLED
        assert stub.CancelJob(jpb.CancelJobRequest(id="watched")).state == jpb.JOB_STATE_CANCELLED
        assert job.n_structures == 6

    def test_is_told_when_its_job_is_deleted(self, stub: JobServiceStub) -> None:
        stub.SubmitJob(part("gone", [molecule(1)], **ENDLESS))
        threading.Timer(1.0, stub.DeleteJob, [jpb.DeleteJobRequest(id="gone")]).start()
        code, words = refusal(stub.AttachJob, jpb.AttachJobRequest(id="gone"), timeout=20)
        assert code is grpc.StatusCode.NOT_FOUND
        assert "no job 'gone'" in words
        assert "gone" not in [job.id for job in stub.ListJobs(jpb.ListJobsRequest()).jobs]

    def test_others_go_first(self, stub: JobServiceStub, channel: grpc.Channel, server: Process) -> None:
        stub.SubmitJob(part("crowd", [molecule(seed, 12) for seed in range(200)], **ENDLESS))
        until(lambda: stub.GetJob(get("crowd")).n_moving == 200)
        answer = list(PotentialServiceStub(channel).Relax(part("", [molecule(1)]).relax, timeout=30))
        assert answer[-1].HasField("result")
        assert server.sample("equipot_jobs", state="open") >= 1
        stub.DeleteJob(jpb.DeleteJobRequest(id="crowd"))
        until(lambda: not server.sample("equipot_moving_structures"))

    def test_what_comes_to_its_end_is_counted(self, stub: JobServiceStub, server: Process) -> None:
        before = server.sample("equipot_job_structures_total", outcome="ok")
        stub.SubmitJob(part("counted", [molecule(1), molecule(2)], max_steps=2))
        until(lambda: server.sample("equipot_job_structures_total", outcome="ok") == before + 2)


@pytest.mark.slow
def test_a_server_without_a_folder_knows_no_jobs(bundles: Bundles, tmp_path: Path) -> None:
    with (
        running(bundles.tiny, stderr=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert refusal(JobServiceStub(channel).GetJob, get("x"))[0] is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.slow
class TestIdentities:
    def test_know_their_own_jobs_alone(self, bundles: Bundles, tmp_path: Path) -> None:
        tokens, settings = tmp_path / "tokens", tmp_path / "serve.toml"
        secrets = {name: name * 12 for name in ("ann", "bob")}
        tokens.write_text(
            "".join(
                f"{name}: sha256:{sha256(secret.encode()).hexdigest()}\n" for name, secret in secrets.items()
            )
        )
        ann, bob = ((("authorization", f"Bearer {secret}"),) for secret in secrets.values())
        settings.write_text(
            f'[jobs]\nfolder = "{tmp_path}/jobs"\nidentity_jobs = 2\nidentity_bytes = 20_000\n'
        )
        words = ["--config", settings, "--tokens", tokens]
        with (
            running(bundles.tiny, *words, stderr=tmp_path / "log") as server,
            grpc.insecure_channel(server.address) as channel,
        ):
            stub = JobServiceStub(channel)
            stub.SubmitJob(part("job", [molecule(1)], max_steps=2), metadata=ann)
            for call, request in (
                (stub.GetJob, get("job")),
                (stub.AttachJob, jpb.AttachJobRequest(id="job")),
                (stub.CancelJob, jpb.CancelJobRequest(id="job")),
                (stub.DeleteJob, jpb.DeleteJobRequest(id="job")),
            ):
                assert refusal(call, request, metadata=bob)[0] is grpc.StatusCode.NOT_FOUND
                assert refusal(call, request)[0] is grpc.StatusCode.UNAUTHENTICATED
            assert not stub.ListJobs(jpb.ListJobsRequest(), metadata=bob).jobs
            # The same name is another job.
            stub.SubmitJob(part("job", [molecule(2), molecule(3)], max_steps=2), metadata=bob)
            found = results(stub.AttachJob(jpb.AttachJobRequest(id="job"), metadata=bob, timeout=30))
            assert len(found) == 2
            stub.SubmitJob(part("second", [molecule(1)], max_steps=2), metadata=ann)
            code, words_of = refusal(stub.SubmitJob, part("third", [molecule(1)]), metadata=ann)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "the limit is 2" in words_of
            crowd = [molecule(seed, 60) for seed in range(20)]
            code, words_of = refusal(stub.SubmitJob, part("large", crowd), metadata=bob)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "MiB" in words_of
            # What is left out of a job that was refused is nothing.
            assert [job.id for job in stub.ListJobs(jpb.ListJobsRequest(), metadata=bob).jobs] == ["job"]


def stopped(server: Process, number: signal.Signals) -> None:
    server.popen.send_signal(number)
    server.popen.wait(timeout=30)


@pytest.mark.slow
class TestAServerThatEnds:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_goes_on_where_it_was(self, bundles: Bundles, tmp_path: Path, number: signal.Signals) -> None:
        systems = [molecule(seed, 3 + seed % 9) for seed in range(60)]
        settings = tmp_path / "serve.toml"
        settings.write_text(f'[jobs]\nfolder = "{tmp_path}/jobs"\nsave_seconds = 0.3\n')
        words = [bundles.tiny, "--config", settings, "--dtype", "float64", "--threads", 1]
        request = part("long", systems, fmax=1e-3, max_steps=400)
        with running(*words, stderr=tmp_path / "one") as one:
            with grpc.insecure_channel(one.address) as channel:
                stub = JobServiceStub(channel)
                stub.SubmitJob(request)
                until(lambda: stub.GetJob(get("long")).n_done >= 5)
                time.sleep(0.5)
            early = one.sample("equipot_structures_total", outcome="ok")
            stopped(one, number)
            assert not one.tracebacks()
        with running(*words, stderr=tmp_path / "two") as two:
            with grpc.insecure_channel(two.address) as channel:
                stub = JobServiceStub(channel)
                before = stub.GetJob(get("long"))
                assert before.n_done < 60, "it was over before it could be stopped: make it longer"
                found = results(attach(stub, "long"))
                assert stub.GetJob(get("long")).state == jpb.JOB_STATE_DONE
                late = two.sample("equipot_structures_total", outcome="ok")
                stub.SubmitJob(part("again", systems, fmax=1e-3, max_steps=400))
                expected = results(attach(stub, "again"))
            whole = two.sample("equipot_structures_total", outcome="ok") - late
        assert sorted(found) == sorted(expected) == list(range(60))
        for index, result in found.items():
            assert result.relaxed.steps == expected[index].relaxed.steps
            np.testing.assert_allclose(positions(result), positions(expected[index]), atol=1e-6)
        # Steps that were saved were not taken again: those of some tenths of a second may have been.
        assert late < whole
        assert early + late < 1.5 * whole

    def test_waits_for_a_bundle_that_is_gone(
        self, bundles: Bundles, three: tuple[Path, Path, Path], tmp_path: Path
    ) -> None:
        words = ["--jobs", tmp_path / "jobs", "--threads", 1]
        with running(bundles.tiny, *words, stderr=tmp_path / "one") as server:
            with grpc.insecure_channel(server.address) as channel:
                stub = JobServiceStub(channel)
                stub.SubmitJob(part("bound", [molecule(1)], **ENDLESS))
                stub.SubmitJob(part("short", [molecule(1)], start=0, last=False, max_steps=2))
            stopped(server, signal.SIGKILL)
        with running(three[0], *words, stderr=tmp_path / "two") as server:
            with grpc.insecure_channel(server.address) as channel:
                stub = JobServiceStub(channel)
                until(lambda: stub.GetJob(get("bound")).state == jpb.JOB_STATE_WAITING)
                assert "no model 'tiny@sha256:" in stub.GetJob(get("bound")).reason
                code, _ = refusal(stub.SubmitJob, part("short", [molecule(2)], start=1, max_steps=2))
                assert code is grpc.StatusCode.NOT_FOUND
            stopped(server, signal.SIGTERM)
        with (
            running(bundles.tiny, *words, stderr=tmp_path / "three") as server,
            grpc.insecure_channel(server.address) as channel,
        ):
            stub = JobServiceStub(channel)
            until(lambda: stub.GetJob(get("bound")).state == jpb.JOB_STATE_RUNNING)
            stub.SubmitJob(part("short", [molecule(2)], start=1, max_steps=2))
            assert len(results(attach(stub, "short"))) == 2

    def test_two_do_not_share_a_folder(self, bundles: Bundles, tmp_path: Path) -> None:
        words = [bundles.tiny, "--jobs", tmp_path / "jobs"]
        with running(*words, stderr=tmp_path / "one") as one:
            with (
                pytest.raises(pytest.fail.Exception, match="belong to a server that runs") as caught,
                running(*words, stderr=tmp_path / "two"),
            ):
                pass
            assert str(one.popen.pid) in str(caught.value)
            assert "Traceback" not in str(caught.value)

    @pytest.mark.parametrize("harm", ["text", "middle"])
    def test_a_damaged_store_is_named(self, bundles: Bundles, tmp_path: Path, harm: str) -> None:
        folder = tmp_path / "jobs"
        with running(bundles.tiny, "--jobs", folder, stderr=tmp_path / "one") as server:
            with grpc.insecure_channel(server.address) as channel:
                stub = JobServiceStub(channel)
                stub.SubmitJob(part("some", [molecule(seed) for seed in range(40)], max_steps=2))
                assert len(results(attach(stub, "some"))) == 40
            stopped(server, signal.SIGTERM)
        file = folder / "jobs.sqlite"
        raw = bytearray(file.read_bytes())
        if harm == "text":
            raw = bytearray(b"these are no jobs" * 400)
        else:
            raw[4096 : len(raw) // 2] = b"\xaa" * (len(raw) // 2 - 4096)
        file.write_bytes(raw)
        with (
            pytest.raises(pytest.fail.Exception, match="damaged") as caught,
            running(bundles.tiny, "--jobs", folder, stderr=tmp_path / "two"),
        ):
            pass
        assert str(file) in str(caught.value)
        assert "Traceback" not in str(caught.value)
