"""Labels of wrong unit or sign are named, each by its finding; right ones are accused of nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
from ase.build import bulk

from equipot.train.audit.findings import Finding, Severity
from equipot.train.audit.run import AuditOptions, audit_stores
from equipot.train.importer import ImportOptions, import_files
from equipot.train.sources.base import ReadOptions
from equipot.train.sources.registry import RELEASES
from equipot.train.store import Store

from .conftest import MakeStore, labelled

HARTREE, BOHR, GPA = 27.211386, 0.52917721, 160.21766
Change = Callable[[ase.Atoms, dict[str, Any]], tuple[ase.Atoms, dict[str, Any]]]


def times(
    energy: float = 1, forces: float = 1, stress: float = 1, positions: float = 1, pbc: bool = True
) -> Change:
    def change(atoms: ase.Atoms, results: dict[str, Any]) -> tuple[ase.Atoms, dict[str, Any]]:
        atoms.set_cell(atoms.cell[:] * positions)
        atoms.positions *= positions
        if not pbc:
            atoms.pbc = False
        factors = {"energy": energy, "forces": forces, "stress": stress}
        return atoms, {key: value * factors[key] for key, value in results.items() if key in factors}

    return change


def per_atom(atoms: ase.Atoms, results: dict[str, Any]) -> tuple[ase.Atoms, dict[str, Any]]:
    return atoms, {**results, "energy": results["energy"] / len(atoms)}


def drifting(atoms: ase.Atoms, results: dict[str, Any]) -> tuple[ase.Atoms, dict[str, Any]]:
    return atoms, {**results, "forces": results["forces"] + [2.0, 0.0, 0.0]}


def virial(atoms: ase.Atoms, results: dict[str, Any]) -> tuple[ase.Atoms, dict[str, Any]]:
    return atoms, {**results, "stress": -results["stress"] * atoms.get_volume()}


def changed(frames: Sequence[ase.Atoms], change: Change) -> list[ase.Atoms]:
    made = []
    for frame in frames:
        atoms, results = change(frame.copy(), dict(frame.calc.results))
        made.append(labelled(atoms, **results))
    return made


def accused(store: Store, sample: int = 400) -> list[Finding]:
    audit = audit_stores([store], AuditOptions(sample=sample))
    return [finding for finding in audit.findings if finding.severity is not Severity.NOTE]


WRONG_CRYSTALS: dict[str, tuple[Change, str, str]] = {
    "energies in Hartree": (times(energy=1 / HARTREE), "energy-unit", "Hartree"),
    "all in Hartree": (times(1 / HARTREE, 1 / HARTREE, 1 / HARTREE), "energy-hartree", "Hartree"),
    "energies in kcal/mol": (times(energy=23.06), "energy-unit", "kcal/mol"),
    "per atom": (per_atom, "energy-per-atom", "per atom"),
    "gradients": (times(forces=-1), "forces-sign", "wrong sign"),
    "forces in Hartree/bohr": (times(forces=BOHR / HARTREE), "forces-unit", "Hartree/bohr"),
    "forces in Hartree/Å": (times(forces=1 / HARTREE), "forces-unit", "Hartree/Å"),
    "stress in kbar": (times(stress=10 * GPA), "stress-unit", "kbar"),
    "stress in GPa": (times(stress=GPA), "stress-unit", "GPa"),
    "stress positive in compression": (times(stress=-1), "stress-sign", "positive in compression"),
    "VASP's kbar": (times(stress=-10 * GPA), "stress-unit", "in kbar and of the wrong sign"),
    "virial": (virial, "stress-unit", "virial"),
    "positions in bohr": (times(positions=1 / BOHR), "positions-unit", "bohr"),
    "forces left zero": (times(forces=0), "forces-missing", "all zero"),
    "net force": (drifting, "net-force", "add up"),
    "periodicity lost": (times(pbc=False), "lost-periodicity", "not periodic"),
}


@pytest.mark.parametrize("what", WRONG_CRYSTALS)
def test_wrong_crystals_are_named(what: str, alloy: list[ase.Atoms], make_store: MakeStore) -> None:
    change, code, words = WRONG_CRYSTALS[what]
    found = accused(make_store(changed(alloy, change)))
    named = [finding for finding in found if finding.code == code]
    assert named, [(finding.code, finding.summary) for finding in found]
    assert words in named[0].summary
    assert any(character.isdigit() for character in named[0].evidence)
    assert named[0].remedy
    expected = {code} | ({"stress-unit"} if what == "all in Hartree" else set())
    expected |= {"stress-unit", "stress-sign"} if what in ("positions in bohr", "forces left zero") else set()
    if what == "periodicity lost":
        # without its images a crystal is a cluster, which strain does not change, and which forces may turn
        expected |= {"torque", "duplicates-across-groups"}
    assert {finding.code for finding in found} <= expected


def test_right_crystals_are_accused_of_nothing(alloy_store: Store) -> None:
    assert accused(alloy_store) == []


WRONG_MOLECULES: dict[str, tuple[Change, str]] = {
    "energies in Hartree": (times(energy=1 / HARTREE), "energy-unit"),
    "all in Hartree": (times(1 / HARTREE, 1 / HARTREE), "energy-hartree"),
    "Hartree and Hartree/bohr": (times(1 / HARTREE, BOHR / HARTREE), "forces-unit"),
    "per atom": (per_atom, "energy-per-atom"),
    "gradients": (times(forces=-1), "forces-sign"),
    "positions in bohr": (times(positions=1 / BOHR), "positions-unit"),
    "forces left zero": (times(forces=0), "forces-missing"),
}


@pytest.mark.parametrize("what", WRONG_MOLECULES)
def test_wrong_molecules_are_named(what: str, alcohols: list[ase.Atoms], make_store: MakeStore) -> None:
    change, code = WRONG_MOLECULES[what]
    found = accused(make_store(changed(alcohols, change)))
    assert code in {finding.code for finding in found}
    assert {finding.code for finding in found} <= {code, "energy-hartree"}


def test_right_molecules_are_accused_of_nothing(alcohol_store: Store) -> None:
    assert accused(alcohol_store) == []


def test_zero_forces_by_symmetry_are_not_missing_ones(make_store: MakeStore) -> None:
    crystals = [
        labelled(bulk("NaCl", "rocksalt", a=5.4 + 0.1 * k), energy=-7.0 + 0.01 * k, forces=np.zeros((2, 3)))
        for k in range(6)
    ]
    store = make_store(crystals)
    findings = audit_stores([store], AuditOptions(sample=100)).findings
    codes = {finding.code: finding.severity for finding in findings}
    assert codes["forces-zero"] is Severity.NOTE
    assert "forces-missing" not in codes


REAL = {
    "crystals/mlearn_Li_training.json": "",
    "alexandria/alexandria-sample.xyz": "",
    "mptrj/MPtrj_2022.9_sample.json": "mptrj",
    "oc20/relaxation_traj/random1000100.traj": "",
    "oc22/data.0000.lmdb": "oc22",
    "qm7x/1000.hdf5": "qm7x",
    "ani1x/ani1_n5.hdf5": "ani1x",
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_have_no_errors(name: str, sample: Callable[[str], Path], tmp_path: Path) -> None:
    path, source = sample(name), REAL[name]
    # the sample of QM7-X has labels of our own, of this level alone
    level = "pbe0" if source == "qm7x" else next(iter(RELEASES[source].levels)) if source else None
    options = ImportOptions(
        level_of_theory="real", licence="x", name="x", source=source, read=ReadOptions(level=level)
    )
    store = Store.open(import_files([path], tmp_path / "store", options).store)
    found = [f for f in audit_stores([store], AuditOptions(sample=150)).findings if f.severity == "error"]
    assert found == []


def test_real_energies_per_atom_are_named(sample: Callable[[str], Path], tmp_path: Path) -> None:
    options = ImportOptions(level_of_theory="real", licence="x", name="x")
    store = Store.open(
        import_files([sample("crystals/matsciml_colabfit_Cu.lmdb")], tmp_path / "store", options).store
    )
    errors = [
        f.code for f in audit_stores([store], AuditOptions(sample=100)).findings if f.severity == "error"
    ]
    assert errors == ["energy-per-atom"]
