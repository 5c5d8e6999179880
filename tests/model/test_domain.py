"""Known surroundings are inside, strange ones outside with the atom at fault, however one looks at them."""

from collections.abc import Callable

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from numpy.typing import NDArray

from equipot.model.batch import System, SystemBatch, build_graphs, collate
from equipot.model.domain import Domain, Neighborhoods, Verdict, describe
from equipot.train.uncertainty.domain_fit import DomainFit, channels_of, with_border

CUTOFF = 4.0
ELEMENTS = (1, 6, 8, 14)
MakeSystem = Callable[..., System]


def batch_of(systems: list[System]) -> SystemBatch:
    return collate(build_graphs(systems, CUTOFF), dtype=torch.float64)


def hood_of(systems: list[System]) -> Neighborhoods:
    """By way of graphs, as a server does; training's way is by batches."""
    found = Neighborhoods.of_graphs(build_graphs(systems, CUTOFF), ELEMENTS)
    batch = Neighborhoods.of(batch_of(systems), ELEMENTS)
    for name in Neighborhoods.__slots__:
        np.testing.assert_allclose(getattr(found, name), getattr(batch, name), atol=1e-12)
    return found


def moved(make_system: MakeSystem, seed: int, count: int) -> list[System]:
    """Ethanol, water and a crystal of silicon dioxide, shaken."""
    rng = np.random.default_rng(seed)
    silica = Atoms("SiO2", [(0, 0, 0), (1.6, 0, 0), (0, 1.6, 0)], cell=[4.0, 4.0, 4.0], pbc=True)
    kinds = [ase.build.molecule("CH3CH2OH"), ase.build.molecule("H2O"), silica]
    found = []
    for k in range(count):
        atoms = kinds[k % 3].copy()
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        found.append(make_system(atoms))
    return found


@pytest.fixture(scope="module")
def domain(make_system: MakeSystem) -> Domain:
    fit = DomainFit(ELEMENTS, CUTOFF)
    for seed in range(5):
        fit.add(batch_of(moved(make_system, seed, 60)))
    rough = fit.finish()
    batch = batch_of(moved(make_system, 100, 150))
    hood = Neighborhoods.of(batch, ELEMENTS)
    return with_border(rough, rough.scores(hood), hood.element_idx, hood.system_idx, np.arange(150))


def verdict(domain: Domain, system: System) -> Verdict:
    return domain(hood_of([system]))[0]


def test_new_structures_of_the_same_kind_are_inside(domain: Domain, make_system: MakeSystem) -> None:
    verdicts = domain(hood_of(moved(make_system, 200, 300)))
    assert sum(one.outside for one in verdicts) <= 0.05 * len(verdicts)
    assert 0.2 < np.median([one.score for one in verdicts]) < 1


def test_a_squeezed_pair_is_outside_and_named(domain: Domain, make_system: MakeSystem) -> None:
    ethanol = ase.build.molecule("CH3CH2OH")
    ethanol.positions[2] += 0.5 * (ethanol.positions[0] - ethanol.positions[2])
    found = verdict(domain, make_system(ethanol))
    assert found.outside
    assert found.atom in (0, 2)
    assert "Å apart; the closest in training were" in found.reason


def test_pairs_and_elements_that_training_lacked_are_named(domain: Domain, make_system: MakeSystem) -> None:
    pair = verdict(domain, make_system(Atoms("SiC", [(0, 0, 0), (1.9, 0, 0)])))
    assert pair.outside
    assert "saw no such pair" in pair.reason
    unseen = DomainFit((1, 6, 8), CUTOFF)
    unseen.add(batch_of([make_system(ase.build.molecule("H2O"))]))
    lone = verdict(unseen.finish(), make_system(Atoms("C", [(0, 0, 0)])))
    assert "atom 0 is C, of which training saw none" in lone.reason


@pytest.mark.parametrize("name", ["C6H6", "CO2", "CH4", "H2CO"])
def test_foreign_molecules_are_outside(domain: Domain, make_system: MakeSystem, name: str) -> None:
    assert verdict(domain, make_system(ase.build.molecule(name))).outside


def test_an_atom_without_neighbours_is_outside(domain: Domain, make_system: MakeSystem) -> None:
    water = ase.build.molecule("H2O")
    apart = water + Atoms("H", [(0, 0, 30.0)])
    found = verdict(domain, make_system(apart))
    assert found.outside
    assert found.atom == 3
    assert "surroundings of atom 3 (H)" in found.reason


def test_scores_do_not_depend_on_place_turn_numbering_or_cell(
    domain: Domain, make_system: MakeSystem
) -> None:
    rng = np.random.default_rng(8)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    silica = moved(make_system, 7, 3)[2]
    for system in [*moved(make_system, 6, 3), silica]:
        order = rng.permutation(system.n_atoms)
        other = System(
            system.atomic_numbers[order],
            (system.positions @ rotation.T + 3.0)[order],
            system.cell @ rotation.T,
            system.pbc,
        )
        first = scores(domain, system)
        np.testing.assert_allclose(scores(domain, other), first[order], rtol=1e-8)
    doubled = System(
        np.tile(silica.atomic_numbers, 2),
        np.concatenate([silica.positions, silica.positions + silica.cell[0]]),
        silica.cell * np.array([[2.0], [1.0], [1.0]]),
        silica.pbc,
    )
    np.testing.assert_allclose(scores(domain, doubled), np.tile(scores(domain, silica), 2), rtol=1e-8)


def scores(domain: Domain, system: System) -> NDArray[np.float64]:
    return domain.scores(hood_of([system]))


def test_a_batch_gives_what_its_structures_give_alone(
    domain: Domain, make_system: MakeSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = [*moved(make_system, 9, 6), make_system(Atoms("H", [(0, 0, 0)]))]
    together = domain(hood_of(systems))
    monkeypatch.setattr("equipot.model.domain._MOST_EDGES", 10)  # blocks of an atom or two
    for system, one in zip(systems, together, strict=True):
        alone = verdict(domain, system)
        assert (alone.atom, alone.outside) == (one.atom, one.outside)
        assert alone.score == pytest.approx(one.score, rel=1e-9)


def test_a_neighbour_leaves_smoothly(domain: Domain, make_system: MakeSystem) -> None:
    def of(distance: float) -> NDArray[np.float64]:
        hood = Neighborhoods.of(batch_of([make_system(Atoms("OH", [(0, 0, 0), (distance, 0, 0)]))]), ELEMENTS)
        return describe(hood, CUTOFF, domain.channels)

    np.testing.assert_allclose(of(CUTOFF - 1e-3), of(CUTOFF + 0.1), atol=1e-6)


def test_many_elements_share_channels() -> None:
    weights = channels_of(tuple(range(1, 90)))
    assert weights.shape == (89, 4)
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1.0)
    assert np.abs(weights @ weights.T - np.eye(89)).max() < 0.9999
