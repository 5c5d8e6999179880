"""The engine behind MII's own server, load balancer and client, where the package is installed."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from equipot.serve.config import ServeConfig
from equipot.serve.errors import InvalidRequest, OverLimit, ServeError
from equipot.serve.free import free_port
from equipot.serve.mii_front.server import check_plain, client, run
from equipot.serve.mii_front.texts import request_of, within
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import decode_structures
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

from .conftest import Bundles, Process, ask, crystal, launch, molecule, read

System = Any


def text(system: System) -> str:
    return json.dumps(
        {
            "atomic_numbers": system.atomic_numbers.tolist(),
            "positions": system.positions.tolist(),
            "cell": system.cell.tolist(),
            "pbc": system.pbc.tolist(),
        }
    )


class TestTexts:
    def test_a_structure_is_read_exactly(self) -> None:
        system = crystal(3)
        request = request_of(text(system), {"properties": "energy, stress", "model": "tiny"})
        arrays = decode_structures(request.structures)
        np.testing.assert_array_equal(arrays.positions, system.positions)
        np.testing.assert_array_equal(arrays.cell[0], system.cell)
        np.testing.assert_array_equal(arrays.pbc[0], system.pbc)
        assert list(request.properties) == [pb.PROPERTY_ENERGY, pb.PROPERTY_STRESS]
        assert request.model == "tiny"

    @pytest.mark.parametrize(
        ("asked", "options", "message"),
        [
            ("{", {}, "the request is no JSON"),
            ("[1]", {}, "the request is no JSON object"),
            ("[" * 100_000, {}, "the request is no JSON"),
            ('{"numbers": [1]}', {}, "'numbers' is no field; fields are atomic_numbers, positions"),
            ('{"positions": [[0, 0, 0]]}', {}, "atomic_numbers is missing"),
            ('{"atomic_numbers": [1]}', {}, "positions is missing"),
            ('{"atomic_numbers": [1.5], "positions": [[0, 0, 0]]}', {}, "atomic_numbers does not hold whole"),
            (
                '{"atomic_numbers": [1e99], "positions": [[0, 0, 0]]}',
                {},
                "atomic_numbers does not hold whole",
            ),
            ('{"atomic_numbers": [99999999999], "positions": [[0, 0, 0]]}', {}, "more than 31 bits"),
            (
                '{"atomic_numbers": [1], "positions": [[0, 0]]}',
                {},
                "positions has the shape (1, 2), not 1 × 3",
            ),
            ('{"atomic_numbers": [1], "positions": [[0, 0, "a"]]}', {}, "positions does not hold numbers"),
            ('{"atomic_numbers": [1], "positions": [[0], [0, 1]]}', {}, "positions is not an array"),
            ('{"atomic_numbers": [1], "positions": [[0, 0, 0]], "pbc": [1, 1, 1]}', {}, "pbc does not hold"),
            (text(molecule(1)), {"temperature": 1.0}, "temperature is no option; options are model, "),
            (text(molecule(1)), {"properties": "dipole"}, "'dipole' is no property; they are energy, "),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_what_cannot_be_read_is_named(self, asked: str, options: dict[str, object], message: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            request_of(asked, options)
        assert message in str(caught.value)


def test_a_request_may_be_no_larger_than_a_message() -> None:
    within("x" * 10, 10)
    with pytest.raises(OverLimit, match="11 bytes, the limit is 10"):
        within("x" * 11, 10)


def test_what_mii_cannot_do_is_refused() -> None:
    with pytest.raises(ServeError, match="knows nothing of --tokens"):
        check_plain(ServeConfig(bundles=(Path("a"),), tokens=Path("tokens")))
    with pytest.raises(ServeError, match="knows nothing of --ui"):
        check_plain(ServeConfig(bundles=(Path("a"),), ui=True))
    check_plain(ServeConfig(bundles=(Path("a"),), ui=False))


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    config = ServeConfig(bundles=(Path("a"),), port=free_port())
    with (
        socket.create_server(("127.0.0.1", config.port)),
        pytest.raises(ServeError, match=f"port {config.port} is in use"),
    ):
        run(config, replicas=1, announce=pytest.fail)


# ---- the real package from here on

real = pytest.mark.skipif(
    importlib.util.find_spec("mii") is None,
    reason="deepspeed-mii is not installed: pip install 'equipot[mii]'",
)


@pytest.fixture(scope="module")
def through_mii(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, int]]:
    log, port = tmp_path_factory.mktemp("mii") / "log", free_port()
    words = [bundles.tiny, bundles.direct, "--dtype", "float64", "--threads", 1, "--max-atoms", 200]
    popen = launch(*words, "--mii", "--replicas", 2, "--port", port, stderr=log)
    try:
        assert popen.stdout is not None
        lines = []
        for line in popen.stdout:
            lines.append(line)
            if line.startswith("serving "):
                break
        else:
            pytest.fail(log.read_text())
        yield Process(popen, lines, log), port
    finally:
        popen.terminate()
        popen.communicate(timeout=60)


def replicas(process: Process) -> list[psutil.Process]:
    """The processes that MII's server and load balancer run in, in the order of their start."""
    children = psutil.Process(process.popen.pid).children()
    spawned = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return sorted(spawned, key=lambda child: float(child.create_time()))


