"""Reference energies come from the training split alone: exact where it determines them, tame elsewhere."""

from collections.abc import Callable, Sequence

import ase
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from equipot.model.references import References
from equipot.train.errors import DataError
from equipot.train.reference_fit import RIDGE
from equipot.train.store import Store
from equipot.train.survey import Survey

MakeStore = Callable[..., Store]
ELEMENT = {1: -13.6, 6: -1029.5, 8: -2042.0}


def labelled(
    formulas: Sequence[Sequence[int]], *, noise: float = 0.0, seed: int = 0, forces: float | None = 2.0
) -> list[ase.Atoms]:
    rng = np.random.default_rng(seed)
    frames = []
    for numbers in formulas:
        atoms = ase.Atoms(numbers, np.arange(len(numbers))[:, None] * [1.3, 0.4, 0.0])
        results: dict[str, object] = {"energy": sum(ELEMENT[z] for z in numbers) + noise * rng.normal()}
        if forces is not None:
            results["forces"] = forces * rng.choice([-1.0, 1.0], (len(numbers), 3))
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames


def fit(*stores: Store, levels: Sequence[str] = ("PBE/def2-SVP",), block: int = 7) -> References:
    survey = Survey()
    parts = [(s, np.arange(at, min(at + block, len(s)))) for s in stores for at in range(0, len(s), block)]
    for store, indices in parts:
        survey.add(store, indices, indices)
    return survey.references(levels, parts)


def test_element_energies_are_recovered(make_store: MakeStore) -> None:
    rng = np.random.default_rng(1)
    store = make_store(labelled([rng.choice([1, 6, 8], rng.integers(2, 9)).tolist() for _ in range(60)]))
    found = fit(store)
    np.testing.assert_allclose(found.energy[0], list(ELEMENT.values()), atol=2e-5)
    assert found.scale[0] == pytest.approx(2.0)


def test_a_rare_element_among_thousands_is_not_bent(make_store: MakeStore) -> None:
    store = make_store(labelled([[6, 1, 1], [6, 6, 1], [6, 1]] * 300 + [[8, 1]]))
    found = fit(store)
    assert found.energy[0, 2] == pytest.approx(ELEMENT[8], abs=1e-3)


def test_one_composition_gets_the_mean_per_atom(make_store: MakeStore) -> None:
    store = make_store(labelled([[8, 1, 1]] * 20, noise=0.5))
    found = fit(store)
    np.testing.assert_allclose(found.energy[0], store.energies.mean() / 3, rtol=1e-9)
    left = store.energies - found.energy[0, 0] * 2 - found.energy[0, 1]
    assert abs(left.mean()) < 1e-5


def test_two_compositions_of_three_elements_leave_no_offset(make_store: MakeStore) -> None:
    store = make_store(labelled([[6, 8, 1, 1, 1, 1]] * 20 + [[6, 6, 8, 1, 1, 1, 1, 1, 1]] * 50, noise=0.1))
    found = fit(store)
    left = store.energies - store.element_counts(np.arange(70))[:, [1, 6, 8]] @ found.energy[0]
    assert abs(left[:20].mean()) < 1e-4
    assert abs(left[20:].mean()) < 1e-4
    assert abs(found.energy).max() < 3000


def test_every_level_of_theory_has_its_own(make_store: MakeStore) -> None:
    formulas = [[1, 6], [1, 8], [6, 8], [1, 1, 6], [8, 8, 1]]
    one = make_store(labelled(formulas), "one", level="PBE")
    shifted = labelled(formulas, forces=5.0)
    for atoms in shifted:
        atoms.calc.results["energy"] += 7.0 * len(atoms)
    two = make_store(shifted, "two", level="RPBE")
    found = fit(one, two, levels=("RPBE", "PBE"))
    np.testing.assert_allclose(found.energy[0] - found.energy[1], 7.0, atol=1e-5)
    np.testing.assert_allclose(found.scale, [5.0, 2.0])
    with pytest.raises(DataError, match="level of theory 'B3LYP': no structure"):
        fit(one, levels=("B3LYP",))


def test_without_forces_the_scale_is_what_the_references_leave(make_store: MakeStore) -> None:
    store = make_store(labelled([[1, 6], [6, 8], [8, 1, 1]] * 100, noise=0.6, forces=None))
    found = fit(store)
    assert found.scale[0] == pytest.approx(0.6 * np.sqrt((1 / 4 + 1 / 4 + 1 / 9) / 3), rel=0.15)


def test_nothing_left_gives_scale_one(make_store: MakeStore) -> None:
    store = make_store(labelled([[1, 1]], forces=None))
    found = fit(store)
    assert found.scale[0] == 1.0 or found.scale[0] < 1e-9
    assert found.scale[0] > 0


def test_the_sums_solve_what_a_direct_ridge_solves(make_store: MakeStore) -> None:
    rng = np.random.default_rng(3)
    store = make_store(
        labelled([rng.choice([1, 6, 8], rng.integers(2, 9)).tolist() for _ in range(80)], noise=2)
    )
    columns = store.element_counts(np.arange(80))[:, [1, 6, 8]]
    mean = store.energies.sum() / columns.sum()
    weight = np.sqrt((columns**2).sum(axis=0))
    # the ridge as further rows of the least-squares problem, in columns scaled to one
    rows = np.vstack([columns / weight, np.sqrt(RIDGE) * np.eye(3)])
    wanted = np.concatenate([store.energies - mean * columns.sum(axis=1), np.zeros(3)])
    direct = mean + np.linalg.lstsq(rows, wanted, rcond=None)[0] / weight
    for block in (7, 1000):
        np.testing.assert_allclose(fit(store, block=block).energy[0], direct, rtol=1e-9)


def test_an_element_of_another_level_gets_the_mean_and_not_garbage(make_store: MakeStore) -> None:
    one = make_store(labelled([[1, 6], [1, 1, 6], [6, 6, 1]]), "one", level="PBE")
    two = make_store(labelled([[8, 8], [8, 1]]), "two", level="RPBE")
    found = fit(one, two, levels=("PBE", "RPBE"))
    assert found.energy[0, 2] == pytest.approx(one.energies.sum() / one.n_atoms.sum())
    assert found.energy[1, 1] == pytest.approx(two.energies.sum() / two.n_atoms.sum())


def test_elements_that_always_come_together_stay_of_ordinary_size(make_store: MakeStore) -> None:
    formulas = [[6, 8] * k for k in range(1, 6)] * 4 + [[6, 8] * 5 + [8]]
    store = make_store(labelled(formulas, noise=0.3))
    found = fit(store)
    assert abs(found.energy[0, 1] - ELEMENT[8]) < 20
    assert abs(found.energy[0, 0] - ELEMENT[6]) < 20
