"""Trajectories with exact labels, stores made of them, and real samples."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from equipot.train.importer import ImportOptions, import_files
from equipot.train.mix import Mix
from equipot.train.mix_build import build_mix
from equipot.train.mix_request import of_stores
from equipot.train.store import Store

ROOT = Path(__file__).parents[3]
MakeStore = Callable[..., Store]
MakeMix = Callable[..., Mix]

# EMT counts from the bulk; codes count from farther below, some eV per atom.
BINDING = -3.5


def labelled(atoms: ase.Atoms, **results: object) -> ase.Atoms:
    copy = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=dict(atoms.info))
    copy.calc = SinglePointCalculator(copy, **{k: v for k, v in results.items() if v is not None})
    return copy


@pytest.fixture(scope="session")
def alloy() -> list[ase.Atoms]:
    """Trajectories of rattled and strained Cu–Au crystals of three sizes; energy, forces, stress by EMT."""
    frames = []
    for trajectory in range(12):
        rng = np.random.default_rng(trajectory)
        start = bulk("Cu", cubic=True, a=3.7) * ((1, 1, 1), (2, 1, 1), (2, 2, 1))[trajectory % 3]
        start.numbers[rng.permutation(len(start))[: trajectory % 3 + 1]] = 79
        for k in range(8):
            atoms = start.copy()
            atoms.positions += rng.normal(scale=0.03, size=(len(atoms), 3))
            if k >= 4:
                strain = np.eye(3) + rng.normal(scale=0.008, size=(3, 3))
                atoms.set_cell(atoms.cell[:] @ (strain + strain.T) / 2, scale_atoms=True)
            atoms.info["trajectory"] = f"t{trajectory}"
            atoms.calc = EMT()
            energy = atoms.get_potential_energy() + BINDING * len(atoms)
            frames.append(
                labelled(atoms, energy=energy, forces=atoms.get_forces(), stress=atoms.get_stress())
            )
    return frames


@pytest.fixture(scope="session")
def alcohols() -> list[ase.Atoms]:
    """Real molecules with all-electron energies: 60 of methanol, 140 of ethanol."""
    frames = ase.io.read(ROOT / "examples" / "data" / "ethanol-methanol.extxyz", "240:440")
    assert isinstance(frames, list)
    return frames


def store_in(
    folder: Path,
    frames: Sequence[ase.Atoms],
    name: str = "store",
    *,
    level: str = "PBE",
    file: str = "",
    group_by: str = "auto",
) -> Store:
    path = folder / (file or f"{name}.extxyz")
    ase.io.write(path, frames, format="extxyz")
    described = ImportOptions(level_of_theory=level, licence="MIT", name=name, group_by=group_by)
    return Store.open(import_files([path], folder / name, described).store)


def mix_in(folder: Path, stores: Sequence[Store], fractions: Sequence[float] = (0.8, 0.1, 0.1)) -> Mix:
    names = [store.manifest.name for store in stores]
    request = of_stores([store.path for store in stores], names, 0, fractions)
    return build_mix(request, folder / "mix")


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    return partial(store_in, tmp_path)


@pytest.fixture
def make_mix(tmp_path: Path) -> MakeMix:
    return partial(mix_in, tmp_path)


@pytest.fixture(scope="session")
def alcohol_store(alcohols: list[ase.Atoms], tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_in(tmp_path_factory.mktemp("alcohols"), alcohols)


@pytest.fixture(scope="session")
def alloy_store(alloy: list[ase.Atoms], tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_in(tmp_path_factory.mktemp("alloy"), alloy, "alloy")


@pytest.fixture
def sample() -> Callable[[str], Path]:
    """A real file by its path under the shared data; skips where that is absent."""

    def find(name: str) -> Path:
        path = ROOT.parent / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"shared data absent: {name}")
        return path

    return find
