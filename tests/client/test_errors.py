"""What goes wrong on the way: which errors are tried again, for how long, and what the rest become."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms

from equipot.client import (
    AsyncClient,
    Client,
    ClientError,
    DeadlineExceeded,
    Failure,
    FailureReason,
    InvalidRequest,
    InvalidStructure,
    LimitExceeded,
    ModelNotFound,
    Refused,
    RetryPolicy,
    ServerError,
    ServerUnavailable,
    StructureFailure,
)

QUICK = RetryPolicy(initial_delay=0.01, max_delay=0.02)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

Ask = Callable[..., Any]


def ask_blocking(address: str, structures: Any, **options: Any) -> Any:
    with Client(address, **options) as client:
        return client.predict(structures)


def ask_async(address: str, structures: Any, **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(address, **options) as client:
            return await client.predict(structures)

    return asyncio.run(run())


@pytest.fixture(params=[ask_blocking, ask_async], ids=["blocking", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    kind: Ask = request.param
    return kind


@pytest.fixture
def atoms(cluster: Callable[..., Atoms]) -> Atoms:
    return cluster(4)


def test_unavailable_is_tried_again(server: Any, atoms: Atoms, ask: Ask) -> None:
    server.fail(UNAVAILABLE, times=3)
    assert np.isfinite(ask(server.address, atoms, retry=QUICK).energy[0])
    assert len(server.seen) == 4


def test_unavailable_is_given_up_after_so_many_attempts(server: Any, atoms: Atoms, ask: Ask) -> None:
    server.fail(UNAVAILABLE, times=9)
    with pytest.raises(ServerUnavailable, match="not available: as ordered"):
        ask(server.address, atoms, retry=RetryPolicy(attempts=3, initial_delay=0.01))
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, ModelNotFound),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, LimitExceeded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNKNOWN, ServerError),
        (grpc.StatusCode.ABORTED, ServerError),
        (grpc.StatusCode.PERMISSION_DENIED, Refused),
    ],
)
def test_nothing_else_is_tried_again(
    server: Any, atoms: Atoms, ask: Ask, code: grpc.StatusCode, kind: type[ClientError]
) -> None:
    server.fail(code)
    with pytest.raises(kind, match="as ordered") as caught:
        ask(server.address, atoms, retry=QUICK)
    assert type(caught.value) is kind
    assert len(server.seen) == 1
    if isinstance(caught.value, ServerError):
        assert caught.value.code == code.name


def test_rich_details_reach_the_error(
    server: Any,
    atoms: Atoms,
    ask: Ask,
    make_retry_info: Callable[[float], Any],
    make_bad_request: Callable[[str], Any],
) -> None:
    server.fail(grpc.StatusCode.INVALID_ARGUMENT, make_bad_request("structures.cell"))
    with pytest.raises(InvalidRequest) as invalid:
        ask(server.address, atoms)
    assert invalid.value.field == "structures.cell"
    server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, make_retry_info(1.25))
    with pytest.raises(LimitExceeded, match=r"again in 1\.25 s") as limit:
        ask(server.address, atoms, retry=RetryPolicy(attempts=1))
    assert limit.value.retry_after == 1.25
    server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
    with pytest.raises(LimitExceeded) as never:
        ask(server.address, atoms)
    assert never.value.retry_after is None


@pytest.mark.parametrize("code", [UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_the_servers_wish_to_wait_is_honoured(
    server: Any,
    atoms: Atoms,
    ask: Ask,
    make_retry_info: Callable[[float], Any],
    code: grpc.StatusCode,
) -> None:
    server.fail(code, make_retry_info(0.4))
    began = time.monotonic()
    ask(server.address, atoms, retry=QUICK)
    assert time.monotonic() - began >= 0.4


def test_a_wait_beyond_the_deadline_is_not_begun(
    server: Any, atoms: Atoms, ask: Ask, make_retry_info: Callable[[float], Any]
) -> None:
    server.fail(UNAVAILABLE, make_retry_info(30))
    began = time.monotonic()
    with pytest.raises(ServerUnavailable) as caught:
        ask(server.address, atoms, timeout=5)
    assert time.monotonic() - began < 3
    assert caught.value.retry_after == 30


def test_every_call_has_a_deadline(server: Any, atoms: Atoms, ask: Ask) -> None:
    ask(server.address, atoms)
    ask(server.address, atoms, timeout=7)
    assert 55 < server.seen[0].time_left <= 60.5
    assert 4 < server.seen[1].time_left <= 7.5


def test_a_deadline_ends_a_call(server: Any, atoms: Atoms, ask: Ask) -> None:
    server.delay = 1.5
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="raise the timeout"):
        ask(server.address, atoms, timeout=0.5)
    assert time.monotonic() - began < 1.4


def test_a_deadline_counts_all_attempts(server: Any, atoms: Atoms, ask: Ask) -> None:
    server.fail(UNAVAILABLE, times=1000)
    began = time.monotonic()
    with pytest.raises((ServerUnavailable, DeadlineExceeded)):
        ask(server.address, atoms, timeout=0.6, retry=RetryPolicy(attempts=1000, initial_delay=0.05))
    assert time.monotonic() - began < 1.5
    lefts = [seen.time_left for seen in server.seen]
    assert len(lefts) > 3
    assert lefts == sorted(lefts, reverse=True)


def test_no_server_is_said_in_one_line(unused_address: str, atoms: Atoms, ask: Ask) -> None:
    with pytest.raises(ServerUnavailable) as caught:
        ask(unused_address, atoms, retry=RetryPolicy(attempts=2, initial_delay=0.01))
    said = str(caught.value)
    assert said.startswith(f"cannot reach {unused_address}: is 'equipot serve' running?")
    assert "\n" not in said


def test_something_that_speaks_no_grpc_is_no_hang(atoms: Atoms, ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises((ServerUnavailable, DeadlineExceeded)):
            ask(address, atoms, timeout=1)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_restart_in_the_middle_of_a_batch_is_bridged(
    server: Any, cluster: Callable[..., Atoms], streamed: bool
) -> None:
    frames = [cluster(5, seed=i) for i in range(40)]
    restarting = threading.Event()

    def source() -> Iterator[Atoms]:
        yield from frames[:20]
        server.stop()
        threading.Timer(0.7, server.start).start()
        restarting.set()
        yield from frames[20:]

    with Client(server.address, atoms_per_request=20) as client:
        expected = client.predict(frames).energy.tolist()
        if streamed:
            energies = [one.energy for one in client.predict_iter(source())]
        else:
            energies = client.predict(source()).energy.tolist()
    assert restarting.is_set()
    assert energies == expected


def test_an_unavailable_part_does_not_disturb_the_order(server: Any, cluster: Callable[..., Atoms]) -> None:
    frames = [cluster(5, seed=i) for i in range(40)]
    with Client(server.address, atoms_per_request=20, retry=QUICK) as client:
        expected = client.predict(frames).energy.tolist()
        server.fail(UNAVAILABLE, times=3)
        assert client.predict(frames).energy.tolist() == expected


def test_an_unknown_model_says_what_there_is(server: Any, atoms: Atoms, ask: Ask) -> None:
    with pytest.raises(ModelNotFound, match="no model 'other': this server has lennard-jones"):
        ask(server.address, atoms, model="other")


def test_a_bundle_can_be_asked_for_by_its_digest(server: Any, atoms: Atoms, ask: Ask) -> None:
    old = server.pinned
    ask(server.address, atoms, model=old)
    server.digest = "sha256:" + "cd" * 32
    with pytest.raises(ModelNotFound):
        ask(server.address, atoms, model=old)


@pytest.mark.parametrize(
    "error",
    [
        ServerUnavailable("gone", retry_after=2.0),
        LimitExceeded("full", retry_after=2.0),
        InvalidRequest("bad", field="cell"),
        ServerError("broken", code="UNKNOWN"),
        InvalidStructure("cell", "is bent", "straighten it"),
        StructureFailure(Failure(3, FailureReason.UNSUPPORTED, "charge", "is 9", "use 0"), others=2),
    ],
)
def test_errors_survive_the_way_between_processes(error: ClientError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert copy.exit_code == 2


def test_backoff_grows_to_its_bound_with_jitter_and_ends() -> None:
    policy = RetryPolicy(attempts=6, initial_delay=0.1, multiplier=2, max_delay=0.5)
    error = ServerUnavailable("gone")
    for attempt, longest in enumerate([0.1, 0.2, 0.4, 0.5, 0.5], start=1):
        delays = [policy.delay(error, attempt, remaining=100) for _ in range(200)]
        known = [delay for delay in delays if delay is not None]
        assert len(known) == 200
        assert longest / 2 <= min(known) < max(known) <= longest
        assert max(known) - min(known) > longest / 4
    assert policy.delay(error, 6, remaining=100) is None
    assert policy.delay(error, 1, remaining=0.01) is None
    assert policy.delay(LimitExceeded("too large"), 1, remaining=100) is None
    assert policy.delay(LimitExceeded("full", retry_after=5.0), 1, remaining=4.0) is None
    patient = policy.delay(ServerUnavailable("busy", retry_after=9.0), 1, remaining=100)
    assert patient is not None
    assert 9.0 < patient <= 9.1


@pytest.mark.parametrize(
    "fields", [{"attempts": 0}, {"initial_delay": -1}, {"initial_delay": 9.0}, {"multiplier": 0.5}]
)
def test_a_policy_out_of_range_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        RetryPolicy(**fields)
