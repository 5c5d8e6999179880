"""A model spread over machines: here processes that share nothing but a port and a key."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from equipot.serve import hosts as hosts_module
from equipot.serve import rank
from equipot.serve.config import ServeConfig, Workers
from equipot.serve.errors import ServeError
from equipot.serve.free import free_port
from equipot.serve.hosts import Hosts, RemoteRank
from equipot.serve.repository.settings import RepositorySettings
from equipot.serve.wire import Wire, WireError, read_key
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

from .conftest import Bundles, Process, ask, crystal, molecule, read, running
from .test_tensor_parallel import eventually

SYSTEMS = [molecule(1), crystal(2), molecule(3, 9)]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(secrets.token_hex(32))
    return file


@contextlib.contextmanager
def joined(port: int, key: Path) -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, "-m", "equipot.cli", "join", f"127.0.0.1:{port}", "--key", str(key)]
    worker = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


def ranks_of(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_two_machines_answer_as_one_process_and_one_that_is_lost_is_waited_for(
    bundles: Bundles, key: Path, server: Process, tmp_path: Path
) -> None:
    port = free_port()
    words = [bundles.tiny, "--dtype", "float64", "--tensor-parallel", 2]
    spread = ["--worker-hosts", 1, "--worker-port", port, "--worker-key", key]
    request = ask(SYSTEMS, model="tiny")
    with grpc.insecure_channel(server.address) as channel:
        expected = read(PotentialServiceStub(channel).Predict(request, timeout=60), SYSTEMS)
    with contextlib.ExitStack() as stack:
        restarted = stack.enter_context(joined(port, key))
        workers = []

        def restart() -> None:
            """Once it loads its rank."""
            eventually(lambda: bool(ranks_of(restarted.pid)))
            restarted.kill()
            workers.append(stack.enter_context(joined(port, key)))

        restarting = threading.Thread(target=restart)
        restarting.start()
        process = stack.enter_context(running(*words, *spread, stderr=tmp_path / "log"))
        channel = stack.enter_context(grpc.insecure_channel(process.address))
        stub = PotentialServiceStub(channel)

        def same() -> None:
            reply = stub.Predict(request, timeout=60)
            assert reply.model.tensor_parallel == 2
            answer = read(reply, SYSTEMS)
            np.testing.assert_allclose(answer.energy, expected.energy, rtol=1e-10)
            assert answer.forces is not None
            assert expected.forces is not None
            np.testing.assert_allclose(answer.forces, expected.forces, atol=1e-9)

        same()
        restarting.join()
        assert "waiting for workers again" in process.log()
        (worker,) = workers
        assert [len(ranks_of(pid)) for pid in (process.popen.pid, worker.pid)] == [1, 1]
        worker.kill()
        worker.wait()

        def lost() -> bool:
            refused = stub.Predict.future(request, timeout=60).exception()
            return refused is not None and refused.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]

        eventually(lost)
        again = stack.enter_context(joined(port, key))
        eventually(lambda: not lost())
        same()
        left = ranks_of(again.pid)
        assert len(left) == 1
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(timeout=30) == 0
        _, alive = psutil.wait_procs(left, timeout=20)
        assert not alive
        assert again.poll() is None  # it waits for the leader to come again


@pytest.fixture
def hosts(key: Path) -> Iterator[Hosts]:
    hosts = Hosts(Workers(hosts=1, host="127.0.0.1", port=0, key=key))
    yield hosts
    hosts.close()


CONFIG = rank.RankConfig(Path("/bundle"), "sha256:0", "float64", "cpu", 1, 2, 1234, 1, 0)


def test_strangers_are_turned_away_and_do_not_disturb(hosts: Hosts, key: Path) -> None:
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n" * 20):
        with socket.create_connection(("127.0.0.1", hosts.port)) as stranger:
            stranger.sendall(words)
    wrong = Wire(socket.create_connection(("127.0.0.1", hosts.port)))
    with pytest.raises(WireError):
        wrong.introduce(b"another key, as long", leads=False, name="x")
    right = Wire(socket.create_connection(("127.0.0.1", hosts.port)))
    right.introduce(key.read_bytes(), leads=False, name="x")
    (placed,) = hosts.place([CONFIG])
    assert right.receive() == CONFIG
    placed.kill()
    with pytest.raises(WireError):
        right.receive()


def test_nobody_begins_before_all_have_come_and_who_left_is_not_counted(
    key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines of two ranks each, which open their second connection when the first is taken."""
    monkeypatch.setattr(hosts_module, "INTRODUCTION_SECONDS", 0.5)
    hosts = Hosts(Workers(hosts=2, host="127.0.0.1", port=0, key=key))

    def come(name: str) -> Wire:
        wire = Wire(socket.create_connection(("127.0.0.1", hosts.port)))
        wire.introduce(read_key(key), leads=False, name=name)
        return wire

    configs = [replace(CONFIG, rank=place, size=6) for place in range(2, 6)]
    placed: list[RemoteRank] = []
    placing = threading.Thread(target=lambda: placed.extend(hosts.place(configs)), daemon=True)
    placing.start()
    gone = come("a-1")
    assert not gone.has_word(0.2)
    gone.close()
    waiting = {"b-1": come("b-1")}
    assert not waiting["b-1"].has_word(0.2)
    waiting["c-1"] = come("c-1")
    begun: list[tuple[Wire, Any]] = []

    def all_have_begun() -> bool:
        for name, wire in list(waiting.items()):
            if wire.has_word(0.02):
                told = wire.receive()
                if name == "c-1":  # it leaves with its first word, and is replaced
                    waiting.pop(name).close()
                    waiting["d-1"] = come("d-1")
                else:
                    begun.append((wire, told))
                    waiting[name] = come(name)
        return not placing.is_alive()

    eventually(all_have_begun, 20)
    assert all_have_begun()
    assert sorted((told for _, told in begun[-4:]), key=lambda config: config.rank) == configs
    for wire, _ in begun[:-4]:  # not left alone with its rank
        with pytest.raises(WireError):
            wire.receive()
    assert not any(wire.has_word(0.0) for wire, _ in begun[-4:])
    assert [one.is_alive() for one in placed] == [True] * 4
    for one in placed:
        one.kill()
    hosts.close()


