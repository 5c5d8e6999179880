"""Who calls, and what each may ask for: tokens, limits, ids and log lines, on a real port."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.serve.conftest import Bundles, Process, ask, molecule, running
from tests.serve.test_sessions import Talk, opening, stepping

from equipot.cli.main import main
from equipot.client import (
    Client,
    ClientError,
    LimitExceeded,
    RetryPolicy,
    Session,
    Structure,
    Unauthenticated,
)
from equipot.serve.config import ServeConfig
from equipot.serve.errors import ServeError
from equipot.serve.ray_app.local import _names
from equipot.serve.tokens import Tokens, digest_of
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

ONCE = RetryPolicy(attempts=1)
ANN, BOB, ROOT = "ann-" + "a" * 20, "bob-" + "b" * 20, "root-" + "c" * 20
PACED, SINGLE, MOVER = "paced-" + "d" * 20, "single-" + "e" * 20, "mover-" + "f" * 20
SAVER = "saver-" + "g" * 20
LIMITS = """
[default]
requests_per_second = 0.001
burst_seconds = 2000        # two at once, then one in a quarter of an hour

[identities.root]

[identities.paced]
requests_per_second = 2
burst_seconds = 1

[identities.mover]
requests_per_second = 2
burst_seconds = 1

[identities.saver]
atoms_per_second = 0.01
burst_seconds = 600

[identities.single]
concurrent_requests = 1
concurrent_streams = 1
request_edges = 400

