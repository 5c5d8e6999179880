"""What is derived from the data, from the training split alone, and what is left out of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from equipot.model.config import ModelConfig
from equipot.model.neighbors import brute_force_neighbor_list
from equipot.train.chemistry import Chemistry, supported_of_store
from equipot.train.dataset import Dataset, Sizes
from equipot.train.errors import TrainError
from equipot.train.importer import ImportOptions, import_files
from equipot.train.mix import Mix
from equipot.train.mix_build import build_mix
from equipot.train.mix_request import of_stores
from equipot.train.places import in_blocks
from equipot.train.prepare import make_card, prepare
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.store import Store
from equipot.train.survey import Survey


def make_store(home: Path, name: str, frames: list[Atoms], level: str) -> Store:
    write(home / f"{name}.extxyz", frames)
    options = ImportOptions(level_of_theory=level, licence="CC0-1.0", name=name, group_by="frame")
    import_files([home / f"{name}.extxyz"], home / name, options)
    return Store.open(home / name)


def molecule(symbols: str, energy: float, *, forces: bool = True, **info: int) -> Atoms:
    atoms = Atoms(symbols, positions=1.2 * np.arange(len(Atoms(symbols)))[:, None] * [1.0, 0.1, 0.0])
    atoms.info.update(info)
    results = {"forces": np.full((len(atoms), 3), 0.1)} if forces else {}
    atoms.calc = SinglePointCalculator(atoms, energy=energy, **results)
    return atoms


@pytest.fixture
def stores(tmp_path: Path) -> list[Store]:
    first = [molecule("CH2", -10.0 - i) for i in range(6)] + [molecule("CHO", -20.0), molecule("HCl", -30.0)]
    second = [molecule("NH", -5.0), molecule("NH2", -7.0, charge=1), molecule("N2", -9.0, forces=False)]
    return [make_store(tmp_path, "first", first, "PBE"), make_store(tmp_path, "second", second, "HF")]


@pytest.fixture
def mix(stores: list[Store], tmp_path: Path) -> Mix:
    names = [store.manifest.name for store in stores]
    return build_mix(of_stores([store.path for store in stores], names, 0, (0.7, 0, 0.3)), tmp_path / "mix")


def test_the_model_knows_what_the_training_split_holds(mix: Mix, recipe: Callable[..., Recipe]) -> None:
    card = make_card(recipe(), mix)
    (train,) = in_blocks(mix.part("train"))
    systems = [mix.stores[store].system(index) for store, index in train.tolist()]
    assert card.config.elements == tuple(sorted({int(z) for s in systems for z in s.atomic_numbers}))
    assert card.config.charges == tuple(sorted({s.charge for s in systems}))
    assert card.config.levels_of_theory == ("PBE", "HF")
    edges = atoms = 0
    for system in systems:
        edges += len(brute_force_neighbor_list(system.positions, system.cell, system.pbc, 4.0).senders)
        atoms += len(system.atomic_numbers)
    assert card.config.mean_neighbors == pytest.approx(edges / atoms)


def test_what_the_training_split_lacks_is_not_supported(stores: list[Store]) -> None:
    survey = Survey()
    train = [(0, i) for i in range(7)] + [(1, 0), (1, 2)]
    for store, index in train:
        survey.add(stores[store], np.array([index]), np.array([index]))
    assert survey.chemistry == Chemistry((1, 6, 7, 8), (0,), (0,))
    assert supported_of_store(survey.chemistry, stores[0], np.array([7, 5])).tolist() == [False, True]
    assert supported_of_store(survey.chemistry, stores[1], np.array([0, 1, 2])).tolist() == [
        True,
        False,
        True,
    ]


def test_a_batch_has_the_levels_and_labels_of_its_structures(
    stores: list[Store], recipe: Callable[..., Recipe]
) -> None:
    config = ModelConfig(
        **recipe().model.model_dump(),
        elements=(1, 6, 7, 8),
        levels_of_theory=("PBE", "HF"),
        mean_neighbors=2.0,
    )
    keys = np.array([(1, 2), (0, 6), (1, 0)])
    for cache in (0, 1, 1):
        batch = Dataset(stores, config, cache_mib=cache).batch(keys)
        assert batch.systems.level_idx.tolist() == [1, 0, 1]
        assert batch.targets.energy.tolist() == [-9.0, -20.0, -5.0]
        assert torch.isnan(batch.targets.forces).any(1).tolist() == [True] * 2 + [False] * 5
        assert torch.isnan(batch.targets.stress).all()


def test_a_cached_batch_is_the_same_batch(store: Path, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    prepare(recipe(), run, resume=False)
    config = RunCard.read(run.card).config
    dataset = Dataset([Store.open(store)], config, cache_mib=1)
    keys = np.array([(0, 3), (0, 0), (0, 17)])
    first, again = dataset.batch(keys), dataset.batch(keys)
    fresh = Dataset([Store.open(store)], config).batch(keys)
    for other in (again, fresh):
        for name in first.systems.__slots__:
            assert torch.equal(getattr(first.systems, name), getattr(other.systems, name))
        assert torch.equal(first.targets.forces, other.targets.forces)


def test_costs_follow_edges(store: Path) -> None:
    stores = [Store.open(store)]
    sizes = Sizes.of(stores, 4.0, progress=False)
    keys = np.array([(0, i) for i in range(len(stores[0]))])
    counted = []
    for _, index in keys:
        system = stores[0].system(int(index))
        edges = brute_force_neighbor_list(system.positions, system.cell, system.pbc, 4.0).senders
        counted.append(len(edges) + len(system.atomic_numbers))
    assert sizes.costs(keys).tolist() == counted


def test_a_loss_without_labels_is_refused(mix: Mix, recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(TrainError, match=r"loss\.stress = 2, but no store has stress; set loss\.stress = 0"):
        make_card(recipe("loss.stress=2"), mix)


def test_a_store_that_changed_is_refused_on_resume(
    train: Callable[..., Path], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = RunDirectory(train(tmp_path / "run", "optimizer.steps=0"))
    frames = [molecule("CH2", -10.0 - i) for i in range(30)]
    other = make_store(tmp_path, "other", frames, "EMT")
    with pytest.raises(TrainError, match=r"is not the store that .* was made of, or has grown since"):
        prepare(recipe(f'data.stores=["{other.path}"]'), run, resume=True)


def test_the_card_is_read_as_it_was_written(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    prepare(recipe(), run, resume=False)
    card = RunCard.read(run.card)
    card.write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(run.card.read_text())
    assert card.mix.sizes == {"train": 42, "validation": 12, "test": 6}
    with pytest.raises(TrainError, match="is not a training run"):
        RunCard.read(tmp_path / "absent.json")
