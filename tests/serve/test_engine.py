"""One structure's fault is its own: found before the model, in its numbers, or by halving a failed batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.serve.conftest import Bundles, crystal, molecule, write_tiny

from equipot.model.batch import Graph, System, build_graph, collate
from equipot.model.bundle import load_potential
from equipot.model.skin import SkinnedNeighbors
from equipot.serve.config import RequestLimits
from equipot.serve.engine import LocalEngine, Result
from equipot.serve.errors import Fault, ServeError

LIMITS = RequestLimits(structure_atoms=100, structure_edges=1_000)


@pytest.fixture(scope="module")
def engine(bundles: Bundles) -> LocalEngine:
    return LocalEngine.load(bundles.tiny, dtype="float64", device="cpu", limits=LIMITS)


def graph(engine: LocalEngine, system: System) -> Graph:
    (prepared,) = engine.prepare([system])
    assert isinstance(prepared, Graph)
    return prepared


def result(answer: Result | Fault) -> Result:
    assert isinstance(answer, Result)
    return answer


def forces(answer: Result | Fault) -> npt.NDArray[np.float64]:
    found = result(answer).forces
    assert found is not None
    return found


def stress(answer: Result | Fault) -> npt.NDArray[np.float64]:
    found = result(answer).stress
    assert found is not None
    return found


def test_a_batch_equals_its_structures_one_by_one_and_the_potential_itself(
    engine: LocalEngine, bundles: Bundles
) -> None:
    graphs = [graph(engine, system) for system in (molecule(1), crystal(2), molecule(3, 1), molecule(4, 20))]
    potential, _ = load_potential(bundles.tiny, dtype=torch.float64)
    direct = potential.eval()(collate(graphs, dtype=torch.float64), forces=True, stress=True)
    together = engine.compute(graphs, forces=True, stress=True)
    np.testing.assert_allclose([result(r).energy for r in together], direct.energy, rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        np.concatenate([forces(r) for r in together]), direct.forces, rtol=0, atol=1e-10
    )
    for one, answer in zip(graphs, together, strict=True):
        (alone,) = engine.compute([one], forces=True, stress=True)
        np.testing.assert_allclose(forces(answer), forces(alone), rtol=0, atol=1e-10)
        np.testing.assert_allclose(stress(answer), stress(alone), rtol=0, atol=1e-10)
    assert np.isfinite(stress(together[1])).all()
    assert np.isnan(stress(together[0])).all()


def test_what_is_not_asked_for_is_not_computed(engine: LocalEngine) -> None:
    answer = result(engine.compute([graph(engine, molecule(1))], forces=False, stress=False)[0])
    assert answer.forces is None
    assert answer.stress is None


def test_lists_with_a_skin_give_the_same_answers_along_a_trajectory(engine: LocalEngine) -> None:
    systems = [molecule(1, 12), crystal(2), molecule(3, 30)]
    neighbors = [SkinnedNeighbors(engine.card.cutoff, skin=0.6) for _ in systems]
    # Three times as far as the cutoff, the crystal has far more pairs than one may have.
    wide = [SkinnedNeighbors(engine.card.cutoff, skin=8.0) for _ in systems]
    rng = np.random.default_rng(0)
    for _ in range(12):
        moved = [replace(s, positions=s.positions + rng.normal(0, 0.03, s.positions.shape)) for s in systems]
        kept = [g for g in engine.prepare(moved, neighbors=neighbors) if isinstance(g, Graph)]
        narrowed = [g for g in engine.prepare(moved, neighbors=wide) if isinstance(g, Graph)]
        built = [g for g in engine.prepare(moved) if isinstance(g, Graph)]
        assert len(kept) == len(narrowed) == len(built) == len(systems)
        answers = [engine.compute(graphs, forces=True, stress=False) for graphs in (kept, narrowed, built)]
        for one, other, fresh in zip(*answers, strict=True):
            np.testing.assert_allclose(forces(one), forces(fresh), rtol=0, atol=1e-10)
            np.testing.assert_array_equal(forces(one), forces(other))
    assert all(one.n_built < 6 for one in (*neighbors, *wide))
    assert all(len(one.reference.wide.senders) <= 2 * LIMITS.structure_edges for one in wide)
    assert wide[1].reference.reach < wide[0].reference.reach == engine.card.cutoff + 8.0


BAD = {
    "nothing": (molecule(0, 1), {"atomic_numbers": [], "positions": np.zeros((0, 3))}, "invalid_structure"),
    "nan": (molecule(0), {"positions": np.full((6, 3), np.nan)}, "invalid_structure"),
    "far": (molecule(0), {"positions": np.full((6, 3), 1e300)}, "invalid_structure"),
    "one spot": (molecule(0), {"positions": np.zeros((6, 3))}, "invalid_structure"),
    "flat cell": (crystal(0), {"cell": np.ones((3, 3))}, "invalid_structure"),
    "huge cell": (crystal(0), {"cell": 1e200 * np.eye(3)}, "invalid_structure"),
    "no cell": (molecule(0), {"pbc": [True] * 3}, "invalid_structure"),
    "tiny cell": (crystal(0, 1), {"cell": 0.2 * np.eye(3)}, None),
    "element": (molecule(0), {"atomic_numbers": np.full(6, 79)}, "unsupported"),
    "no element": (molecule(0), {"atomic_numbers": np.full(6, -5)}, "unsupported"),
    "charge": (molecule(0), {"charge": 1}, "unsupported"),
    "spin": (molecule(0), {"spin_multiplicity": 3}, "unsupported"),
    "atoms": (molecule(0, 101), {}, "too_large"),
    "edges": (crystal(0, 90), {"cell": 6.0 * np.eye(3)}, "too_large"),
    "images": (crystal(0, 1), {"cell": 0.6 * np.eye(3)}, "too_large"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_structure_is_refused_with_field_message_and_remedy(engine: LocalEngine, name: str) -> None:
    system, change, reason = BAD[name]
    (fault,) = engine.prepare([replace(system, **change)])  # type: ignore[arg-type]
    assert isinstance(fault, Fault)
    assert reason is None or fault.reason == reason
    assert fault.field
    assert fault.message
    assert fault.remedy


def test_numbers_that_are_not_finite_are_the_fault_of_their_structure_alone(bundles: Bundles) -> None:
    engine = LocalEngine.load(bundles.poisoned, dtype=None, device="cpu", limits=LIMITS)
    good, bad = molecule(1, elements=(1, 6)), molecule(2, elements=(8,))
    answers = engine.compute([graph(engine, s) for s in (good, bad, good)], forces=True, stress=False)
    assert isinstance(answers[1], Fault)
    assert answers[1].reason == "not_finite"
    np.testing.assert_array_equal(forces(answers[0]), forces(answers[2]))
    assert np.isfinite(result(answers[0]).energy)


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_batch_that_fails_whole_is_halved_to_the_structure_at_fault(
    engine: LocalEngine, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    systems = [molecule(seed) for seed in range(7)]
    graphs = [graph(engine, system) for system in systems]
    # The model has no row for gold, and raises; `prepare` would have refused it.
    graphs[place] = build_graph(replace(systems[place], atomic_numbers=np.full(6, 79)), 4.0)
    answers = engine.compute(graphs, forces=True, stress=False)
    fault = answers.pop(place)
    assert isinstance(fault, Fault)
    assert fault.reason == "internal"
    assert "failed" in caplog.text
    del graphs[place]
    for one, answer in zip(graphs, answers, strict=True):
        (alone,) = engine.compute([one], forces=True, stress=False)
        np.testing.assert_allclose(forces(answer), forces(alone), rtol=0, atol=1e-10)


def test_float32_bundles_compute_in_float64_when_told(bundles: Bundles, engine: LocalEngine) -> None:
    single = LocalEngine.load(bundles.tiny, dtype=None, device="cpu", limits=LIMITS)
    assert (single.dtype, engine.dtype) == ("float32", "float64")
    one = graph(engine, molecule(5))
    rough, exact = (e.compute([one], forces=True, stress=False)[0] for e in (single, engine))
    difference = np.abs(forces(rough) - forces(exact)).max()
    assert 0 < difference < 1e-4


def test_an_ensemble_answers_with_its_mean_and_spread(tmp_path: Path) -> None:
    def computed(bundle: Path, *, forces: bool = True) -> list[Result]:
        engine = LocalEngine.load(bundle, dtype="float64", device="cpu", limits=LIMITS)
        graphs = [graph(engine, system) for system in (molecule(5), molecule(6, 9))]
        return [result(one) for one in engine.compute(graphs, forces=forces, stress=False)]

    three = write_tiny(tmp_path / "three", "three", seed=1, more_seeds=(2, 3))
    alone = [computed(write_tiny(tmp_path / str(seed), "one", seed=seed)) for seed in (1, 2, 3)]
    assert all(one.energy_spread is None for one in alone[0])
    for k, answer in enumerate(computed(three)):
        energies = np.array([one[k].energy for one in alone])
        all_forces = np.array([forces(one[k]) for one in alone])
        assert answer.energy == pytest.approx(energies.mean(), rel=1e-12)
        assert answer.energy_spread == pytest.approx(energies.std(), rel=1e-7)
        np.testing.assert_allclose(forces(answer), all_forces.mean(0), atol=1e-10)
        assert answer.forces_spread is not None
        by_component = all_forces.std(0)
        np.testing.assert_allclose(answer.forces_spread, np.sqrt((by_component**2).sum(1)), rtol=1e-7)
    assert all(one.forces_spread is None for one in computed(three, forces=False))


def test_an_ensemble_is_not_spread_over_ranks(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "two", "two", seed=1, more_seeds=(2,))
    with pytest.raises(ServeError, match="an ensemble of 2, and ensembles are not spread over ranks"):
        LocalEngine.load(bundle, dtype=None, device="cpu", limits=LIMITS, tensor_parallel=2)
