"""Whoever misbehaves on the wire harms nobody else: the server goes on, and keeps nothing of it."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from tests.serve.certificates import Authority
from tests.serve.conftest import Bundles, Process, ask, molecule, running

from equipot.client import Client, RetryPolicy, Structure, Tls
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

SYSTEM = molecule(1)
STRUCTURE = Structure(SYSTEM.atomic_numbers, SYSTEM.positions)
HEADERS, DATA, RST_STREAM, SETTINGS, WINDOW_UPDATE = 1, 0, 3, 4, 8
END_HEADERS, END_STREAM = 4, 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
PING = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"12345678"
GOAWAY = 7


def connect(process: Process) -> socket.socket:
    host, _, port = process.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def descriptors(process: Process) -> int:
    """Open files and sockets of the server."""
    return len(os.listdir(f"/proc/{process.popen.pid}/fd"))  # noqa: PTH208  # names are not wanted


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def unharmed(server: Process) -> Iterator[None]:
    """Afterwards the server answers, nothing is under way, and the connections are gone."""
    with grpc.insecure_channel(server.address) as channel:
        PotentialServiceStub(channel).Predict(ask([SYSTEM]), timeout=20)
    before = descriptors(server)
    said = len(server.log())
    yield
    with grpc.insecure_channel(server.address) as channel:
        PotentialServiceStub(channel).Predict(ask([SYSTEM]), timeout=20)
    until(lambda: descriptors(server) <= before + 2)
    until(lambda: server.sample("equipot_in_flight_requests") == 0)
    assert server.sample("equipot_queue_edges") == 0
    assert server.sample("equipot_sessions") == 0
    assert not server.tracebacks(said)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: str, value: str) -> bytes:
    """A header of HPACK that enters no table."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def head(method: str = "Predict") -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/equipot.wire.v1.PotentialService/{method}",
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(literal(name, value) for name, value in fields.items())


def body(message: bytes) -> bytes:
    return b"\x00" + struct.pack(">I", len(message)) + message


def reset(connection: socket.socket) -> None:
    """Ends it as a machine that has crashed would be ended for: with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_connections_that_say_nothing(server: Process) -> None:
    silent = [connect(server) for _ in range(50)]
    begun = time.monotonic()
    with Client(server.address, retry=RetryPolicy(attempts=1)) as client:
        client.predict(STRUCTURE)
    assert time.monotonic() - begun < 10
    for connection in silent:
        connection.close()


def test_requests_that_end_in_the_middle(server: Process) -> None:
    message = body(ask([SYSTEM]).SerializeToString())
    for cut in (0, 3, 40, len(message) - 1):
        for leave in (reset, socket.socket.close):
            connection = connect(server)
            connection.sendall(PREFACE + frame(HEADERS, END_HEADERS, 1, head()))
            connection.sendall(frame(DATA, 0, 1, message[:cut]))
            time.sleep(0.02)
            leave(connection)


def test_callers_that_leave_before_their_answer(server: Process) -> None:
    message = body(ask([molecule(seed, 100) for seed in range(40)]).SerializeToString())
    for _ in range(10):
        connection = connect(server)
        connection.sendall(PREFACE + frame(HEADERS, END_HEADERS, 1, head()))
        for start in range(0, len(message), 16_000):
            piece = message[start : start + 16_000]
            last = END_STREAM if start + 16_000 >= len(message) else 0
            connection.sendall(frame(DATA, last, 1, piece))
        reset(connection)


def test_streams_that_are_opened_and_reset(server: Process) -> None:
    """The attack known as rapid reset (CVE-2023-44487)."""
    message = body(ask([SYSTEM]).SerializeToString())
    with connect(server) as connection:
        connection.sendall(PREFACE)
        with suppress(ConnectionError, TimeoutError):
            for stream in range(1, 4_001, 2):
                connection.sendall(
                    frame(HEADERS, END_HEADERS, stream, head())
                    + frame(DATA, END_STREAM, stream, message)
                    + frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
                )


def test_frames_that_are_none(server: Process) -> None:
    random = os.urandom
    for junk in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        random(1_000),
        PREFACE + random(1_000),
        PREFACE + frame(HEADERS, END_HEADERS, 1, random(100)),
        PREFACE + frame(SETTINGS, 0, 0, random(36)),
        PREFACE + frame(DATA, 0, 7, random(50)),
        PREFACE + frame(WINDOW_UPDATE, 0, 0, bytes(4)),
        PREFACE + frame(HEADERS, 0, 1, head()) + PING,
        b"\x16\x03\x01" + random(200),
    ):
        with connect(server) as connection, suppress(ConnectionError, TimeoutError):
            connection.settimeout(0.5)
            connection.sendall(junk)
            while connection.recv(65_536):
                pass


def test_a_caller_that_reads_nothing(server: Process) -> None:
    """Its answers stay in the server, as many as it has asked for, and nobody waits for them."""
    message = body(ask([molecule(seed, 100) for seed in range(20)]).SerializeToString())
    with connect(server) as connection:
        # No window at all: not a byte of an answer may be sent.
        closed = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
        connection.sendall(PREFACE + closed)
        for stream in range(1, 9, 2):
            connection.sendall(frame(HEADERS, END_HEADERS, stream, head()))
            for start in range(0, len(message), 16_000):
                last = END_STREAM if start + 16_000 >= len(message) else 0
                connection.sendall(frame(DATA, last, stream, message[start : start + 16_000]))
        begun = time.monotonic()
        with Client(server.address, retry=RetryPolicy(attempts=1)) as client:
            for _ in range(5):
                client.predict(STRUCTURE)
        assert time.monotonic() - begun < 20


def test_sessions_that_are_left_without_a_word(server: Process) -> None:
    opening = pb.SessionRequest(
        open=pb.SessionOpen(structures=pb.Structures(n_atoms=[1], atomic_numbers=b"\x01\x00\x00\x00"))
    )
    for _ in range(10):
        connection = connect(server)
        connection.sendall(PREFACE + frame(HEADERS, END_HEADERS, 1, head("Session")))
        connection.sendall(frame(DATA, 0, 1, body(opening.SerializeToString())))
        reset(connection)


def test_a_length_that_lies(server: Process) -> None:
    """A message said to be of 4 GB: refused by its length, not waited for."""
    with connect(server) as connection:
        connection.sendall(PREFACE + frame(HEADERS, END_HEADERS, 1, head()))
        connection.sendall(frame(DATA, 0, 1, b"\x00\xff\xff\xff\xff" + bytes(100)))
        connection.settimeout(10)
        received = b""
        while b"larger than max" not in received:
            piece = connection.recv(65_536)
            assert piece
            received += piece


@pytest.mark.slow
def test_silence_before_and_after_a_handshake(
    bundles: Bundles, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Half-open connections of all kinds are given up: by the handshake's time, then by keepalive."""
    authority = Authority(tmp_path_factory.mktemp("ca"), "ours")
    files = authority.issue("server")
    words = ["--tls-cert", files.cert, "--tls-key", files.key, "--keepalive", 10, "--threads", 1]
    with running(bundles.tiny, *words, stderr=tmp_path / "log") as process:
        before = descriptors(process)
        plain = [connect(process) for _ in range(5)]
        context = ssl.create_default_context(cafile=str(authority.file))
        context.set_alpn_protocols(["h2"])
        mute = [context.wrap_socket(connect(process), server_hostname="127.0.0.1") for _ in range(5)]
        for connection in mute:
            connection.sendall(PREFACE)
        with Client(process.address, tls=Tls(ca=authority.file)) as client:
            client.predict(STRUCTURE)
        # Neither side of these is ever read from or written to again.
        until(lambda: descriptors(process) <= before + 2, seconds=60)
        for half_open in (*plain, *mute):
            half_open.close()


