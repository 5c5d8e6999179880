"""References that all levels of theory share, on data whose levels differ by a known constant an atom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from equipot.train.importer import ImportOptions, import_files
from equipot.train.joint_references import joint_references
from equipot.train.mix import Mix
from equipot.train.mix_build import build_mix
from equipot.train.mix_request import of_stores
from equipot.train.prepare import make_card
from equipot.train.recipe import Recipe

SHIFT = 4.0
ATOMIC = {"Cu": -3.0, "Ni": -5.0}


@pytest.fixture
def mix(tmp_path: Path) -> Mix:
    random = np.random.default_rng(5)
    stores = []
    for level, shift in (("low", 0.0), ("high", SHIFT)):
        frames = []
        for number in range(40):
            symbols = ["Cu"] * (1 + number % 3) + ["Ni"] * (1 + number % 2)
            atoms = Atoms(symbols, random.normal(scale=2.0, size=(len(symbols), 3)))
            energy = sum(ATOMIC[symbol] + shift for symbol in symbols)
            atoms.calc = SinglePointCalculator(
                atoms, energy=energy, forces=random.normal(size=(len(atoms), 3))
            )
            frames.append(atoms)
        write(tmp_path / f"{level}.extxyz", frames)
        options = ImportOptions(level_of_theory=level, licence="CC0-1.0", name=level, group_by="frame")
        import_files([tmp_path / f"{level}.extxyz"], tmp_path / level, options)
        stores.append(tmp_path / level)
    return build_mix(of_stores(stores, ["low", "high"], 0, (0.8, 0.1, 0.1)), tmp_path / "mix")


def test_levels_share_the_mean_of_their_references(mix: Mix) -> None:
    low, high = mix.card.references.energy
    assert high - low == pytest.approx([SHIFT, SHIFT], abs=1e-5)
    shared = joint_references(mix)
    assert shared.energy[0].tolist() == shared.energy[1].tolist()
    assert shared.energy[0] == pytest.approx((low + high) / 2, abs=0.5)
    assert shared.scale.tolist() == mix.card.references.scale.tolist()


def test_a_recipe_chooses_them(mix: Mix, recipe: Callable[..., Recipe]) -> None:
    card = make_card(recipe("data.references=shared"), mix)
    assert card.references.energy.tolist() == joint_references(mix).energy.tolist()
    assert make_card(recipe(), mix).references.energy.tolist() == mix.card.references.energy.tolist()