@real
@pytest.mark.slow
@pytest.mark.timeout(300)
class TestThroughMii:
    def test_answers_are_those_of_the_service(
        self, through_mii: tuple[Process, int], stub: PotentialServiceStub
    ) -> None:
        systems = [molecule(1), crystal(2), molecule(3, 9)]
        wanted = read(
            stub.Predict(
                ask(systems, pb.PROPERTY_FORCES, pb.PROPERTY_STRESS, model="tiny", level_of_theory="PBE")
            ),
            systems,
        )
        responses = client(through_mii[1]).generate(
            [text(system) for system in systems], model="tiny", properties="energy,forces,stress"
        )
        answers = [json.loads(response.generated_text) for response in responses]
        assert wanted.forces is not None
        assert wanted.stress is not None
        np.testing.assert_array_equal([answer["energy"] for answer in answers], wanted.energy)
        np.testing.assert_array_equal(np.concatenate([answer["forces"] for answer in answers]), wanted.forces)
        assert [answer["stress"] is None for answer in answers] == [True, False, True]
        np.testing.assert_array_equal(answers[1]["stress"], wanted.stress[1])
        assert answers[0]["model"]["name"] == "tiny"
        assert answers[0]["model"]["digest"].startswith("sha256:")

    def test_failures_are_told_one_by_one(self, through_mii: tuple[Process, int]) -> None:
        asked = [text(molecule(1)), "{", text(molecule(2, elements=(79,))), text(molecule(3, 201))]
        answers = [
            json.loads(str(response)) for response in client(through_mii[1]).generate(asked, model="tiny")
        ]
        assert "energy" in answers[0]
        assert [answer["error"]["reason"] for answer in answers[1:]] == [
            "INVALID_REQUEST",
            "unsupported",
            "too_large",
        ]
        (unknown,) = client(through_mii[1]).generate([text(molecule(1))], model="none")
        assert json.loads(str(unknown))["error"]["reason"] == "NOT_SERVED"

    def test_a_killed_replica_comes_back(self, through_mii: tuple[Process, int]) -> None:
        process, port = through_mii
        victim = replicas(process)[0]
        victim.send_signal(signal.SIGKILL)
        end = time.monotonic() + 120
        answered = 0
        while answered < 10:  # in a row: the balancer goes round
            assert time.monotonic() < end
            try:
                client(port).generate([text(molecule(1))], model="tiny")
                answered += 1
            except Exception:
                answered = 0
                time.sleep(0.5)
        assert "is started again" in process.log()

    def test_sigterm_ends_it(self, bundles: Bundles, tmp_path: Path) -> None:
        port = free_port()
        popen = launch(bundles.tiny, "--mii", "--port", port, stderr=tmp_path / "log")
        assert popen.stdout is not None
        for line in popen.stdout:
            if line.startswith("serving "):
                break
        started = psutil.Process(popen.pid).children(recursive=True)
        client(port).generate([text(molecule(1))])
        popen.terminate()
        assert popen.wait(timeout=60) == 0
        popen.stdout.close()
        _, left = psutil.wait_procs(started, timeout=20)
        assert left == []
        assert "Traceback" not in (tmp_path / "log").read_text()
