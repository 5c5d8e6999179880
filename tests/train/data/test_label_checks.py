"""Labels that are not what they are said to be are warned of, with evidence; honest ones are not."""

from collections.abc import Callable, Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from equipot.train.audit.labels import energy_force_slope
from equipot.train.importer import ImportReport
from equipot.train.sources.base import ReadOptions
from equipot.train.store import Store

Import = Callable[..., ImportReport]

REAL = [
    "molecules/ethanol_methanol_train.xyz",
    "molecules/3bpa_train_300K.xyz",
    "molecules/acac_train_300K.xyz",
    "molecules/rmd17_aspirin_train.xyz",
    "alexandria/alexandria-sample.xyz",
    "mattersim_TP/mpf-TP.xyz",
    "oc20/relaxation_traj/random1000100.traj",
]


def relabelled(
    frames: Sequence[ase.Atoms], energy: Callable[[float, int], float], forces: float = 1.0
) -> list[ase.Atoms]:
    changed = []
    for atoms in frames:
        copy = atoms.copy()
        copy.set_constraint()
        copy.calc = SinglePointCalculator(
            copy,
            energy=energy(atoms.calc.results["energy"], len(atoms)),
            forces=forces * atoms.calc.results["forces"],
        )
        changed.append(copy)
    return changed


def rattled_copper(count: int) -> list[ase.Atoms]:
    frames = []
    for k in range(count):
        atoms = bulk("Cu", cubic=True) * (2, 1, 1)
        atoms.rattle(0.02, seed=k)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames


@pytest.mark.parametrize("name", REAL)
def test_real_totals_pass_and_the_same_per_atom_are_warned_of(
    name: str,
    shared: Callable[[str], Path],
    run_import: Import,
    write_frames_to: Callable[..., Path],
    tmp_path: Path,
) -> None:
    file = shared(name)
    frames = ase.io.read(file, "::6") if file.suffix == ".xyz" else ase.io.read(file, "::2")
    honest = write_frames_to(frames, "honest.extxyz")
    assert run_import(honest, out=tmp_path / "honest").manifest.warnings == []
    per_atom = write_frames_to(relabelled(frames, lambda energy, n: energy / n), "per-atom.extxyz")
    (warning,) = run_import(per_atom, out=tmp_path / "per-atom").manifest.warnings
    assert warning.startswith("per-atom.extxyz: the energies look like energies per atom: ")
    assert "--energy-per-atom" in warning


def test_the_remedy_for_energies_per_atom_mends_them(
    alcohols: Path, run_import: Import, write_frames_to: Callable[..., Path], tmp_path: Path
) -> None:
    frames = ase.io.read(alcohols, "200:400")
    per_atom = write_frames_to(relabelled(frames, lambda energy, n: energy / n), "per-atom.extxyz")
    assert run_import(per_atom, out=tmp_path / "wrong").manifest.warnings
    mended = run_import(per_atom, out=tmp_path / "mended", read=ReadOptions(energy_per_atom=True))
    assert mended.manifest.warnings == []
    energies = [atoms.get_potential_energy() for atoms in frames]
    np.testing.assert_allclose(Store.open(mended.store).energies, energies)


def test_slope_of_energy_on_force_is_one_for_honest_labels(
    run_import: Import, write_frames_to: Callable[..., Path]
) -> None:
    store = Store.open(run_import(write_frames_to(rattled_copper(40), "cu.extxyz")).store)
    found = energy_force_slope(store, np.arange(40))
    assert found is not None
    assert found.correlation > 0.99
    assert found.slope == pytest.approx(1, abs=0.05)


def test_slope_does_not_mind_turned_molecules(
    run_import: Import, write_frames_to: Callable[..., Path]
) -> None:
    frames = []
    rng = np.random.default_rng(0)
    for k in range(40):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.03, seed=k)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        turn *= np.linalg.det(turn)
        atoms.positions = atoms.positions @ turn + rng.normal(size=3)
        atoms.calc = SinglePointCalculator(atoms, energy=results["energy"], forces=results["forces"] @ turn)
        frames.append(atoms)
    store = Store.open(run_import(write_frames_to(frames, "turned.extxyz")).store)
    found = energy_force_slope(store, np.arange(40))
    assert found is not None
    assert found.correlation > 0.95
    assert found.slope == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (-1.0, "look like gradients, of the wrong sign"),
        (27.2, "do not fit together"),
        (1 / 23.06, "do not fit together"),
    ],
)
def test_forces_of_another_sign_or_unit(
    factor: float, words: str, run_import: Import, write_frames_to: Callable[..., Path]
) -> None:
    frames = relabelled(rattled_copper(40), lambda energy, n: energy, forces=factor)
    (warning,) = run_import(write_frames_to(frames, "cu.extxyz")).manifest.warnings
    assert words in warning
    slope = float(warning.split("changes by ")[1].split()[0])
    assert slope == pytest.approx(1 / factor, rel=0.05)


def test_a_warning_stays_with_the_store(run_import: Import, write_frames_to: Callable[..., Path]) -> None:
    frames = relabelled(rattled_copper(40), lambda energy, n: energy / n)
    report = run_import(write_frames_to(frames, "cu.extxyz"))
    assert Store.open(report.store).manifest.warnings == report.manifest.warnings
    assert "1/n_atoms is 0.125" in report.manifest.warnings[0]
