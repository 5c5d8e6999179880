"""TLS and mTLS with real certificates on a real port: what is right is let in, what is wrong is named."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.serve.certificates import HERE, Authority, Files, PrivateKey
from tests.serve.conftest import Bundles, Process, launch, molecule, running
from tests.serve.conftest import ask as request_of

from equipot.cli.main import main
from equipot.client import AsyncClient, Client, ClientError, NotTrusted, RetryPolicy, Structure, Tls
from equipot.serve.errors import ServeError
from equipot.serve.reread import POLL_SECONDS
from equipot.serve.tls import Certificates, TlsFiles
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

ONCE = RetryPolicy(attempts=1)
SYSTEM = molecule(1)
STRUCTURE = Structure(SYSTEM.atomic_numbers, SYSTEM.positions)

Ask = Callable[..., Any]


def ask_blocking(address: str, **options: Any) -> Any:
    with Client(address, **options) as client:
        return client.predict(STRUCTURE)


def ask_async(address: str, **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(address, **options) as client:
            return await client.predict(STRUCTURE)

    return asyncio.run(run())


@pytest.fixture(params=[ask_blocking, ask_async], ids=["blocking", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    kind: Ask = request.param
    return kind


@dataclass(frozen=True)
class Workshop:
    """Two authorities, of which the server knows one."""

    folder: Path
    ours: Authority
    theirs: Authority


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("certificates")
    return Workshop(folder, Authority(folder, "ours"), Authority(folder, "theirs"))


def secured(workshop: Workshop, bundles: Bundles, files: Files, *words: object) -> Any:
    log = workshop.folder / f"log-{files.cert.stem}"
    more = ["--tls-cert", files.cert, "--tls-key", files.key, "--threads", 1, *words]
    return running(bundles.tiny, *more, stderr=log)


@pytest.fixture(scope="module")
def files(workshop: Workshop) -> Files:
    """The certificate of the server without client certificates."""
    return workshop.ours.issue("server")


@pytest.fixture(scope="module")
def tls(workshop: Workshop, bundles: Bundles, files: Files) -> Iterator[Process]:
    with secured(workshop, bundles, files, "--ui") as process:
        yield process


@pytest.fixture(scope="module")
def mtls(workshop: Workshop, bundles: Bundles) -> Iterator[Process]:
    closed = ["--no-reflection", "--log-structures", "--metrics-host", "localhost"]
    files = workshop.ours.issue("strict")
    with secured(workshop, bundles, files, "--tls-client-ca", workshop.ours.file, *closed) as process:
        yield process


def test_the_right_certificate(tls: Process, workshop: Workshop, ask: Ask) -> None:
    assert np.isfinite(ask(tls.address, tls=Tls(ca=workshop.ours.file)).energy[0])


def test_plaintext_to_a_server_with_tls(tls: Process, ask: Ask) -> None:
    with pytest.raises(NotTrusted, match="speaks TLS, and this client does not: give tls"):
        ask(tls.address)


def test_tls_to_a_server_without(server: Process, workshop: Workshop, ask: Ask) -> None:
    with pytest.raises(NotTrusted, match="does not speak TLS: leave TLS out"):
        ask(server.address, tls=Tls(ca=workshop.ours.file))


def test_an_unknown_authority(tls: Process, workshop: Workshop, ask: Ask) -> None:
    with pytest.raises(NotTrusted, match=r"none of the trusted authorities .*theirs-ca.pem"):
        ask(tls.address, tls=Tls(ca=workshop.theirs.file))
    with pytest.raises(NotTrusted, match="the public authorities"):
        ask(tls.address, tls=Tls())


def test_a_name_that_is_not_in_the_certificate(tls: Process, workshop: Workshop, ask: Ask) -> None:
    trust = Tls(ca=workshop.ours.file, name="potentials.example")
    with pytest.raises(NotTrusted, match=r"not made out to potentials\.example: .* tls=Tls\(name"):
        ask(tls.address, tls=trust)


def test_a_caller_with_a_certificate(mtls: Process, workshop: Workshop, ask: Ask) -> None:
    own = workshop.ours.issue("ann", names=["spiffe://lab/ann", "ann.example"])
    assert np.isfinite(
        ask(mtls.address, tls=Tls(ca=workshop.ours.file, cert=own.cert, key=own.key)).energy[0]
    )
    # Its first alternative name is who it is.
    deadline = time.monotonic() + 5
    while "identity=spiffe://lab/ann " not in mtls.log() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "identity=spiffe://lab/ann " in mtls.log()


def test_a_caller_without_a_certificate(mtls: Process, workshop: Workshop, ask: Ask) -> None:
    with pytest.raises(NotTrusted, match="asks for a client certificate, it seems"):
        ask(mtls.address, tls=Tls(ca=workshop.ours.file))


def test_a_callers_certificate_of_another_authority(mtls: Process, workshop: Workshop, ask: Ask) -> None:
    own = workshop.theirs.issue("mallory")
    with pytest.raises(
        NotTrusted, match=r"mallory\.pem: it takes those of the authorities in its --tls-client-ca"
    ):
        ask(mtls.address, tls=Tls(ca=workshop.ours.file, cert=own.cert, key=own.key))


def test_a_callers_certificate_that_has_expired(mtls: Process, workshop: Workshop, ask: Ask) -> None:
    own = workshop.ours.issue("late", days=(-2, -1))
    with pytest.raises(NotTrusted, match=r"refuses our certificate .*late\.pem: it has expired"):
        ask(mtls.address, tls=Tls(ca=workshop.ours.file, cert=own.cert, key=own.key))


def test_a_caller_whose_certificate_is_renewed(mtls: Process, workshop: Workshop) -> None:
    own = workshop.ours.issue("renewed")
    trust = Tls(ca=workshop.ours.file, cert=own.cert, key=own.key)

    async def both() -> None:
        async with AsyncClient(mtls.address, tls=trust) as patient:
            with Client(mtls.address, tls=trust) as client:
                for _ in range(3):
                    assert client.predict(STRUCTURE).energy[0] == (await patient.predict(STRUCTURE)).energy[0]
                    before, retiring = client._channel, patient._channel
                    # First the certificate alone, which with the old key is of no use: the old pair goes on.
                    fresh = workshop.ours.issue("fresh")
                    own.cert.write_bytes(fresh.cert.read_bytes())
                    client.predict(STRUCTURE)
                    assert client._channel is before
                    own.key.write_bytes(fresh.key.read_bytes())
                    client.predict(STRUCTURE)
                    await patient.predict(STRUCTURE)
                    assert client._channel is not before
                    assert patient._channel is not retiring

    asyncio.run(both())


def test_a_callers_files_are_checked_at_once(workshop: Workshop) -> None:
    ann, bob = workshop.ours.issue("ann"), workshop.ours.issue("bob")
    locked = workshop.ours.issue("locked", password=b"secret")
    with pytest.raises(ClientError, match=r"bob-key\.pem is not the key of .*ann\.pem"):
        Tls(cert=ann.cert, key=bob.key)
    with pytest.raises(ClientError, match=r"locked-key\.pem is locked by a password"):
        Tls(cert=locked.cert, key=locked.key)
    with pytest.raises(ClientError, match="go together"):
        Tls(cert=ann.cert)
    with pytest.raises(ClientError, match=r"cannot read .*nowhere\.pem: No such file"):
        Tls(ca=workshop.folder / "nowhere.pem")
    with pytest.raises(ClientError, match="holds no certificate"):
        Tls(ca=ann.key)


def test_what_is_closed_is_closed(mtls: Process, workshop: Workshop) -> None:
    assert "http://localhost:" in mtls.lines[0]
    own = workshop.ours.issue("operator")
    trust = Tls(ca=workshop.ours.file, cert=own.cert, key=own.key)
    with grpc.secure_channel(mtls.address, trust.channel_credentials()) as channel:
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            next(reflection.ServerReflectionInfo(iter([question]), timeout=20))
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        # A name that would be a line of its own, and a structure that the operator wants to see.
        forged = "tiny\n2026-01-01 00:00:00,000 INFO equipot.access: Predict identity=root"
        stub = PotentialServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.Predict(request_of([molecule(1)], model=forged), timeout=20)
        stub.Predict(request_of([molecule(9)]), timeout=20)
    position = repr(molecule(9).positions.tolist()[0][0])
    until(lambda: any(position in line and " contents=" in line for line in mtls.log().splitlines()))
    assert "identity=root" not in mtls.log()


def test_a_probe_and_the_command_line(
    tls: Process, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "--address", tls.address, "--tls-ca", str(workshop.ours.file)]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["probe", tls.address, "--structure", "--tls-ca", str(workshop.ours.file)]) == 0
    assert main(["probe", tls.address, "--tls-ca", str(workshop.theirs.file)]) == 1
    assert "none of the trusted authorities" in capsys.readouterr().err
    assert main(["models", "--address", tls.address, "--tls-name", "x"]) == 2
    assert "need --tls-ca" in capsys.readouterr().err


def shown(address: str, ca: Path) -> str:
    """The certificate that a new connection gets, checked by its authority."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        raw = connection.getpeercert(binary_form=True)
    assert raw is not None
    return ssl.DER_cert_to_PEM_cert(raw)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_page_comes_with_the_servers_certificate(tls: Process, workshop: Workshop) -> None:
    assert tls.page.startswith("https://")
    trusting = ssl.create_default_context(cafile=workshop.ours.file)
    with urllib.request.urlopen(tls.page, timeout=10, context=trusting) as reply:
        assert b"<title>equipot</title>" in reply.read()
    request = urllib.request.Request(f"{tls.page}api/models", headers={"X-Equipot-Page": "1"})
    with urllib.request.urlopen(request, timeout=10, context=trusting) as reply:
        assert json.load(reply)["models"][0]["name"] == "tiny"
    with pytest.raises(OSError):
        urllib.request.urlopen(tls.page.replace("https", "http"), timeout=10)