def test_a_rank_that_hangs_is_ended_with_its_leader(key: Path) -> None:
    """It listens no more, to a job that no socket holds."""
    ours, theirs = (Wire(side) for side in connected())
    before = set(ranks_of(os.getpid()))
    running = threading.Thread(target=hosts_module._run, args=(theirs, CONFIG))
    running.start()
    eventually(lambda: bool(set(ranks_of(os.getpid())) - before))
    (hanging,) = set(ranks_of(os.getpid())) - before
    hanging.suspend()
    ours.send(rank.Job({"positions": np.zeros((400_000, 3))}, True, False))
    ours.close()
    running.join(10)
    assert not running.is_alive()
    assert not hanging.is_running()


def test_a_leader_that_lets_go_at_once_is_not_called_without_end(
    key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts_module, "PATIENCE_SECONDS", 0.1)
    before, stop, calls = threading.active_count(), threading.Event(), 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        port = listener.getsockname()[1]
        joining = threading.Thread(
            target=hosts_module.join,
            args=("127.0.0.1", port, key),
            kwargs={"announce": lambda text: None, "stop": stop},
        )
        joining.start()
        begun = time.monotonic()
        while calls < 5:
            wire = Wire(listener.accept()[0])
            wire.introduce(read_key(key), leads=True)
            wire.close()
            calls += 1
        assert time.monotonic() - begun >= 4 * 0.1
        stop.set()
    joining.join(20)
    assert not joining.is_alive()
    assert threading.active_count() <= before


def test_nobody_is_let_in_by_their_own_words(key: Path) -> None:
    """A stranger who sends everything back has the same nonce and proof as the leader, and is refused."""
    left, right = connected()
    echo = threading.Thread(target=lambda: [right.send(right.recv(1 << 16)) for _ in range(2)], daemon=True)
    echo.start()
    with pytest.raises(WireError, match="another key"):
        Wire(left).introduce(key.read_bytes(), leads=True)
    echo.join()
    right.close()


def test_every_message_comes_back_as_it_was() -> None:
    sides = connected()
    one, two = (Wire(side) for side in sides)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        for side in sides:
            assert side.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
    fields: dict[str, Any] = {
        "positions": np.random.default_rng(0).normal(size=(5, 3)),
        "n": np.arange(3, dtype=np.int32),
    }
    outcome = rank.Outcome(np.array([1.5]), None, np.zeros((1, 3, 3)))
    for message in (
        CONFIG,
        rank.Ready(7),
        rank.Refused("too wide"),
        rank.Exhausted(),
        rank.Job(fields, True, False),
        outcome,
    ):
        one.send(message)
        back = two.receive()
        assert type(back) is type(message)
        for name in type(message).__slots__:
            np.testing.assert_equal(getattr(back, name), getattr(message, name))
    one.close()
    with pytest.raises(WireError, match="gone"):
        two.receive()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"worker_hosts": 1, "tensor_parallel": 2}, "needs worker-key"),
        ({"worker_key": Path("k"), "tensor_parallel": 2}, "say how many by worker-hosts"),
        ({"worker_hosts": 1, "tensor_parallel": 3, "worker_key": Path("k")}, "cannot share evenly"),
        ({"worker_hosts": 1, "tensor_parallel": 1, "worker_key": Path("k")}, "cannot share evenly"),
        (
            {
                "worker_hosts": 1,
                "tensor_parallel": 2,
                "worker_key": Path("k"),
                "bundles": (Path("a"), Path("b")),
            },
            "is for one model",
        ),
        (
            {
                "worker_hosts": 1,
                "tensor_parallel": 2,
                "worker_key": Path("k"),
                "repository": RepositorySettings(url="models"),
            },
            "a repository may hold any number",
        ),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(ServeError, match=says):
        ServeConfig(**{"bundles": (Path("a"),), **values})  # type: ignore[arg-type]


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(ServeError, match="at least 16"):
        Hosts(Workers(hosts=1, host="127.0.0.1", port=0, key=tmp_path / "short"))
