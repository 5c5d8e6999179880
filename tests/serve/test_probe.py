"""`equipot probe` against a real server, and against one that lies."""

from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest

from equipot.cli.main import main
from equipot.client.check import check
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1 import potential_pb2_grpc
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

from .conftest import Process


def probe(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["probe", *map(str, words)])
    written = capsys.readouterr()
    return code, written.out + written.err


def test_a_serving_server_and_its_models_are_found_well(
    server: Process, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = probe(server.address, "--structure", capsys=capsys)
    assert code == 0, text
    assert "equipot.readiness is serving" in text
    assert "tiny: " in text
    assert "direct: " in text
    code, text = probe(server.address, "--service", "equipot.liveness", capsys=capsys)
    assert (code, "equipot.liveness is serving" in text) == (0, True)


def test_what_is_not_there_is_exit_code_1(server: Process, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = probe(server.address, "--service", "no.such", capsys=capsys)
    assert (code, "no service 'no.such' here" in text) == (1, True), text
    code, text = probe("127.0.0.1:1", "--timeout", 2, capsys=capsys)
    assert (code, "127.0.0.1:1" in text) == (1, True), text


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert probe("127.0.0.1:1", "--tls-cert", tmp_path / "c", capsys=capsys)[0] == 2
    code, text = probe("127.0.0.1:1", "--tls-ca", tmp_path / "missing", capsys=capsys)
    assert (code, "No such file" in text) == (2, True)


class Liar(potential_pb2_grpc.PotentialServiceServicer):
    """Passes calls on to a real server and spoils the answers."""

    def __init__(self, stub: PotentialServiceStub, spoil: str) -> None:
        self._stub = stub
        self._spoil = spoil

    def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        return self._stub.ListModels(request)

    def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.Model:
        return self._stub.GetModel(request)

    def Explain(self, request: pb.PredictRequest, context: object) -> pb.ExplainResponse:
        return self._stub.Explain(request)

    def Session(self, requests: Iterator[pb.SessionRequest], context: object) -> Iterator[pb.SessionReply]:
        return iter(())

    def Relax(self, request: pb.RelaxRequest, context: object) -> Iterator[pb.RelaxReply]:
        return iter(())

    def Simulate(self, request: pb.SimulateRequest, context: object) -> Iterator[pb.SimulateReply]:
        return iter(())

    def Predict(self, request: pb.PredictRequest, context: object) -> pb.PredictResponse:
        reply = self._stub.Predict(request)
        numbers = np.frombuffer(getattr(reply, self._spoil), dtype="<f8").copy()
        numbers[-1] += 0.5
        setattr(reply, self._spoil, numbers.tobytes())
        return reply


@pytest.fixture
def liar(request: pytest.FixtureRequest, stub: PotentialServiceStub) -> Iterator[grpc.Channel]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    potential_pb2_grpc.add_PotentialServiceServicer_to_server(Liar(stub, request.param), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(None)


@pytest.mark.parametrize(
    ("liar", "says"),
    [("energy", "a turned cluster has another energy"), ("forces", "forces do not turn")],
    indirect=["liar"],
)
def test_an_answer_against_physics_is_noticed(liar: grpc.Channel, says: str) -> None:
    found = list(check(liar, timeout=20, metadata=()))
    assert [says in checked.wrong for checked in found] == [True, True]
