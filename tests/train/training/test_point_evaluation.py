"""A finished run evaluated as the field does, against numpy; and on sources it never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from equipot.train.dataset import Dataset
from equipot.train.export import averaged, choose_checkpoint, restore_potential
from equipot.train.importer import ImportOptions, import_files
from equipot.train.prepare import reopen_mix
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.scaling.details import LEAST_FORCE
from equipot.train.scaling.evaluation import evaluate_point
from equipot.train.store import Store


@pytest.fixture(scope="session")
def finished(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("point") / "run")


def clusters(elements: Sequence[str], shifts: dict[str, float], count: int = 40) -> list[Atoms]:
    random = np.random.default_rng(5)
    found = []
    for number in range(count):
        size = 3 + number % 4
        positions = 2.6 * np.array([[i % 2, i // 2 % 2, i // 4] for i in range(size)], dtype=float)
        atoms = Atoms(random.choice(elements, size), positions + random.normal(scale=0.1, size=(size, 3)))
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        energy += sum(shifts.get(symbol, 0.0) for symbol in atoms.get_chemical_symbols())
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        atoms.info["trajectory"] = f"path {number}"
        found.append(atoms)
    return found


def stored(home: Path, name: str, frames: list[Atoms], level: str) -> Path:
    write(home / f"{name}.extxyz", frames)
    options = ImportOptions(level_of_theory=level, licence="CC0-1.0", name=name)
    import_files([home / f"{name}.extxyz"], home / name, options)
    return home / name


def test_test_split_against_numpy(finished: Path, tmp_path: Path) -> None:
    evaluation = evaluate_point(finished)
    run = RunDirectory(finished)
    card = RunCard.read(run.card)
    mix, chosen = reopen_mix(run, card), choose_checkpoint(run, "last")
    potential = restore_potential(run, card, chosen, averaged(chosen)).eval()
    places = mix.part("test")
    batch = Dataset(mix.stores, card.config).batch(places[np.arange(len(places))])
    said, labels = potential(batch.systems), batch.targets.forces.numpy()
    errors = said.forces.numpy() - labels
    test = evaluation.test
    assert test["structures"] == len(places)
    assert test["force_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    assert test["force_rmse"] == pytest.approx(np.sqrt(np.square(errors).mean()), rel=1e-4)
    sizes = np.bincount(batch.systems.system_idx)
    energy = (said.energy - batch.targets.energy).numpy() / sizes
    assert test["energy_mae_per_atom"] == pytest.approx(np.abs(energy).mean(), rel=1e-4)
    assert test["by_source"]["emt"]["energy_rmse_per_atom"] == pytest.approx(test["energy_rmse_per_atom"])
    lengths = np.linalg.norm(labels, axis=1)
    dots = (said.forces.numpy() * labels).sum(1)
    cosines = (dots / np.linalg.norm(said.forces.numpy(), axis=1) / np.maximum(lengths, 1e-12))[
        lengths >= LEAST_FORCE
    ]
    assert test["force_cosine"] == pytest.approx(cosines.mean(), rel=1e-3)
    copper = batch.systems.atomic_numbers.numpy() == 29
    assert test["by_element"]["Cu"]["n_atoms"] == copper.sum()
    assert test["by_element"]["Cu"]["force_mae"] == pytest.approx(np.abs(errors[copper]).mean(), rel=1e-4)
    baselines = evaluation.baselines
    assert baselines["zero_forces"]["force_mae"] == pytest.approx(np.abs(labels).mean(), rel=1e-4)
    train = mix.part("train")
    rows = train[np.arange(len(train))][:, 1]
    mean = (mix.stores[0].values("energy", rows) / mix.stores[0].n_atoms[rows]).mean()
    off = np.abs(mean - batch.targets.energy.numpy() / sizes).mean()
    assert baselines["mean"]["energy_mae_per_atom"] == pytest.approx(off, rel=1e-6)
    known = mix.card.references.energy[0][copper.astype(int)]  # nickel, then copper
    assert mix.card.chemistry.elements == (28, 29)
    known = np.bincount(batch.systems.system_idx, known)
    left = np.abs(known - batch.targets.energy.numpy()) / sizes
    assert baselines["references"]["energy_mae_per_atom"] == pytest.approx(left.mean(), rel=1e-6)
    evaluation.write_parity(tmp_path / "parity.npz")
    with np.load(tmp_path / "parity.npz") as parity:
        assert len(parity["emt/energy"]) == len(places)
        shown = parity["emt/forces"]
        assert np.isin(shown[:, 0], labels.ravel()).all()
    few = evaluate_point(finished, most_parity=3).parity["emt"]
    assert few.energy.shape == few.forces.shape == (3, 2)


def test_of_unseen_sources_strange_elements_are_left_out_and_levels_are_shifted(
    finished: Path, tmp_path: Path
) -> None:
    plain = clusters(["Cu", "Ni"], {})
    shifts = {"Cu": -4000.0, "Ni": 1500.0}
    unseen = {
        "same": stored(tmp_path, "same", plain, "EMT"),
        "other": stored(tmp_path, "other", plain, "other EMT"),
        "shifted": stored(tmp_path, "shifted", clusters(["Cu", "Ni"], shifts), "shifted EMT"),
        "golden": stored(tmp_path, "golden", clusters(["Cu", "Au"], {}), "EMT"),
        "strange": stored(tmp_path, "strange", clusters(["Au", "Pt"], {}), "EMT"),
    }
    found = evaluate_point(finished, unseen=unseen, most_unseen=30).unseen
    assert (found["same"]["energies_shifted_by"], found["same"]["structures"]) == (0, 30)
    assert (found["other"]["energies_shifted_by"], found["other"]["structures"]) == (20, 20)
    assert found["other"]["level_of_theory_used"] == "EMT"
    for name in ("energy_mae_per_atom", "force_mae", "force_cosine"):
        assert found["shifted"][name] == pytest.approx(found["other"][name], rel=1e-3), name
    assert found["shifted"]["baseline"]["energy_mae_per_atom"] == pytest.approx(
        found["other"]["baseline"]["energy_mae_per_atom"], rel=1e-3
    )
    gold = Store.open(unseen["golden"])
    with_gold = int((gold.element_counts(np.arange(len(gold)))[:, 79] > 0).sum())
    assert 0 < with_gold < len(gold)
    assert found["golden"]["unsupported"] == with_gold
    assert found["golden"]["structures"] == len(gold) - with_gold
    assert set(found["golden"]["by_element"]) == {"Cu"}
    assert "no structure" in found["strange"]["problem"]