def test_rotation_while_a_client_calls(workshop: Workshop, tls: Process, files: Files) -> None:
    process = tls
    first = files.cert.read_text()
    failures: list[Exception] = []
    n_calls = 0
    stop = threading.Event()

    def call() -> None:
        nonlocal n_calls
        while not stop.is_set():
            try:
                # A connection of its own each time, so that handshakes meet every moment of the change.
                ask_blocking(process.address, tls=Tls(ca=workshop.ours.file))
                n_calls += 1
                time.sleep(0.05)
            except Exception as error:
                failures.append(error)

    with Client(process.address, tls=Tls(ca=workshop.ours.file)) as lasting:
        before = lasting.predict(STRUCTURE).energy[0]
        caller = threading.Thread(target=call)
        caller.start()
        try:
            files.replace(workshop.ours.issue("second"))
            until(lambda: shown(process.address, workshop.ours.file) == files.cert.read_text() != first)
            second = files.cert.read_text()
            # A key that does not fit, then one that has expired: the last good pair stays.
            files.key.write_bytes(workshop.ours.issue("third").key.read_bytes())
            until(lambda: "is not the key of" in process.log())
            assert shown(process.address, workshop.ours.file) == second
            files.replace(workshop.ours.issue("past", days=(-2, -1)))
            until(lambda: "expired on" in process.log())
            assert shown(process.address, workshop.ours.file) == second
            files.replace(workshop.ours.issue("fourth"))
            until(lambda: shown(process.address, workshop.ours.file) == files.cert.read_text() != second)
            until(lambda: shown(urlsplit(process.page).netloc, workshop.ours.file) == files.cert.read_text())
        finally:
            stop.set()
            caller.join()
        assert lasting.predict(STRUCTURE).energy[0] == before
        expires = process.sample("equipot_certificate_expires_timestamp_seconds")
    assert not failures
    assert n_calls > 3
    assert 0.9 * 86_400 < expires - time.time() < 1.1 * 86_400


