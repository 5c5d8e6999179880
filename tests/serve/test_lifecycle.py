"""From start to stop: what a server says when it cannot start, and what happens to requests when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from tests.serve.conftest import Bundles, Process, ask, launch, molecule, read, running

from equipot.model.errors import BundleError
from equipot.serve.batcher import Budget
from equipot.serve.config import RequestLimits, ServeConfig
from equipot.serve.errors import ServeError
from equipot.serve.server import run
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

ONE_BY_ONE = ["--dtype", "float64", "--threads", 1, "--max-batch-edges", 1]


def start_error(*bundles: Path, **values: Any) -> str:
    """Why a server does not start."""
    config = ServeConfig(bundles=bundles, **{"port": 0, "metrics_port": None, **values})
    with pytest.raises((ServeError, BundleError)) as caught:
        asyncio.run(run(config, pytest.fail))
    return str(caught.value)


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


class TestStart:
    @pytest.mark.parametrize("fault", ["missing", "truncated", "port"])
    def test_a_start_that_fails_says_why_in_one_line(
        self, bundles: Bundles, tmp_path: Path, fault: str
    ) -> None:
        bundle = tmp_path / "bundle"
        if fault != "missing":
            shutil.copytree(bundles.tiny, bundle)
        if fault == "truncated":
            (shard,) = bundle.glob("*.safetensors")
            shard.write_bytes(shard.read_bytes()[:-100])
        with taken_port() as port:
            where = port if fault == "port" else 0
            process = launch(bundle, "--port", where, "--no-metrics", stderr=tmp_path / "log")
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert output == ""
        (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if " INFO " not in line]
        assert line.startswith("error: ")
        assert {"missing": str(bundle), "truncated": ".safetensors", "port": f"port {port}"}[fault] in line

    def test_a_port_in_use(self, bundles: Bundles) -> None:
        with taken_port() as port:
            message = start_error(bundles.tiny, port=port)
        assert message == f"port {port} is in use: stop the other server or choose --port"

    def test_the_port_of_another_server_is_not_shared(self, bundles: Bundles, server: Process) -> None:
        port = int(server.address.rsplit(":", 1)[1])
        assert f"port {port} is in use" in start_error(bundles.tiny, port=port)

    def test_a_metrics_port_in_use(self, bundles: Bundles) -> None:
        with taken_port() as port:
            assert f"metrics port {port} is in use" in start_error(bundles.tiny, metrics_port=port)

    def test_a_host_that_is_not_ours(self, bundles: Bundles) -> None:
        for host in ("no.such.host.invalid", "192.0.2.1"):
            assert start_error(bundles.tiny, host=host).startswith(f"cannot listen on {host}:0: ")

    def test_two_bundles_of_one_name(self, bundles: Bundles) -> None:
        assert "two bundles are called 'tiny'" in start_error(bundles.tiny, bundles.tiny)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"bundles": ()}, "no bundle to serve"),
            ({"host": ""}, "host is empty"),
            ({"port": 70_000}, "port is 70000, allowed are 0 to 65535"),
            ({"metrics_port": -1}, "metrics-port is -1"),
            ({"threads": 0}, "threads is 0"),
            ({"drain_seconds": -1.0}, "drain-seconds is -1.0"),
            ({"budget": Budget(batch_edges=0, batch_atoms=1, queue_edges=1)}, "max-batch-edges is 0"),
            ({"limits": RequestLimits(structure_atoms=0)}, "max-atoms is 0"),
            ({"limits": RequestLimits(message_bytes=4_000 * 2**20)}, "max-message-mb is 4000"),
        ],
    )
    def test_values_out_of_range(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ServeError, match=message):
            ServeConfig(**{"bundles": (Path("bundle"),), **values})

    def test_the_ready_line_names_models_and_address(self, server: Process) -> None:
        assert server.lines[-1].startswith("serving tiny, direct on 127.0.0.1:")
        assert "sha256:" in server.log()


LONG = [molecule(seed) for seed in range(2_000)]
"""Seconds of work, structure by structure."""


def computing(process: Process) -> None:
    """Returns once the server has computed something."""
    while not process.sample("equipot_batches_total"):
        time.sleep(0.01)


def ending(pending: Any) -> grpc.StatusCode:
    """How a call that never got its answer ended."""
    error = pending.exception(timeout=20)
    assert isinstance(error, grpc.Call)
    return error.code()


class TestStop:
    def test_sigterm_refuses_new_calls_and_finishes_accepted_ones(
        self, bundles: Bundles, tmp_path: Path
    ) -> None:
        systems = LONG[:150]
        with (
            running(bundles.tiny, *ONE_BY_ONE, stderr=tmp_path / "log") as process,
            grpc.insecure_channel(process.address) as channel,
        ):
            stub = PotentialServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(health).status == health_pb2.HealthCheckResponse.SERVING
            pending = stub.Predict.future(ask(systems))
            computing(process)
            process.popen.send_signal(signal.SIGTERM)
            assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as caught:
                stub.Predict(ask([molecule(1)]), timeout=20)
            assert not pending.done()
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            status = rpc_status.from_call(caught.value)
            assert status is not None
            assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
            answer = read(pending.result(timeout=60), systems)
            assert not np.isnan(answer.energy).any()
            assert process.popen.wait(timeout=20) == 0
            assert not process.tracebacks()

    def test_the_drain_has_an_end(self, bundles: Bundles, tmp_path: Path) -> None:
        with (
            running(bundles.tiny, *ONE_BY_ONE, "--drain-seconds", 0.5, stderr=tmp_path / "log") as process,
            grpc.insecure_channel(process.address) as channel,
        ):
            pending = PotentialServiceStub(channel).Predict.future(ask(LONG))
            computing(process)
            process.popen.send_signal(signal.SIGTERM)
            assert process.popen.wait(timeout=20) == 0
            assert ending(pending) is grpc.StatusCode.UNAVAILABLE

    def test_a_second_signal_ends_it_at_once(self, bundles: Bundles, tmp_path: Path) -> None:
        with (
            running(bundles.tiny, *ONE_BY_ONE, stderr=tmp_path / "log") as process,
            grpc.insecure_channel(process.address) as channel,
        ):
            pending = PotentialServiceStub(channel).Predict.future(ask(LONG))
            computing(process)
            process.popen.send_signal(signal.SIGTERM)
            while "draining" not in process.log():
                time.sleep(0.01)
            process.popen.send_signal(signal.SIGINT)
            assert process.popen.wait(timeout=5) == 128 + signal.SIGINT
            assert ending(pending) is grpc.StatusCode.UNAVAILABLE

    def test_after_kill_9_callers_see_unavailable_and_a_new_server_answers(
        self, bundles: Bundles, tmp_path: Path
    ) -> None:
        with running(bundles.tiny, *ONE_BY_ONE, stderr=tmp_path / "log") as process:
            port = int(process.address.rsplit(":", 1)[1])
            with grpc.insecure_channel(process.address) as channel:
                stub = PotentialServiceStub(channel)
                pending = stub.Predict.future(ask(LONG), timeout=60)
                computing(process)
                process.popen.kill()
                assert ending(pending) is grpc.StatusCode.UNAVAILABLE
                process.popen.wait()
                with running(bundles.tiny, stderr=tmp_path / "again", port=port):
                    assert not stub.Predict(ask([molecule(1)]), wait_for_ready=True, timeout=60).failures


def test_calls_before_the_models_are_loaded_are_told_to_come_back(bundles: Bundles, tmp_path: Path) -> None:
    """A pipe that nobody writes to takes the card's place: the server stays where it loads."""
    slow = tmp_path / "slow"
    shutil.copytree(bundles.tiny, slow)
    (slow / "model.json").unlink()
    os.mkfifo(slow / "model.json")
    with taken_port() as port:
        pass
    process = launch(slow, "--port", port, "--no-metrics", stderr=tmp_path / "log")
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            reply = health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
            assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as caught:
                PotentialServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=20)
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "starting" in str(caught.value.details())
        process.terminate()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