[identities.bob]
atoms_per_second = 0.5
burst_seconds = 10
request_atoms = 50
request_edges = 40
"""


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(
        f"# who may call\nann: {ANN}\nbob: {BOB}\nroot: {ROOT}\npaced: {PACED}\nsingle: {SINGLE}\n"
        f"mover: {MOVER}\nsaver: {SAVER}\n"
    )
    return path


@pytest.fixture(scope="module")
def guarded(
    bundles: Bundles, tokens_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("guarded")
    limits = folder / "limits.toml"
    limits.write_text(LIMITS)
    words = ["--tokens", tokens_file, "--identity-limits", limits, "--log-format", "json", "--threads", 1]
    with running(bundles.tiny, *words, stderr=folder / "log") as process:
        yield process


@pytest.fixture
def stub(guarded: Process) -> Iterator[PotentialServiceStub]:
    with grpc.insecure_channel(guarded.address) as channel:
        yield PotentialServiceStub(channel)


def bearer(token: str, **more: str) -> tuple[tuple[str, str], ...]:
    return (
        ("authorization", f"Bearer {token}"),
        *((name.replace("_", "-"), text) for name, text in more.items()),
    )


def details(error: Any, kind: Any) -> Any:
    """The one detail of this kind in a status."""
    (raw,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    (packed,) = [detail for detail in status_pb2.Status.FromString(raw).details if detail.Is(kind.DESCRIPTOR)]
    found = kind()
    packed.Unpack(found)
    return found


def refused(stub: PotentialServiceStub, metadata: Any, n_atoms: int = 6) -> Any:
    with pytest.raises(grpc.RpcError) as error:
        stub.Predict(ask([molecule(1, n_atoms)]), timeout=20, metadata=metadata)
    return error.value


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def entries(process: Process) -> list[dict[str, Any]]:
    """The log, each line of which must be JSON; the last one may be half written yet."""
    return [json.loads(line) for line in process.log().splitlines(keepends=True) if line.endswith("\n")]


def entry(process: Process, request_id: str) -> dict[str, Any]:
    until(lambda: any(line.get("request_id") == request_id for line in entries(process)))
    (found,) = [line for line in entries(process) if line.get("request_id") == request_id]
    return found


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ((), "answers callers with a bearer token alone, and the call has none"),
        (bearer("wrong-" + "x" * 20), "not known here"),
        (bearer(ANN[:-1]), "not known here"),
        ((("authorization", f"Basic {ANN}"),), "not of the form `Bearer TOKEN`"),
        ((("authorization", ""),), "the call has none"),
    ],
)
def test_strangers_are_turned_away(stub: PotentialServiceStub, metadata: Any, says: str) -> None:
    error = refused(stub, metadata)
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert says in error.details()
    assert details(error, error_details_pb2.ErrorInfo).reason == "UNAUTHENTICATED"


def test_a_stranger_is_not_listened_to(guarded: Process) -> None:
    """It is told so before its message has come, which may be large or may never end."""
    with grpc.insecure_channel(guarded.address) as channel:
        call = channel.stream_unary("/equipot.wire.v1.PotentialService/Predict", bytes, bytes)

        def for_ever() -> Iterator[bytes]:
            while True:
                time.sleep(0.1)
                yield b""

        with pytest.raises(grpc.RpcError) as error:
            call(iter(for_ever()), timeout=20)
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_health_is_open_and_the_rest_is_not(guarded: Process) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        state = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert state.status == health_pb2.HealthCheckResponse.SERVING
        for probe in ("ServerLive", "ServerReady"):
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{probe}", bytes, bytes)
            assert call(b"", timeout=20) == b"\x08\x01"
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            next(reflection.ServerReflectionInfo(iter([question]), timeout=20))
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = next(reflection.ServerReflectionInfo(iter([question]), timeout=20, metadata=bearer(ROOT)))
        names = {service.name for service in answer.list_services_response.service}
        assert "equipot.wire.v1.PotentialService" in names
        with pytest.raises(grpc.RpcError) as error:
            PotentialServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=20)
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_clients_show_their_token(
    guarded: Process, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(guarded.address, token=ROOT) as client:
        assert client.model().name == "tiny"
    with Client(guarded.address) as client, pytest.raises(Unauthenticated, match="--token-file") as error:
        client.model()
    assert re.fullmatch("[0-9a-f]{16}", error.value.request_id)
    own = tmp_path / "token"
    own.write_text("outdated-" + "x" * 20)
    with Client(guarded.address, token_file=own) as client:
        with pytest.raises(Unauthenticated, match="not known here"):
            client.model()
        # Changed on disk, as by whoever rotates secrets: the next call shows the new one.
        own.write_text(f"{ROOT}\n")
        assert client.model().name == "tiny"
    words = ["models", "--address", guarded.address]
    assert main([*words, "--token-file", str(own)]) == 0
    monkeypatch.setenv("EQUIPOT_TOKEN", ROOT)
    assert main(words) == 0
    monkeypatch.setenv("EQUIPOT_TOKEN", "wrong-" + "x" * 20)
    capsys.readouterr()
    assert main(words) == 2
    assert "not known here" in capsys.readouterr().err


def test_a_token_does_not_leave_the_machine_in_plaintext() -> None:
    with pytest.raises(ClientError, match=r"would travel to potentials\.example:50051 unencrypted"):
        Client("potentials.example:50051", token=ANN)
    Client("potentials.example:50051", token=ANN, allow_plaintext_token=True).close()
    assert ANN not in repr(Client("localhost:50051", token=ANN)._settings)
    with pytest.raises(ServeError, match=r"tokens would travel to 0\.0\.0\.0 unencrypted"):
        ServeConfig(bundles=(Path("x"),), host="0.0.0.0", tokens=Path("tokens"))
    ServeConfig(bundles=(Path("x"),), host="0.0.0.0", tokens=Path("tokens"), allow_plaintext_tokens=True)


def opened_with(guarded: Process, stub: PotentialServiceStub, token: str) -> Talk:
    """A session of a caller with this token, which has had one answer."""
    talk = Talk(stub, opening([molecule(1)]), metadata=bearer(token))
    talk.step(stepping([molecule(1)]))
    return talk


def test_tokens_are_read_again(
    guarded: Process, tokens_file: Path, stub: PotentialServiceStub, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["token", "root", "--tokens", str(tokens_file)]) == 0
    made = capsys.readouterr().out.strip()
    assert made not in tokens_file.read_text()

    def is_known(token: str) -> bool:
        try:
            stub.ListModels(pb.ListModelsRequest(), timeout=20, metadata=bearer(token))
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.UNAUTHENTICATED
        return True

    until(lambda: is_known(made))
    assert is_known(ROOT)
    withdrawn, kept, moving = (opened_with(guarded, stub, token) for token in (made, ROOT, made))
    relaxing: Any = stub.Relax(
        pb.RelaxRequest(model="tiny", structures=ask([molecule(1)]).structures, fmax=1e-9, max_steps=10**5),
        timeout=60,
        metadata=bearer(made),
    )
    next(relaxing)
    good = tokens_file.read_text()
    # A file that cannot be used lets in and keeps out whom the last good one did, and says why in the log.
    tokens_file.write_text("root: short\n")
    until(lambda: "the old one stays" in guarded.log())
    assert "short" not in guarded.log()
    assert is_known(made)
    # Withdrawn.
    tokens_file.write_text("\n".join(line for line in good.splitlines() if "sha256" not in line))
    until(lambda: not is_known(made))
    assert is_known(ROOT)
    # Streams are looked at when the file is: those of the token end, and no other of its owner.
    for stream in (withdrawn.call, moving.call, relaxing):
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "withdrawn" in (caught.value.details() or "")
    assert kept.step(stepping([molecule(1)], number=7)).number == 7
    kept.close()
    assert guarded.sample("equipot_streams_total", method="session", outcome="unauthenticated") == 2
    assert guarded.sample("equipot_streams_total", method="relax", outcome="unauthenticated") == 1
    assert guarded.sample("equipot_moving_structures") == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no token: add one with `equipot token"),
        ("ann\n", "line 1: no colon"),
        (f"\n# x\nann bob: {ANN}", "line 3: what stands before the colon is no identity"),
        ("ann: short", "the token of ann has 5 characters, and needs 16"),
        ("ann: sha256:abc", "not 64 hexadecimal digits"),
        ("ann: SHA256:abcdef0123456789", "not 64 hexadecimal digits"),
        (f"ann: {ANN} x", "has a space"),
        (f"ann: {ANN}\nbob: {ANN}", "line 2: bob has the same token as ann"),
    ],
)
def test_a_wrong_tokens_file_is_explained(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ServeError, match=says) as error:
        Tokens.read(path)
    assert ANN not in str(error.value)


def test_a_digest_is_one_in_any_letters_and_a_mark_before_the_text_is_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    digest = digest_of(ANN)
    path.write_bytes(b"\xef\xbb\xbfann: SHA256:" + digest.hex().upper().encode())
    tokens = Tokens.read(path)
    assert tokens.owner_of(digest) == "ann"
    assert tokens.owner_of(digest_of(f"SHA256:{digest.hex().upper()}")) is None


def test_requests_a_second_of_each_identity(
    bundles: Bundles, tokens_file: Path, stub: PotentialServiceStub
) -> None:
    request = ask([molecule(1)])
    for _ in range(2):
        stub.Predict(request, timeout=20, metadata=bearer(ANN))
    error = refused(stub, bearer(ANN))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "ann may have 0.001 requests per second, and that is used up" in error.details()
    assert 900 < details(error, error_details_pb2.RetryInfo).retry_delay.seconds <= 1000
    facts = details(error, error_details_pb2.ErrorInfo)
    assert facts.reason == "OVER_QUOTA"
    assert dict(facts.metadata) == {
        "identity": "ann",
        "limit": "requests_per_second",
        "requests_per_second": "0.001",
    }
    for _ in range(5):
        stub.Predict(request, timeout=20, metadata=bearer(ROOT))


def test_atoms_and_edges_of_one_identity(guarded: Process, stub: PotentialServiceStub) -> None:
    error = refused(stub, bearer(BOB), n_atoms=51)
    assert "the request has 51 atoms, the limit of bob is 50" in error.details()
    error = refused(stub, bearer(BOB), n_atoms=12)
    assert re.search(r"the request has \d+ edges or more, the limit of bob is 40", error.details())
    assert dict(details(error, error_details_pb2.ErrorInfo).metadata)["request_edges"] == "40"
    with pytest.raises(grpc.RpcError, match=r"edges or more, the limit of single is 400") as told:
        stub.Explain(ask([molecule(1, 200)]), timeout=20, metadata=bearer(SINGLE))
    assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    # The twelve were paid for all the same, of five that were saved: now it has to wait.
    with (
        Client(guarded.address, token=BOB, retry=ONCE) as client,
        pytest.raises(LimitExceeded, match="atoms per second, and that is used up") as late,
    ):
        client.predict(Structure(molecule(1).atomic_numbers, molecule(1).positions))
    assert late.value.retry_after is not None
    assert 1 < late.value.retry_after <= 14


def test_a_client_keeps_to_its_rate(guarded: Process) -> None:
    """The server says when, and the client waits: a batch or a trajectory takes longer and does not fail."""
    structure = Structure(molecule(1).atomic_numbers, molecule(1).positions)
    with Client(guarded.address, token=PACED) as client:
        client.model()
        begun = time.monotonic()
        for _ in range(4):
            client.predict(structure)
        assert time.monotonic() - begun > 1.0


def exhaust(session: Session) -> None:
    """More steps than are let in."""
    for _ in range(200):
        session.predict(molecule(1).positions)


def test_each_step_of_a_session_counts(guarded: Process) -> None:
    structure = Structure(molecule(1).atomic_numbers, molecule(1).positions)
    with (
        Client(guarded.address, token=PACED, retry=ONCE) as client,
        client.session(structure) as session,
        pytest.raises(LimitExceeded, match="paced may have 2 requests per second") as late,
    ):
        exhaust(session)
    assert late.value.retry_after is not None
    assert late.value.retry_after <= 0.5
    with Client(guarded.address, token=PACED) as client, client.session(structure) as session:
        begun = time.monotonic()
        for _ in range(4):
            session.predict(molecule(1).positions)
        assert time.monotonic() - begun > 1.0


def test_a_session_is_charged_for_its_steps_and_not_for_being_opened(guarded: Process) -> None:
    structure = Structure(molecule(1).atomic_numbers, molecule(1).positions)
    with (
        Client(guarded.address, token=SAVER, retry=ONCE) as client,
        client.session(structure) as session,
    ):
        # Just what there is, six atoms; then what anything left is good for; then the debt must be paid.
        session.predict(molecule(1).positions)
        session.predict(molecule(1).positions)
        with pytest.raises(LimitExceeded, match="atoms per second"):
            session.predict(molecule(1).positions)


def test_each_step_of_a_relaxation_counts(guarded: Process, stub: PotentialServiceStub) -> None:
    begun = time.monotonic()
    structures = ask([molecule(1)]).structures
    request = pb.RelaxRequest(model="tiny", structures=structures, fmax=1e-9, max_steps=5)
    replies = list(stub.Relax(request, timeout=60, metadata=bearer(MOVER, x_request_id="relax-1")))
    assert [reply.result.steps for reply in replies if reply.HasField("result")] == [5]
    # Two at once, then four by the rate.
    assert time.monotonic() - begun > 1.5
    told = entry(guarded, "relax-1")
    assert (told["model"], told["structures"], told["atoms"], told["steps"]) == ("tiny", 1, 6, 6)
    moved = {"model": "tiny", "method": "relax", "outcome": "ok"}
    assert guarded.sample("equipot_streams_total", **moved) == 1
    assert guarded.sample("equipot_moved_structures_total", **moved) == 1
    assert guarded.sample("equipot_stream_seconds_sum", model="tiny", method="relax") > 1.5


def test_under_ray_the_operator_hears_that_a_server_with_tokens_answers(guarded: Process) -> None:
    host, _, port = guarded.address.rpartition(":")
    assert _names(host, int(port), "equipot", threading.Event()) == "callers with a token"


def test_calls_at_once_of_one_identity(guarded: Process, stub: PotentialServiceStub) -> None:
    structure = Structure(molecule(1).atomic_numbers, molecule(1).positions)
    with Client(guarded.address, token=SINGLE, retry=ONCE) as client:
        with client.session(structure) as session:
            session.predict(molecule(1).positions)
            # A session that is held leaves the requests alone, and lets no second one be opened.
            client.predict(structure)
            with (
                pytest.raises(LimitExceeded, match="single may have 1 concurrent streams"),
                client.session(structure) as another,
            ):
                another.predict(molecule(1).positions)
        # Counted no longer, once the session has ended.
        with Client(guarded.address, token=SINGLE) as patient, patient.session(structure) as session:
            session.predict(molecule(1).positions)


def test_ids_are_kept_or_made(guarded: Process, stub: PotentialServiceStub) -> None:
    _, call = stub.Predict.with_call(
        ask([molecule(1), molecule(2)]), timeout=20, metadata=bearer(ROOT, x_request_id="run-7/step:3")
    )
    assert ("x-request-id", "run-7/step:3") in call.trailing_metadata()
    line = entry(guarded, "run-7/step:3")
    assert line.pop("ms") > 0
    assert re.fullmatch(r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "INFO",
        "logger": "equipot.access",
        "message": "Predict",
        "request_id": "run-7/step:3",
        "identity": "root",
        "model": "tiny",
        "structures": 2,
        "atoms": 12,
        "outcome": "ok",
    }
    for odd in ("", "a b", "x" * 129, 'quote"'):
        error = refused(stub, (*bearer("nobody" * 5), ("x-request-id", odd)))
        made = details(error, error_details_pb2.RequestInfo).request_id
        assert re.fullmatch("[0-9a-f]{16}", made)
        assert ("x-request-id", made) in error.trailing_metadata()
        line = entry(guarded, made)
        assert line["outcome"] == "unauthenticated"
        assert line["peer"].startswith("ipv4:127.0.0.1:")


def test_an_error_names_its_call(guarded: Process, stub: PotentialServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub.Predict(
            ask([molecule(1)], model="unheard-of"), timeout=20, metadata=bearer(ROOT, x_request_id="error-1")
        )
    assert details(error.value, error_details_pb2.RequestInfo).request_id == "error-1"
    line = entry(guarded, "error-1")
    assert (line["outcome"], line["model"], line["identity"]) == ("not_served", "", "root")


def test_refusals_are_counted(guarded: Process, stub: PotentialServiceStub) -> None:
    before = guarded.sample("equipot_requests_total", outcome="unauthenticated")
    refused(stub, ())
    assert guarded.sample("equipot_requests_total", outcome="unauthenticated") == before + 1


def test_nothing_of_a_structure_is_logged(guarded: Process, stub: PotentialServiceStub) -> None:
    system = molecule(5)
    stub.Predict(ask([system]), timeout=20, metadata=bearer(ROOT, x_request_id="secret-1"))
    entry(guarded, "secret-1")
    assert str(float(system.positions[0, 0]))[:8] not in guarded.log()
    assert ANN not in guarded.log()
