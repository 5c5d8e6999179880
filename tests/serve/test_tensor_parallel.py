"""A model spread over real ranks of a real process group, behind a real port."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import grpc
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from equipot.serve import rank
from equipot.serve import ranks as ranks_module
from equipot.serve.pace import Pace, Size
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

from .conftest import Bundles, Process, ask, crystal, launch, molecule, read, running

ROOMY = ("--max-batch-edges", 1_000_000)
SYSTEMS = [molecule(1), crystal(2), molecule(3, 9), crystal(4, 12)]


@pytest.fixture(scope="module")
def spread(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("spread")
    mine = [shutil.copytree(bundle, folder / bundle.name) for bundle in (bundles.tiny, bundles.direct)]
    words = [*mine, "--dtype", "float64", "--tensor-parallel", 2, *ROOMY]
    with running(*words, stderr=folder / "log") as process:
        yield process
        mine = ranks(process)
        process.popen.terminate()
        assert process.popen.wait(30) == 0
        assert not left_of(mine)


def ranks(process: Process) -> list[psutil.Process]:
    found = psutil.Process(process.popen.pid).children(recursive=True)
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


def left_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    alive: list[psutil.Process] = psutil.wait_procs(processes, timeout=20)[1]
    return alive


def starve(starved: list[psutil.Process]) -> None:
    """Bounds their address space to little more than they have."""
    for one in starved:
        most = one.memory_info().vms + 2**20
        one.rlimit(psutil.RLIMIT_AS, (most, most))


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("model", "properties"),
    [
        ("tiny", [pb.PROPERTY_ENERGY, pb.PROPERTY_FORCES, pb.PROPERTY_STRESS]),
        ("direct", [pb.PROPERTY_ENERGY, pb.PROPERTY_FORCES]),
    ],
)
def test_two_ranks_answer_as_one_process_does(
    server: Process, spread: Process, model: str, properties: list[pb.Property.ValueType]
) -> None:
    level = "PBE"
    request = ask(SYSTEMS, *properties, model=model, level_of_theory=level)
    answers = []
    for process in (server, spread):
        with grpc.insecure_channel(process.address) as channel:
            answers.append(PotentialServiceStub(channel).Predict(request, timeout=60))
    assert [answer.model.tensor_parallel for answer in answers] == [1, 2]
    assert answers[0].model.digest == answers[1].model.digest
    one, two = (read(answer, SYSTEMS) for answer in answers)
    np.testing.assert_allclose(two.energy, one.energy, rtol=1e-10)
    assert one.forces is not None
    assert two.forces is not None
    np.testing.assert_allclose(two.forces, one.forces, atol=1e-9)
    if pb.PROPERTY_STRESS in properties:
        assert one.stress is not None
        assert two.stress is not None
        np.testing.assert_allclose(two.stress, one.stress, atol=1e-10)


def test_a_rank_that_hangs_holds_up_its_callers_alone(spread: Process) -> None:
    request = ask(SYSTEMS[:1], model="tiny")
    with grpc.insecure_channel(spread.address) as channel:
        stub, health = PotentialServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        end = time.monotonic() + 1.0
        while time.monotonic() < end:  # an only caller, as some are answered in the server's loop
            stub.Predict(request, timeout=60)
        hanging = ranks(spread)[1]
        hanging.suspend()
        try:
            waiting = stub.Predict.future(request, timeout=2)
            time.sleep(0.5)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=1)
            assert waiting.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        finally:
            hanging.resume()
        assert stub.Predict(request, timeout=60).energy


@pytest.fixture
def hanging() -> Iterator[ranks_module._Generation]:
    """Two ranks, stopped before they are more than processes."""
    configs = [
        rank.RankConfig(Path("bundle"), "sha256:0", None, "cpu", place, 2, 1, 1, place) for place in (0, 1)
    ]
    generation = ranks_module._Generation(configs, None)
    for process in generation.processes:
        assert isinstance(process, BaseProcess)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
    yield generation
    generation.end()


def test_ranks_that_do_not_even_listen_are_not_waited_for(hanging: ranks_module._Generation) -> None:
    """To a job that no pipe holds."""
    job = rank.Job({"positions": np.zeros((400_000, 3))}, True, False)
    caught: list[Exception] = []

    def compute() -> None:
        try:
            hanging.compute(job, patience=0.5)
        except (EOFError, OSError) as error:
            caught.append(error)

    computing = threading.Thread(target=compute, daemon=True)
    watching = threading.Thread(target=lambda: said.append(hanging.wait_for_a_death()), daemon=True)
    said: list[str] = []
    for thread in (computing, watching):
        thread.start()
    watching.join(20)
    hanging.end()
    computing.join(20)
    assert said == ["no answer within 0 s"]
    assert len(caught) == 1
    assert not hanging.ran_out()


def test_of_ranks_that_load_it_is_said_which_one_ended(hanging: ranks_module._Generation) -> None:
    hanging.processes[1].kill()
    with pytest.raises(ranks_module.RankError, match=r"^rank 1 ended \(signal 9\) while loading$"):
        hanging.wait_until_ready()


def test_ranks_are_given_as_long_as_such_batches_take() -> None:
    pace, size = Pace(), Size(1, 1000, 60_000)
    assert ranks_module._patience(pace, size) == 60.0 * rank.COLLECTIVE_MINUTES
    pace.learn(size, 900.0)
    assert ranks_module._patience(pace, size) > 2 * 900.0


def test_a_killed_rank_is_answered_for_and_comes_back_with_what_is_served(
    bundles: Bundles, three: tuple[Path, Path, Path], spread: Process
) -> None:
    folder = spread.stderr.parent / bundles.tiny.name
    with grpc.insecure_channel(spread.address) as channel:
        stub, health = PotentialServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        request = ask(SYSTEMS, model="tiny")
        before = read(stub.Predict(request, timeout=60), SYSTEMS)

        def serving() -> bool:
            status = health.Check(health_pb2.HealthCheckRequest(), timeout=10).status
            return bool(status == health_pb2.HealthCheckResponse.SERVING)

        eventually(serving)
        old = ranks(spread)
        assert len(old) == 4
        shutil.copytree(three[1], folder, dirs_exist_ok=True)
        for victim in old[:2]:
            victim.send_signal(signal.SIGKILL)

        def until_the_loss() -> None:
            while True:  # what was under way or comes next meets the loss, and never a wrong number
                found = read(stub.Predict(request, timeout=60), SYSTEMS)
                np.testing.assert_array_equal(found.energy, before.energy)

        with pytest.raises(grpc.RpcError) as caught:
            until_the_loss()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
        (retry,) = [d for d in status.details if d.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
        info = error_details_pb2.RetryInfo()
        retry.Unpack(info)
        assert info.retry_delay.ToMilliseconds() > 0
        eventually(lambda: "is served: put that back" in spread.log())
        assert not serving()
        shutil.copytree(bundles.tiny, folder, dirs_exist_ok=True)
        eventually(serving)
        after = read(stub.Predict(request, timeout=60), SYSTEMS)
        np.testing.assert_array_equal(after.energy, before.energy)
        assert not {one.pid for one in old[:2]} & {one.pid for one in ranks(spread)}
    assert "signal 9" in spread.log()


def test_the_batch_with_which_a_rank_ran_out_of_memory_is_not_tried_again(spread: Process) -> None:
    """The shortage is simulated: the ranks' address space is bounded to little more than they have."""
    many = [molecule(seed, 30) for seed in range(250)]
    request = ask(many, model="direct", level_of_theory="PBE")
    most = {"model": "direct"}
    with grpc.insecure_channel(spread.address) as channel:
        stub = PotentialServiceStub(channel)
        edges = sum(stub.Explain(request).n_edges)
        assert edges < spread.sample("equipot_batch_edges_limit", **most)
        starve(ranks(spread))
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predict(request, timeout=60)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "out of memory" in (caught.value.details() or "")
        assert spread.sample("equipot_batch_edges_limit", **most) <= edges / 2
        assert spread.sample("equipot_batches_out_of_memory_total", **most) == 1
        eventually(lambda: spread.sample("equipot_ranks_alive", **most) == 2)
        answer = read(stub.Predict(request, timeout=60), many)
        assert np.isfinite(answer.energy).all()
    assert "it ran out of memory" in spread.log()
    assert not spread.tracebacks()


