"""Reference energies come from the training split alone: exact where it determines them, tame elsewhere."""

from collections.abc import Callable, Sequence

import ase
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from equipot.train.errors import DataError
from equipot.train.reference_fit import fit_references
from equipot.train.splits import split
from equipot.train.store import Store

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


def everything(*stores: Store) -> np.ndarray:
    return np.concatenate(
        [np.stack([np.full(len(s), k), np.arange(len(s))], axis=1) for k, s in enumerate(stores)]
    )


def test_element_energies_are_recovered(make_store: MakeStore) -> None:
    rng = np.random.default_rng(1)
    store = make_store(labelled([rng.choice([1, 6, 8], rng.integers(2, 9)).tolist() for _ in range(60)]))
    found = fit_references([store], everything(store), (1, 6, 8), ("PBE/def2-SVP",))
    np.testing.assert_allclose(found.energy[0], list(ELEMENT.values()), atol=2e-5)
    assert found.scale[0] == pytest.approx(2.0)


def test_a_rare_element_among_thousands_is_not_bent(make_store: MakeStore) -> None:
    store = make_store(labelled([[6, 1, 1], [6, 6, 1], [6, 1]] * 300 + [[8, 1]]))
    found = fit_references([store], everything(store), (1, 6, 8), ("PBE/def2-SVP",))
    assert found.energy[0, 2] == pytest.approx(ELEMENT[8], abs=1e-3)


def test_the_other_splits_are_not_looked_at(make_store: MakeStore) -> None:
    rng = np.random.default_rng(1)
    formulas = [rng.choice([1, 6, 8], rng.integers(2, 6)).tolist() for _ in range(50)]
    frames = labelled(formulas, noise=0.1)
    store = make_store(frames, "one", group_by="frame")
    splits = split([store], fractions=(0.6, 0.2, 0.2), seed=0)
    for _, i in [*splits.validation, *splits.test]:
        frames[i].calc.results["energy"] += 1000.0
        frames[i].calc.results["forces"] *= 50
    other = make_store(frames, "other", group_by="frame")
    assert store.manifest.digest != other.manifest.digest
    one, two = (fit_references([s], splits.train, (1, 6, 8), ("PBE/def2-SVP",)) for s in (store, other))
    np.testing.assert_array_equal(one.energy, two.energy)
    np.testing.assert_array_equal(one.scale, two.scale)
    three = fit_references([other], everything(other), (1, 6, 8), ("PBE/def2-SVP",))
    assert abs(three.energy - one.energy).max() > 1


def test_one_composition_gets_the_mean_per_atom(make_store: MakeStore) -> None:
    store = make_store(labelled([[8, 1, 1]] * 20, noise=0.5))
    found = fit_references([store], everything(store), (1, 6, 8), ("PBE/def2-SVP",))
    np.testing.assert_allclose(found.energy[0], store.energies.mean() / 3, rtol=1e-9)
    left = store.energies - found.energy[0, 0] * 2 - found.energy[0, 2]
    assert abs(left.mean()) < 1e-5


def test_two_compositions_of_three_elements_leave_no_offset(make_store: MakeStore) -> None:
    store = make_store(labelled([[6, 8, 1, 1, 1, 1]] * 20 + [[6, 6, 8, 1, 1, 1, 1, 1, 1]] * 50, noise=0.1))
    found = fit_references([store], everything(store), (1, 6, 8), ("PBE/def2-SVP",))
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
    found = fit_references([one, two], everything(one, two), (1, 6, 8), ("RPBE", "PBE"))
    np.testing.assert_allclose(found.energy[0] - found.energy[1], 7.0, atol=1e-5)
    np.testing.assert_allclose(found.scale, [5.0, 2.0])
    with pytest.raises(DataError, match="level of theory 'B3LYP': no structure"):
        fit_references([one], everything(one), (1, 6, 8), ("B3LYP",))


def test_without_forces_the_scale_is_what_the_references_leave(make_store: MakeStore) -> None:
    store = make_store(labelled([[1, 6], [6, 8], [8, 1, 1]] * 100, noise=0.6, forces=None))
    found = fit_references([store], everything(store), (1, 6, 8), ("PBE/def2-SVP",))
    assert found.scale[0] == pytest.approx(0.6 * np.sqrt((1 / 4 + 1 / 4 + 1 / 9) / 3), rel=0.15)


def test_nothing_left_gives_scale_one(make_store: MakeStore) -> None:
    store = make_store(labelled([[1, 1]], forces=None))
    found = fit_references([store], everything(store), (1,), ("PBE/def2-SVP",))
    assert found.scale[0] == 1.0 or found.scale[0] < 1e-9
    assert found.scale[0] > 0


def test_an_element_that_is_not_listed(make_store: MakeStore) -> None:
    store = make_store(labelled([[1, 6], [8, 1]]))
    with pytest.raises(DataError, match=r"atomic numbers \[8\], the model lists \[1, 6\]"):
        fit_references([store], everything(store), (1, 6), ("PBE/def2-SVP",))