def broken(workshop: Workshop, how: str) -> TlsFiles:
    good, other = workshop.ours.issue(f"good-{how}"), workshop.ours.issue(f"other-{how}")
    chain = workshop.folder / f"chain-{how}.pem"
    chain.write_bytes(workshop.ours.file.read_bytes() + good.cert.read_bytes())
    match how:
        case "mismatch":
            return TlsFiles(good.cert, other.key)
        case "expired":
            late = workshop.ours.issue("too-late", days=(-2, -1))
            return TlsFiles(late.cert, late.key)
        case "early":
            early = workshop.ours.issue("too-early", days=(1, 2))
            return TlsFiles(early.cert, early.key)
        case "locked":
            locked = workshop.ours.issue("too-locked", password=b"secret")
            return TlsFiles(locked.cert, locked.key)
        case "missing":
            return TlsFiles(workshop.folder / "nowhere.pem", good.key)
        case "folder":
            return TlsFiles(good.cert, workshop.folder)
        case "no-certificate":
            return TlsFiles(good.key, good.key)
        case "no-key":
            return TlsFiles(good.cert, good.cert)
        case "order":
            return TlsFiles(chain, good.key)
        case "cut":
            chain.write_bytes(good.cert.read_bytes() + workshop.ours.file.read_bytes()[:-40])
            return TlsFiles(chain, good.key)
        case "mark":
            chain.write_bytes(b"\xef\xbb\xbf" + good.cert.read_bytes())
            return TlsFiles(chain, good.key)
        case "cut-authority":
            chain.write_bytes(workshop.ours.file.read_bytes() + workshop.theirs.file.read_bytes()[:200])
            return TlsFiles(good.cert, good.key, chain)
        case _:
            return TlsFiles(good.cert, good.key, good.key)