@pytest.mark.slow
def test_connections_of_full_age_are_left_without_an_error(bundles: Bundles, tmp_path: Path) -> None:
    words = ["--max-connection-age", 10, "--threads", 1]
    peers: set[str] = set()
    with running(bundles.tiny, *words, stderr=tmp_path / "log") as process:
        stop = threading.Event()
        failures: list[Exception] = []

        def watch() -> None:
            port = f":{int(process.address.rpartition(':')[2]):04X}"
            while not stop.is_set():
                # gRPC may hold an IPv4 address by a socket of either kind.
                for table in ("tcp", "tcp6"):
                    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                        local, remote, state = line.split()[1:4]
                        if state == "01" and local.endswith(port):
                            peers.add(remote)
                time.sleep(0.2)

        watcher = threading.Thread(target=watch)
        watcher.start()
        with Client(process.address, retry=RetryPolicy(attempts=1)) as client:
            end = time.monotonic() + 25
            while time.monotonic() < end:
                try:
                    client.predict([STRUCTURE] * 3)
                except Exception as error:
                    failures.append(error)
        stop.set()
        watcher.join()
    assert not failures
    # One client had several connections, one after the other.
    assert len(peers) >= 2


def frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """What the server sends, until it closes."""
    buffer = b""
    while piece := connection.recv(65_536):
        buffer += piece
        while len(buffer) >= 9 and len(buffer) >= 9 + int.from_bytes(buffer[:3], "big"):
            length = int.from_bytes(buffer[:3], "big")
            yield buffer[3], buffer[9 : 9 + length]
            buffer = buffer[9 + length :]


def test_a_caller_who_pings_too_often_is_sent_away(server: Process) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(PREFACE + 8 * PING)
        goodbyes = [payload for kind, payload in frames(connection) if kind == GOAWAY]
    assert any(b"too_many_pings" in payload for payload in goodbyes)


def test_headers_of_any_size_are_not_taken(server: Process) -> None:
    with grpc.insecure_channel(server.address, options=[("grpc.max_metadata_size", 2**22)]) as channel:
        stub = PotentialServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.Predict(ask([molecule(1)]), timeout=20, metadata=(("x-large", "x" * 200_000),))
        assert error.value.code() in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL}
        stub.Predict(ask([molecule(1)]), timeout=20)
