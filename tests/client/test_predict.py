"""Batches: cut, sent a few at a time, answered in order, each structure for itself; both kinds of client."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from equipot.client import (
    AsyncClient,
    Client,
    ClientError,
    FailureReason,
    Health,
    LimitExceeded,
    ModelChanged,
    Prediction,
    ServerError,
    Structure,
    StructureFailure,
)
from equipot.client.structures import as_structure, pack


@pytest.fixture
def frames(cluster: Callable[..., Atoms]) -> list[Atoms]:
    return [cluster(2 + i % 7, seed=i) for i in range(60)]


def predict_async(address: str, structures: Any, **options: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(address, atoms_per_request=20) as client:
            return await client.predict(structures, **options)

    return asyncio.run(run())


def test_many_parts_come_back_in_order_and_right(
    server: Any, frames: list[Atoms], make_local: Callable[[], Any]
) -> None:
    with Client(server.address, atoms_per_request=20) as client:
        answer = client.predict(frames)
    assert len(server.seen) > 10
    assert max(sum(seen.n_atoms) for seen in server.seen) <= 20
    assert len(answer) == len(frames)
    assert not answer.failures
    for frame, prediction in zip(frames, answer, strict=True):
        frame.calc = make_local()
        assert prediction.energy == frame.get_potential_energy()
        assert prediction.forces is not None
        np.testing.assert_array_equal(prediction.forces, frame.get_forces())
        assert prediction.stress is None
        assert prediction.model is not None
        assert prediction.model.pinned == server.pinned


def test_flat_arrays_and_items_are_the_same_numbers(server: Any, frames: list[Atoms]) -> None:
    with Client(server.address, atoms_per_request=20) as client:
        answer = client.predict(frames)
    assert answer.forces is not None
    np.testing.assert_array_equal(answer.forces, np.concatenate([prediction.forces for prediction in answer]))
    np.testing.assert_array_equal(answer[-3].forces, list(answer)[57].forces)
    assert [one.energy for one in answer[10:12]] == answer.energy[10:12].tolist()
    with pytest.raises(IndexError):
        answer[60]


def test_async_answers_are_the_same_bits(server: Any, frames: list[Atoms], crystal: Atoms) -> None:
    batch = [*frames, crystal, Atoms("He"), {"atomic_numbers": [18], "positions": [[0, 0, np.nan]]}]
    with Client(server.address, atoms_per_request=20) as client:
        blocking = client.predict(batch, stress=True)
    asynchronous = predict_async(server.address, batch, stress=True)
    assert blocking.failures == asynchronous.failures
    assert [failure.index for failure in blocking.failures] == [61, 62]
    assert blocking.model == asynchronous.model
    for name in ("n_atoms", "energy", "forces", "stress"):
        np.testing.assert_array_equal(getattr(blocking, name), getattr(asynchronous, name))


@pytest.mark.parametrize("kind", ["structures", "arrays", "dicts", "generator", "single"])
def test_every_kind_of_batch_gets_the_same_answer(server: Any, frames: list[Atoms], kind: str) -> None:
    structures = [as_structure(frame) for frame in frames[:5]]
    batch: Any = {
        "structures": structures,
        "arrays": pack(structures),
        "dicts": [{"atomic_numbers": frame.numbers, "positions": frame.positions} for frame in frames[:5]],
        "generator": (frame for frame in frames[:5]),
        "single": frames[0],
    }[kind]
    with Client(server.address) as client:
        answer, expected = client.predict(batch), client.predict(frames[: 1 if kind == "single" else 5])
    np.testing.assert_array_equal(answer.energy, expected.energy)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(
    server: Any, frames: list[Atoms], in_flight: int
) -> None:
    server.delay = 0.03
    with Client(server.address, atoms_per_request=20, in_flight=in_flight) as client:
        client.predict(frames)
    assert server.most_at_once <= in_flight
    assert server.most_at_once > 1 or in_flight == 1


def test_no_more_requests_are_under_way_than_allowed_async(server: Any, frames: list[Atoms]) -> None:
    server.delay = 0.03
    predict_async(server.address, frames)
    assert 1 < server.most_at_once <= 4


def test_limits_are_asked_for_once_and_what_a_name_means_for_each_batch_of_several_parts(
    server: Any, frames: list[Atoms]
) -> None:
    server.limits.max_structures_per_request = 7
    with Client(server.address) as client:
        for _ in range(3):
            assert len(client.predict(frames[:7])) == 7
        assert server.model_calls == 1
        for _ in range(3):
            assert len(client.predict(frames)) == 60
    assert server.model_calls == 1 + 3
    assert {len(seen.n_atoms) for seen in server.seen} == {7, 60 % 7}
    assert {seen.model for seen in server.seen} == {"", server.pinned}


def test_requests_stay_within_the_servers_message_limit(server: Any, cluster: Callable[..., Atoms]) -> None:
    server.limits.max_message_bytes = 12_000
    with Client(server.address) as client:
        answer = client.predict([cluster(100, seed=i) for i in range(6)])
    assert not answer.failures
    assert [len(seen.n_atoms) for seen in server.seen] == [2, 2, 2]


def test_a_structure_too_large_fails_alone(server: Any, cluster: Callable[..., Atoms]) -> None:
    small, large = cluster(3), Structure(np.full(501, 18), np.zeros((501, 3)))
    with Client(server.address) as client:
        answer = client.predict([small, large, small])
    assert [(failure.index, failure.reason) for failure in answer.failures] == [(1, FailureReason.TOO_LARGE)]
    assert "501 atoms, the server takes 500" in answer.failures[0].message
    assert answer.energy[0] == answer.energy[2]
    assert np.isnan(answer.energy[1])
    assert max(seen.n_atoms for seen in server.seen) == [3, 3]


def test_a_structure_over_the_clients_own_message_limit_fails_alone(
    server: Any, cluster: Callable[..., Atoms]
) -> None:
    server.limits.max_atoms_per_structure = server.limits.max_atoms_per_request = 10_000
    large = Structure(np.full(3000, 18), np.zeros((3000, 3)))
    with Client(server.address, max_message_bytes=2**16) as client:
        answer = client.predict([large, cluster(3)])
    assert [failure.index for failure in answer.failures] == [0]
    assert "raise max_message_bytes" in answer.failures[0].remedy


def test_bad_structures_fail_by_index_wherever_they_are_caught(
    server: Any, cluster: Callable[..., Atoms]
) -> None:
    nan = cluster(3)
    nan.positions[2, 1] = np.nan
    charged = cluster(2)
    charged.info["charge"] = "many"
    batch: list[Any] = []
    for i in range(12):
        batch += [cluster(3, seed=i), nan, Atoms("He2", [[0, 0, 0], [0, 0, 4]]), Atoms(), "argon", charged]
    with Client(server.address, atoms_per_request=10) as client:
        answer = client.predict(batch)
        streamed = list(client.predict_iter(iter(batch)))
    fields = ["positions", "atomic_numbers", "atomic_numbers", "structures", "charge"]
    assert [failure.index for failure in answer.failures] == [i for i in range(72) if i % 6]
    assert [failure.field for failure in answer.failures] == fields * 12
    assert all(failure.remedy and failure.message for failure in answer.failures)
    assert [one.failure for one in streamed if one.failure] == list(answer.failures)
    good = [answer[i].energy for i in range(0, 72, 6)]
    assert np.isfinite(good).all()
    assert len(set(good)) == 12
    assert answer.forces is not None
    assert np.isnan(answer.forces).sum() == 12 * 3 * (3 + 2 + 2)
    # The flat arrays line up with the caller's own, failures or not.
    assert answer.n_atoms.tolist()[:6] == [3, 3, 2, 0, 0, 2]
    with pytest.raises(StructureFailure, match=r"structure 1: positions.*59 more") as caught:
        answer.raise_for_failures()
    assert (caught.value.index, caught.value.field) == (1, "positions")
    assert caught.value.reason is FailureReason.INVALID_STRUCTURE
    with pytest.raises(StructureFailure, match="structure 2: atomic_numbers: helium"):
        streamed[2].raise_for_failure()
    answer[0].raise_for_failure()


def test_nothing_but_bad_structures_sends_nothing(server: Any) -> None:
    with Client(server.address) as client:
        answer = client.predict([Atoms(), Atoms()], stress=True)
        empty = client.predict([], stress=True)
    assert server.seen == []
    assert (len(answer.failures), answer.model) == (2, None)
    assert (len(empty), empty.failures, empty.model) == (0, (), None)
    assert empty.forces is not None
    assert empty.forces.shape == (0, 3)


def test_only_what_is_asked_for_is_computed(server: Any, crystal: Atoms) -> None:
    with Client(server.address) as client:
        bare = client.predict(crystal, forces=False)
        full = client.predict(crystal, stress=True)
    assert [seen.properties for seen in server.seen] == [[1], [1, 2, 3]]
    assert bare.forces is None
    assert bare.stress is None
    assert full.stress is not None
    np.testing.assert_allclose(full.stress[0], full.stress[0].T)


def test_a_molecule_beside_a_crystal_has_no_stress(
    server: Any, crystal: Atoms, cluster: Callable[..., Atoms]
) -> None:
    with Client(server.address) as client:
        answer = client.predict([crystal, cluster(3)], stress=True)
    assert not answer.failures
    assert answer.stress is not None
    assert np.isfinite(answer.stress[0]).all()
    assert np.isnan(answer.stress[1]).all()


def test_streaming_reads_no_further_ahead_than_its_window(server: Any, cluster: Callable[..., Atoms]) -> None:
    read = 0

    def source() -> Iterator[Atoms]:
        nonlocal read
        for i in range(1000):
            read += 1
            yield cluster(5, seed=i)

    with Client(server.address, atoms_per_request=20, in_flight=2) as client:
        answers = client.predict_iter(source())
        for n_answered in range(1, 41):
            assert isinstance(next(answers), Prediction)
            assert read <= n_answered + (2 + 1) * 4
        answers.close()
    assert read < 100


def test_async_streaming_gives_the_same(server: Any, frames: list[Atoms]) -> None:
    async def run() -> list[float]:
        async with AsyncClient(server.address, atoms_per_request=20) as client:
            return [one.energy async for one in client.predict_iter(frames)]

    with Client(server.address) as client:
        assert asyncio.run(run()) == [one.energy for one in client.predict_iter(frames)]


def test_an_error_of_the_source_reaches_the_caller(server: Any, cluster: Callable[..., Atoms]) -> None:
    def source() -> Iterator[Atoms]:
        yield from (cluster(5) for _ in range(20))
        raise OSError("the disk is gone")

    with Client(server.address, atoms_per_request=20) as client, pytest.raises(OSError, match="disk is gone"):
        client.predict(source())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_changes_within_a_batch_is_not_passed_over(
    server: Any, frames: list[Atoms], streamed: bool
) -> None:
    old = server.pinned

    def change() -> Iterator[Atoms]:
        yield from frames[:30]
        server.digest = "sha256:" + "cd" * 32
        yield from frames[30:]

    with Client(server.address, atoms_per_request=20, in_flight=1) as client:
        with pytest.raises(ModelChanged, match="cdcd") as caught:
            list(client.predict_iter(change()) if streamed else client.predict(change()))
        assert old in str(caught.value)


@pytest.mark.parametrize("name", ["energy", "forces", "stress"])
def test_an_answer_that_does_not_fit_is_the_servers_error(server: Any, crystal: Atoms, name: str) -> None:
    def shorten(response: Any) -> None:
        setattr(response, name, getattr(response, name)[:-8])

    server.tamper = shorten
    with Client(server.address) as client, pytest.raises(ServerError, match=f"does not fit.*{name}"):
        client.predict(crystal, stress=True)


def test_an_answer_without_what_was_asked_for_is_the_servers_error(server: Any, crystal: Atoms) -> None:
    server.tamper = lambda response: response.ClearField("forces")
    with Client(server.address) as client, pytest.raises(ServerError, match="lacks"):
        client.predict(crystal)


@pytest.mark.parametrize("name", ["energy", "forces"])
def test_a_number_that_is_not_finite_becomes_a_failure(
    server: Any, cluster: Callable[..., Atoms], name: str
) -> None:
    def spoil(response: Any) -> None:
        values = np.frombuffer(getattr(response, name)).copy()
        values[-1] = np.inf
        setattr(response, name, values.tobytes())

    server.tamper = spoil
    with Client(server.address) as client:
        answer = client.predict([cluster(2), cluster(3)])
    assert [(one.index, one.reason) for one in answer.failures] == [(1, FailureReason.NOT_FINITE)]


def test_smaller_limits_after_a_restart_are_learned(
    server: Any, frames: list[Atoms], make_retry_info: Callable[[float], Any]
) -> None:
    import grpc

    with Client(server.address) as client:
        client.predict(frames)
        server.limits.max_structures_per_request = 5
        server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
        with pytest.raises(LimitExceeded):
            client.predict(frames)
        server.seen.clear()
        client.predict(frames)
    assert max(len(seen.n_atoms) for seen in server.seen) == 5


def test_models_and_health_are_told(server: Any) -> None:
    with Client(server.address) as client:
        (info,) = client.models()
        assert client.health() is Health.SERVING
        assert client.model() == client.model("lennard-jones") == info
    assert (info.name, info.digest, info.is_default) == ("lennard-jones", server.digest, True)
    assert info.elements == (1, 6, 18)
    assert info.charges == (-1, 0, 1)
    assert info.limits.max_atoms_per_structure == 500
    assert info.card == {"sigma": 3.4}

    async def run() -> Any:
        async with AsyncClient(server.address) as client:
            return await client.models(), await client.health(), await client.model()

    assert asyncio.run(run()) == ((info,), Health.SERVING, info)


def test_threads_share_a_client(server: Any, frames: list[Atoms]) -> None:
    answers: dict[int, Any] = {}
    with Client(server.address, atoms_per_request=20) as client:
        expected = client.predict(frames).energy

        def work(number: int) -> None:
            answers[number] = client.predict(frames).energy

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 4
    for energy in answers.values():
        np.testing.assert_array_equal(energy, expected)


def test_a_copy_connects_by_itself(server: Any, frames: list[Atoms]) -> None:
    with Client(server.address, model="lennard-jones", atoms_per_request=20) as client:
        expected = client.predict(frames).energy
        copy = pickle.loads(pickle.dumps(client))
    with copy:
        np.testing.assert_array_equal(copy.predict(frames).energy, expected)
    assert repr(copy) == repr(client)


def test_a_closed_client_says_so(server: Any, frames: list[Atoms]) -> None:
    client = Client(server.address)
    client.predict(frames[0])
    client.close()
    client.close()
    with pytest.raises(ClientError, match="is closed"):
        client.predict(frames[0])

    async def run() -> None:
        client = AsyncClient(server.address)
        await client.predict(frames[0])
        await client.close()
        await client.predict(frames[0])

    with pytest.raises(ClientError, match="is closed"):
        asyncio.run(run())


def test_after_a_fork_the_client_says_what_to_do(server: Any) -> None:
    code = f"""
import os, sys
from equipot.client import Client, ClientError
client = Client({server.address!r})
client.models()
child = os.fork()
if child == 0:
    try:
        client.models()
    except ClientError as error:
        os._exit(7 if "spawn" in str(error) else 1)
    os._exit(2)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("localhost", "not HOST:PORT"),
        ("localhost:", "not HOST:PORT"),
        ("localhost:70000", "not HOST:PORT"),
        ("::1:50051", "not HOST:PORT"),
        ("", "not HOST:PORT"),
        ("http://localhost:50051", "is a URL"),
    ],
)
def test_a_wrong_address_is_refused_at_once(address: str, says: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ClientError, match=says):
            kind(address)


@pytest.mark.parametrize("address", ["localhost:1", "[::1]:1", "node-7.example.org:443", "unix:/run/x.sock"])
def test_a_right_address_is_taken(address: str) -> None:
    assert Client(address).address == address


@pytest.mark.parametrize(
    "settings", [{"in_flight": 0}, {"atoms_per_request": 0}, {"timeout": 0}, {"max_message_bytes": 100}]
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Client("localhost:1", **settings)