@pytest.mark.slow
def test_ranks_that_hang_are_ended_and_started_again(bundles: Bundles, tmp_path: Path) -> None:
    """Even at work that they are not sent for want of room; and once more, if one dies while it loads."""
    many = [molecule(seed, 30) for seed in range(400)]
    request = ask(many)
    with (
        running(bundles.tiny, "--tensor-parallel", 2, *ROOMY, stderr=tmp_path / "log") as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        stub = PotentialServiceStub(channel)
        before = read(stub.Predict(request, timeout=60), many)
        mine = ranks(process)
        mine[1].suspend()
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predict(request, timeout=300)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        eventually(lambda: len(set(ranks(process)) - set(mine)) == 2)
        time.sleep(1.0)
        (set(ranks(process)) - set(mine)).pop().kill()
        eventually(lambda: "(signal 9) while loading" in process.log())
        eventually(lambda: process.sample("equipot_ranks_alive") == 2)
        after = read(stub.Predict(request, timeout=60), many)
        np.testing.assert_array_equal(after.energy, before.energy)
        assert not psutil.pid_exists(mine[1].pid)
    assert "no answer within" in process.log()
    assert not process.tracebacks()


@pytest.mark.slow
def test_a_structure_for_which_ranks_have_no_memory_ends_them_but_once(
    bundles: Bundles, tmp_path: Path
) -> None:
    """The shortage is simulated, as above; it is made again after the ranks have come back."""
    large, small = molecule(1, 600), molecule(2)
    with (
        running(bundles.tiny, "--tensor-parallel", 2, *ROOMY, stderr=tmp_path / "log") as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        stub = PotentialServiceStub(channel)
        for attempt in range(2):
            mine = ranks(process)
            starve(mine)
            (failure,) = stub.Predict(ask([large], level_of_theory="PBE"), timeout=60).failures
            assert failure.reason == pb.FAILURE_REASON_TOO_LARGE
            if attempt == 0:
                eventually(lambda: process.sample("equipot_ranks_alive") == 2)
                time.sleep(1.0)
        assert [one.pid for one in ranks(process)] == [one.pid for one in mine]
        answer = stub.Predict(ask([small, large], level_of_theory="PBE"), timeout=60)
        assert [failure.index for failure in answer.failures] == [1]


def test_no_rank_outlives_a_killed_server(bundles: Bundles, tmp_path: Path) -> None:
    """Nor one that is asked to stop: `spread` sees to that at its end."""
    with running(bundles.tiny, "--tensor-parallel", 2, stderr=tmp_path / "log") as process:
        mine = ranks(process)
        assert len(mine) == 2
        mine[1].suspend()
        with grpc.insecure_channel(process.address) as channel:
            waiting = PotentialServiceStub(channel).Predict.future(ask(SYSTEMS), timeout=60)
            time.sleep(0.5)
            process.popen.kill()
            assert waiting.code() is grpc.StatusCode.UNAVAILABLE
        try:
            # It waits for the other in the midst of a sum.
            assert not left_of(mine[:1])
        finally:
            mine[1].resume()
        assert not left_of(mine[1:])


def test_a_model_that_does_not_divide_is_refused_in_one_line(bundles: Bundles, tmp_path: Path) -> None:
    popen: subprocess.Popen[str] = launch(
        bundles.tiny, "--port", 0, "--no-metrics", "--tensor-parallel", 7, stderr=tmp_path / "log"
    )
    popen.communicate(timeout=60)
    assert popen.returncode == 2
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert "7 ranks" in last
    assert "choose one of" in last
