"""Whatever is sent, the server stays up, says what is wrong, answers the rest, and gives its memory back."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serve.conftest import Process, ask, crystal, molecule, read

from equipot.model.batch import System
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import FailureReason
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

MAY_SAY = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
GROWTH = 150 * 2**20
"""Bytes that the server may keep: allocators do not return everything."""


def resident(server: Process) -> int:
    """Bytes of memory; 0 where the system does not tell."""
    statm = Path(f"/proc/{server.popen.pid}/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


@pytest.fixture(autouse=True)
def unharmed(server: Process, stub: PotentialServiceStub) -> Iterator[None]:
    """After each test the same server answers as before, and its memory has not grown."""
    before = stub.Predict(ask([molecule(1)]), timeout=20)
    memory = resident(server)
    said = len(server.log())
    yield
    assert server.popen.poll() is None
    after = stub.Predict(ask([molecule(1)]), timeout=20)
    assert (after.energy, after.forces) == (before.energy, before.forces)
    assert resident(server) < memory + GROWTH
    deadline = time.monotonic() + 10
    while server.sample("equipot_in_flight_requests") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.sample("equipot_in_flight_requests") == 0
    assert server.sample("equipot_queue_edges") == 0
    assert not server.tracebacks(said)


def code_of(channel: grpc.Channel, method: str, raw: bytes) -> grpc.StatusCode:
    """How the server answers these bytes."""
    call = channel.unary_unary(f"/equipot.wire.v1.PotentialService/{method}", bytes, bytes)
    try:
        call(raw, timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid request with some of its bytes changed, dropped, doubled or cut off."""
    request = ask([molecule(1), crystal(2), molecule(3, 1)], pb.PROPERTY_FORCES, model="tiny")
    raw = bytearray(request.SerializeToString())
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(raw) - 1)) if raw else 0
        kind = draw(st.sampled_from(["set", "drop", "insert", "cut", "double"]))
        if kind == "set" and raw:
            raw[at] = draw(st.integers(0, 255))
        elif kind == "drop":
            del raw[at : at + draw(st.integers(1, 16))]
        elif kind == "insert":
            raw[at:at] = draw(st.binary(max_size=16))
        elif kind == "cut":
            del raw[max(1, at) :]
        elif kind == "double":
            raw[at:at] = raw[at : at + 40]
    return bytes(raw)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=mutated() | st.binary(max_size=200))
@pytest.mark.parametrize("method", ["Predict", "GetModel", "ListModels"])
def test_bytes_of_any_kind(channel: grpc.Channel, method: str, raw: bytes) -> None:
    assert code_of(channel, method, raw) in MAY_SAY


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_atoms=st.lists(st.integers(0, 2**32 - 1), max_size=5),
    arrays=st.dictionaries(
        st.sampled_from(["atomic_numbers", "positions", "cell", "pbc", "charge", "spin_multiplicity"]),
        st.binary(max_size=100),
    ),
)
def test_counts_that_lie(channel: grpc.Channel, n_atoms: list[int], arrays: dict[str, bytes]) -> None:
    structures = pb.Structures(n_atoms=n_atoms)
    for field, value in arrays.items():
        setattr(structures, field, value)
    raw = pb.PredictRequest(structures=structures).SerializeToString()
    assert code_of(channel, "Predict", raw) in MAY_SAY


NUMBERS = st.floats(width=64) | st.sampled_from([0.0, 1e300, -1e300, 1e-300, 1e6, 1e9])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    positions=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=6),
    cell=st.tuples(*[NUMBERS] * 9),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    number=st.integers(-(2**31), 2**31 - 1) | st.sampled_from([1, 6, 8]),
    charge=st.integers(-(2**31), 2**31 - 1) | st.just(0),
)
def test_numbers_of_any_kind_harm_no_neighbour(
    stub: PotentialServiceStub,
    positions: list[tuple[float, float, float]],
    cell: tuple[float, ...],
    pbc: tuple[bool, bool, bool],
    number: int,
    charge: int,
) -> None:
    strange = System(
        atomic_numbers=np.full(len(positions), number),
        positions=np.array(positions),
        cell=np.array(cell).reshape(3, 3),
        pbc=np.array(pbc),
        charge=charge,
    )
    systems = [molecule(1), strange, molecule(1)]
    answer = read(stub.Predict(ask(systems), timeout=20), systems)
    assert np.isfinite(answer.energy[[0, 2]]).all()
    assert {failure.index for failure in answer.failures} <= {1}
    assert bool(answer.failures) == bool(np.isnan(answer.energy[1]))


RANDOM = np.random.default_rng(0)


def scattered(cell: float, n_atoms: int, side: float) -> System:
    """Atoms anywhere in a cube, in a cubic cell; no cell if it is 0."""
    system = crystal(1, n_atoms) if cell else molecule(1, n_atoms)
    return replace(system, cell=cell * np.eye(3), positions=RANDOM.uniform(0, side, (n_atoms, 3)))


HEAVY = {
    "a cell of 0.2 Å": scattered(0.2, 5, 0.2),
    "a cell of 1e-9 Å": scattered(1e-9, 1, 1.0),
    "one short vector": replace(
        crystal(1, 1), cell=np.diag([1e-3, 50.0, 50.0]), pbc=np.array([True, False, False])
    ),
    "a nearly flat cell": replace(crystal(1, 2), cell=np.array([[3, 0, 0], [3, 3e-4, 0], [0, 0, 3.0]])),
    "200 atoms in 1 Å³": scattered(0.0, 200, 1.0),
    "a crowded cell": scattered(4.0, 200, 4.0),
}


@pytest.mark.parametrize("name", HEAVY)
def test_structures_that_would_need_millions_of_edges(stub: PotentialServiceStub, name: str) -> None:
    systems = [molecule(1), HEAVY[name], molecule(2)]
    answer = read(stub.Predict(ask(systems), timeout=20), systems)
    (failure,) = answer.failures
    assert failure.index == 1
    assert failure.reason in (FailureReason.TOO_LARGE, FailureReason.INVALID_STRUCTURE)
    assert np.isfinite(answer.energy[[0, 2]]).all()


def test_large_requests_give_their_memory_back(stub: PotentialServiceStub) -> None:
    systems = [molecule(seed, 24) for seed in range(200)]
    for _ in range(5):
        assert not stub.Predict(ask(systems), timeout=20).failures


def test_callers_that_leave(server: Process) -> None:
    request = ask([molecule(seed, 20) for seed in range(100)])
    for timeout in [0.001, 0.003, 0.01] * 10:
        with grpc.insecure_channel(server.address) as channel:
            # Closing the channel cancels the call, if its deadline has not.
            PotentialServiceStub(channel).Predict.future(request, timeout=timeout)
            time.sleep(0.002)