BROKEN = {
    "mismatch": "--tls-key .* is not the key of --tls-cert .*: give the pair",
    "expired": "--tls-cert .* expired on .* UTC: renew it",
    "early": "--tls-cert .* is not valid before .* UTC",
    "locked": "--tls-key .* is locked by a password",
    "missing": "--tls-cert .*nowhere.pem cannot be read: No such file",
    "folder": "--tls-key .* cannot be read: Is a directory",
    "no-certificate": "--tls-cert .* holds no certificate in PEM form",
    "no-key": "--tls-key .* holds no private key in PEM form",
    "order": "has the server's own certificate at place 2: put it first",
    "cut": "--tls-cert .* holds a certificate that is cut off",
    "mark": "--tls-cert .* whose BEGIN does not begin its line",
    "cut-authority": "--tls-client-ca .* holds a certificate that is cut off",
    "no-authority": "--tls-client-ca .* holds no certificate in PEM form",
}


@pytest.mark.parametrize("how", BROKEN)
def test_files_that_cannot_be_used_are_named(workshop: Workshop, how: str) -> None:
    with pytest.raises(ServeError, match=BROKEN[how]):
        Certificates(broken(workshop, how))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (ec.generate_private_key(ec.SECP521R1()), "secp521r1"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
    ],
)
def test_a_key_with_which_no_connection_is_made_is_refused(
    workshop: Workshop, key: PrivateKey, kind: str
) -> None:
    files = workshop.ours.issue(f"kind-{kind}", key=key)
    with pytest.raises(ServeError, match=rf"--tls-cert .* of the kind {kind}, .* RSA or of the curve P-256"):
        Certificates(TlsFiles(files.cert, files.key))


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())]
)
def test_keys_of_these_kinds_make_connections(workshop: Workshop, key: PrivateKey) -> None:
    files = workshop.ours.issue(f"kind-{type(key).__name__}", key=key)
    certificates = Certificates(TlsFiles(files.cert, files.key))
    certificates.web_context()

    async def status() -> grpc.StatusCode:
        server = grpc.aio.server()
        port = server.add_secure_port("127.0.0.1:0", certificates.credentials())
        await server.start()
        trusted = grpc.ssl_channel_credentials(workshop.ours.file.read_bytes())
        try:
            async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusted) as channel:
                await channel.unary_unary("/none/none", None, None)(b"", timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
        finally:
            await server.stop(None)
        raise AssertionError("answered")

    assert asyncio.run(status()) is grpc.StatusCode.UNIMPLEMENTED


def test_https_says_why_it_cannot_use_a_certificate(workshop: Workshop) -> None:
    # Cryptography of today makes none that is weaker; OpenSSL takes none below 2,048 bits.
    files = workshop.ours.issue("weak", key=rsa.generate_private_key(65537, 1024))
    certificates = Certificates(TlsFiles(files.cert, files.key))
    with pytest.raises(ServeError, match=r"HTTPS cannot use .*: EE_KEY_TOO_SMALL"):
        certificates.web_context()


@pytest.mark.slow
def test_a_server_does_not_start_with_them(workshop: Workshop, bundles: Bundles, tmp_path: Path) -> None:
    files = broken(workshop, "expired")
    words = ["--port", 0, "--no-metrics", "--tls-cert", files.certificate, "--tls-key", files.key]
    popen = launch(bundles.tiny, *words, stderr=tmp_path / "log")
    assert popen.wait(timeout=60) == 2
    assert "expired on" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    popen.stdout.close()  # type: ignore[union-attr]  # it is a pipe


def test_a_change_of_symlinks_as_kubernetes_makes_it(workshop: Workshop, tmp_path: Path) -> None:
    for name, files in (
        ("one", workshop.ours.issue("one")),
        ("two", workshop.ours.issue("two", days=(-1, 9))),
    ):
        (tmp_path / name).mkdir()
        shutil.copy(files.cert, tmp_path / name / "tls.crt")
        shutil.copy(files.key, tmp_path / name / "tls.key")
    (tmp_path / "..data").symlink_to("one")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    certificates = Certificates(TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key"))
    before = certificates.expires
    assert not certificates.refresh()
    (tmp_path / "..data_tmp").symlink_to("two")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert certificates.refresh()
    assert certificates.expires - before == pytest.approx(8 * 86_400, abs=60)
    assert HERE[0] == "localhost"
    assert POLL_SECONDS <= 1.0