class TestHealth:
    @staticmethod
    def state(channel: grpc.Channel, service: str) -> Any:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, wait_for_ready=True, timeout=60).status

    def test_a_server_that_loads_lives_and_is_not_ready(self, bundles: Bundles, tmp_path: Path) -> None:
        """A pipe that nobody writes to takes the card's place: the server stays where it loads."""
        slow = tmp_path / "slow"
        shutil.copytree(bundles.tiny, slow)
        (slow / "model.json").unlink()
        os.mkfifo(slow / "model.json")
        with taken_port() as port:
            pass
        process = launch(slow, "--port", port, "--no-metrics", stderr=tmp_path / "log")
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                assert self.state(channel, "equipot.liveness") == health_pb2.HealthCheckResponse.SERVING
                assert self.state(channel, "equipot.readiness") == health_pb2.HealthCheckResponse.NOT_SERVING
        finally:
            process.kill()
            process.communicate()

    def test_a_lingering_server_says_not_serving_and_still_answers(
        self, bundles: Bundles, tmp_path: Path
    ) -> None:
        with (
            running(bundles.tiny, "--linger-seconds", 3, stderr=tmp_path / "log") as process,
            grpc.insecure_channel(process.address) as channel,
        ):
            stub = PotentialServiceStub(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="equipot.readiness")
            )
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            process.popen.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert self.state(channel, "equipot.liveness") == health_pb2.HealthCheckResponse.SERVING
            assert not stub.Predict(ask([molecule(1)]), timeout=20).failures
            assert process.popen.wait(timeout=20) == 0
