"""Errors against numpy, by level of theory, and that evaluation is divided without being changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from equipot.model.potential import Potential
from equipot.train.dataset import Dataset, Sizes
from equipot.train.evaluate import evaluate, evaluate_references, evaluation_batches
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.store import Store
from equipot.train.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture
def card(recipe: Callable[..., Recipe], tmp_path: Path) -> RunCard:
    run = RunDirectory(tmp_path / "run")
    prepare(recipe(), run, resume=False)
    return RunCard.read(run.card)


def test_errors_are_what_numpy_says(card: RunCard, store: Path) -> None:
    torch.manual_seed(1)
    potential = Potential(card.config, card.references)
    stores = [Store.open(store)]
    dataset = Dataset(stores, card.config)
    keys = np.array([(0, i) for i in range(60)])
    costs = Sizes.of(stores, card.config.cutoff, progress=False).costs(keys)
    tally = evaluate(potential, dataset, keys, costs, ALONE, card.recipe.loss, stress=True)
    energy, forces, stress = [], [], []
    for key in keys:
        said = potential(dataset.batch(key[None]).systems, stress=True)
        labels = stores[0].labels(int(key[1]))
        energy.append((said.energy.item() - labels.energy) / len(labels.forces))
        forces.append(said.forces.numpy() - labels.forces)
        if labels.stress is not None:
            stress.append(said.stress[0].numpy() - labels.stress)
    flat = np.concatenate(forces).ravel()
    errors = tally.errors()
    assert errors.structures == 60
    assert errors.energy_mae == pytest.approx(1000 * np.abs(energy).mean(), rel=1e-4)
    assert errors.energy_rmse == pytest.approx(1000 * np.sqrt(np.square(energy).mean()), rel=1e-4)
    assert errors.forces_mae == pytest.approx(np.abs(flat).mean(), rel=1e-4)
    assert errors.forces_rmse == pytest.approx(np.sqrt(np.square(flat).mean()), rel=1e-4)
    assert len(stress) == 20
    assert errors.stress_mae == pytest.approx(np.abs(stress).mean(), rel=1e-4)
    assert tally.errors(0) == errors
    assert tally.loss() > 0


def test_the_baseline_is_references_and_zero_forces(card: RunCard, store: Path) -> None:
    stores = [Store.open(store)]
    dataset = Dataset(stores, card.config)
    keys = np.array([(0, i) for i in range(60)])
    errors = evaluate_references(
        card.references, card.config.elements, dataset, keys, card.recipe.loss
    ).errors()
    labels = [stores[0].labels(i) for i in range(60)]
    table = dict(zip(card.config.elements, card.references.energy[0], strict=True))
    energy = [
        (sum(table[int(number)] for number in stores[0].system(i).atomic_numbers) - label.energy)
        / len(label.forces)
        for i, label in enumerate(labels)
    ]
    assert errors.energy_mae == pytest.approx(1000 * np.abs(energy).mean(), rel=1e-6)
    forces = np.concatenate([label.forces for label in labels])
    assert errors.forces_mae == pytest.approx(np.abs(forces).mean(), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_evaluation_is_a_partition_in_step(ranks: int) -> None:
    costs = np.random.default_rng(0).integers(100, 15_000, 40)
    plans = [evaluation_batches(costs, World(rank, ranks, torch.device("cpu"))) for rank in range(ranks)]
    assert len({len(plan) for plan in plans}) == 1
    counted = [row for plan in plans for batch in plan if batch.counts for row in batch.rows]
    assert sorted(counted) == list(range(40))
    for plan in plans:
        for batch in plan:
            assert len(batch.rows) == 1 or costs[batch.rows].sum() <= 20_000
    assert evaluation_batches(costs[:0], World(0, 1, torch.device("cpu"))) == []
