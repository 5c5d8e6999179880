"""The same structure gets the same bits through the service, whoever shares its batch, and replies say so."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.serve.conftest import Bundles, ask, crystal, molecule, read, running

from equipot.model import kernels
from equipot.model.batch import System
from equipot.serve.config import DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, Result
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

SYSTEMS = [molecule(seed, 1 + 5 * seed % 37) for seed in range(9)] + [crystal(seed, 20) for seed in range(3)]
ALL = (pb.PROPERTY_FORCES, pb.PROPERTY_STRESS)


@pytest.fixture(scope="module")
def exact_stub(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PotentialServiceStub]:
    log = tmp_path_factory.mktemp("deterministic") / "log"
    with (
        running(bundles.tiny, "--deterministic", "--threads", 2, stderr=log) as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        yield PotentialServiceStub(channel)


def answers(stub: PotentialServiceStub, systems: list[System]) -> list[tuple[bytes, ...]]:
    response = stub.Predict(ask(systems, *ALL), timeout=60)
    assert response.model.batch_invariant
    arrays = read(response, systems)
    assert arrays.forces is not None
    assert arrays.stress is not None
    assert not arrays.failures
    forces = np.split(arrays.forces, np.cumsum([system.n_atoms for system in systems])[:-1])
    rows = zip(arrays.energy, forces, arrays.stress, strict=True)
    return [tuple(part.tobytes() for part in row) for row in rows]


def test_many_callers_with_random_batches_get_the_bits_of_the_structures_alone(
    exact_stub: PotentialServiceStub,
) -> None:
    alone = [answers(exact_stub, [system])[0] for system in SYSTEMS]
    rng = np.random.default_rng(4)
    chosen = [rng.choice(len(SYSTEMS), rng.integers(1, 12)).tolist() for _ in range(40)]
    with ThreadPoolExecutor(8) as callers:
        together = callers.map(lambda some: answers(exact_stub, [SYSTEMS[i] for i in some]), chosen)
        for some, got in zip(chosen, together, strict=True):
            assert got == [alone[i] for i in some]


def engine(bundle: Path, **options: object) -> LocalEngine:
    loaded = LocalEngine.load(bundle, dtype=None, device="cpu", limits=DEFAULT_LIMITS, **options)  # type: ignore[arg-type]
    return loaded


def test_without_compiled_kernels_the_mode_holds_too(bundles: Bundles) -> None:
    with kernels.pure_torch():
        usual, exact = engine(bundles.tiny), engine(bundles.tiny, deterministic=True)
        assert not usual.batch_invariant
        assert exact.batch_invariant
        graphs = [graph for graph in exact.prepare(SYSTEMS) if not hasattr(graph, "reason")]
        together = exact.compute(graphs[::-1], forces=True, stress=False)[::-1]
        for graph, result in zip(graphs, together, strict=True):
            (alone,) = exact.compute([graph], forces=True, stress=False)
            assert isinstance(result, Result)
            assert isinstance(alone, Result)
            assert result.energy == alone.energy
            np.testing.assert_array_equal(result.forces, alone.forces)


def test_threads_follow_the_work_unless_they_are_fixed(bundles: Bundles) -> None:
    free, fixed = engine(bundles.tiny), engine(bundles.tiny, threads=3)
    free_with_cores = engine(bundles.tiny)
    free_with_cores._most_threads = 4
    assert free.threads_for(10, 100) == free_with_cores.threads_for(10, 100) == 1
    assert free_with_cores.threads_for(10**5, 10**7) == 4
    assert fixed.threads_for(10, 100) == fixed.threads_for(10**5, 10**7) == 3
    with kernels.pure_torch():
        exact = engine(bundles.tiny, deterministic=True)
        assert exact.threads_for(10, 100) == exact.threads_for(10**5, 10**7)
