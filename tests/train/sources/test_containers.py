"""The field's containers: units, signs and shapes as in the file; damage and pickles refused by name."""

import itertools
import json
import lzma
import os
import pickle
import sqlite3
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.db
import lmdb
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db.row import AtomsRow
from ase.io.jsonio import encode

from equipot.train.errors import DataError
from equipot.train.sources.ase_db import AseDb
from equipot.train.sources.aselmdb import AseLmdb
from equipot.train.sources.base import ReadOptions, Reason
from equipot.train.sources.npz_file import UNITS, NpzTrajectory, all_electron_energy
from equipot.train.sources.pymatgen_json import STRESS_NOTE, PymatgenJson
from equipot.train.sources.registry import open_container

Sample = Callable[[str], Path]
Read = Callable[..., Any]
OPTIONS = ReadOptions()
Z = np.array([6, 1, 1, 1, 1])
METHANE = molecule("CH4").positions
FRAMES = 4
ENERGY = -40.5 * UNITS["Hartree"]  # about methane's


def write_npz(path: Path, unit: str, **changes: Any) -> Path:
    """An MD17 file of methane with energies in this unit."""
    arrays: dict[str, Any] = {
        "R": METHANE + 0.01 * np.arange(FRAMES)[:, None, None],
        "z": Z,
        "E": (ENERGY + np.arange(FRAMES))[:, None] / UNITS[unit],
        "F": np.full((FRAMES, 5, 3), 0.3 / UNITS[unit]),
        "name": np.array(b"methane"),
        "theory": np.array("CCSD(T)"),
    }
    arrays.update(changes)
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize("unit", ["eV", "kcal/mol", "kJ/mol", "Hartree"])
@pytest.mark.parametrize("stated", [True, False])
def test_npz_units_are_stated_or_told_by_size(tmp_path: Path, read: Read, unit: str, stated: bool) -> None:
    changes = {"e_unit": np.array(unit), "r_unit": np.array("Ang")} if stated else {}
    path = write_npz(tmp_path / "a.npz", unit, **changes)
    kept, left_out = read(NpzTrajectory(path, OPTIONS))
    assert left_out == []
    np.testing.assert_allclose([frame.energy for frame in kept], ENERGY + np.arange(4), rtol=1e-12)
    np.testing.assert_allclose(kept[0].forces, 0.3, rtol=1e-12)
    np.testing.assert_allclose(kept[3].positions, METHANE + 0.03)
    told = [note for note in kept[0].notes if "unit not stated" in note.code]
    assert bool(told) is not stated
    assert not told or unit in told[0].code
    assert not kept[0].pbc.any()


def test_a_kcal_per_mol_is_43_mev() -> None:
    assert UNITS["kcal/mol"] == pytest.approx(0.0433641, rel=1e-5)
    assert UNITS["Hartree"] / UNITS["kcal/mol"] == pytest.approx(627.5095, rel=1e-6)


def test_all_electron_energies_are_good_to_two_percent() -> None:
    # free atoms, Hartree: Chakravorty et al., Phys. Rev. A 47, 3649 (1993), nonrelativistic
    for number, energy in ((6, -37.845), (7, -54.589), (8, -75.067), (16, -398.11), (17, -460.15)):
        assert all_electron_energy(np.array([number])) / UNITS["Hartree"] == pytest.approx(energy, rel=0.02)


def test_npz_energies_of_no_known_unit_need_one(tmp_path: Path, read: Read) -> None:
    path = write_npz(tmp_path / "a.npz", "eV", E=np.full(4, -17.4))  # an atomisation energy
    with pytest.raises(DataError, match="--energy-unit"):
        NpzTrajectory(path, OPTIONS)
    kept, _ = read(NpzTrajectory(path, ReadOptions(energy_unit="kcal/mol")))
    assert kept[0].energy == pytest.approx(-17.4 * UNITS["kcal/mol"])
    with pytest.raises(DataError, match="e_unit is 'Ry'"):
        NpzTrajectory(write_npz(tmp_path / "b.npz", "eV", e_unit=np.array("Ry")), OPTIONS)
    with pytest.raises(DataError, match="r_unit is 'bohr'"):
        NpzTrajectory(write_npz(tmp_path / "c.npz", "eV", r_unit=np.array("bohr")), OPTIONS)


def test_npz_of_rmd17_and_of_periodic_cells(tmp_path: Path, read: Read) -> None:
    names = {"R": None, "E": None, "F": None, "z": None}
    rmd17 = {
        "coords": METHANE[None],
        "energies": np.array([ENERGY / UNITS["kcal/mol"]]),
        "forces": np.full((1, 5, 3), 0.3 / UNITS["kcal/mol"]),
        "nuclear_charges": Z,
        "old_indices": np.array([7]),
    }
    (frame,), _ = read(NpzTrajectory(write_npz(tmp_path / "rmd17.npz", "eV", **names, **rmd17), OPTIONS))
    assert frame.energy == pytest.approx(ENERGY)
    path = write_npz(tmp_path / "cell.npz", "eV", cell=np.eye(3) * 9.0, pbc=np.array([True, True, False]))
    kept, _ = read(NpzTrajectory(path, OPTIONS))
    assert kept[0].pbc.tolist() == [True, True, False]
    np.testing.assert_array_equal(kept[0].cell, np.eye(3) * 9)


def test_npz_rows_that_are_bad_are_left_out(tmp_path: Path, read: Read) -> None:
    forces = np.full((4, 5, 3), 0.3)
    forces[2, 1, 0] = np.nan
    kept, left_out = read(NpzTrajectory(write_npz(tmp_path / "a.npz", "eV", F=forces), OPTIONS))
    assert [frame.index for frame in kept] == [0, 1, 3]
    assert [item.reason for item in left_out] == [Reason.NON_FINITE_LABEL]
    for changes, match in (
        ({"E": np.zeros(3)}, "E has shape"),
        ({"F": np.zeros((4, 4, 3))}, "F has another shape"),
        ({"R": None}, "no positions"),
        ({"R": np.asfortranarray(np.zeros((4, 5, 3)))}, "C order"),
    ):
        with pytest.raises(DataError, match=match):
            NpzTrajectory(write_npz(tmp_path / "b.npz", "eV", **changes), OPTIONS)


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_npz_pickles_are_never_read(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for key in ("R", "z", "E", "e_unit"):
        path = write_npz(tmp_path / "a.npz", "eV", **{key: np.array([Runs(marker)] * 4, dtype=object)})
        with pytest.raises(DataError, match="pickled; they are not read"):
            NpzTrajectory(path, OPTIONS)
    whole = write_npz(tmp_path / "whole.npz", "eV").read_bytes()
    for name, body in (("cut.npz", whole[: len(whole) // 2]), ("pickle.npz", pickle.dumps(Runs(marker)))):
        (tmp_path / name).write_bytes(body)
        with pytest.raises(DataError, match="cannot be read as"):
            NpzTrajectory(tmp_path / name, OPTIONS)
    assert not marker.exists()


def strained() -> list[ase.Atoms]:
    """Copper under compression, relaxed, and under tension, labelled by ASE's EMT."""
    frames = []
    for scale in (0.97, 1.0, 1.03):
        atoms = bulk("Cu", "fcc", a=3.59 * scale, cubic=True)
        atoms.set_tags([0, 1, 1, 2])
        atoms.set_constraint(FixAtoms([0, 2]))
        atoms.rattle(0.01, seed=1)
        atoms.calc = EMT()
        results = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(apply_constraint=False),
            "stress": atoms.get_stress(apply_constraint=False),
        }
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames


def write_aselmdb(path: Path, frames: list[ase.Atoms], **extra: Any) -> Path:
    """As ase-db-backends writes it."""
    with lmdb.open(str(path), subdir=False, map_size=2**26) as env, env.begin(write=True) as transaction:
        for number, atoms in enumerate(frames, 1):
            row = AtomsRow(atoms)
            body = {k: row[k] for k in row.__dict__ if k[0] != "_" and k not in row._keys and k != "id"}
            body["cell"] = np.asarray(body["cell"])
            body["constraints"] = [constraint.todict() for constraint in atoms.constraints]
            body["key_value_pairs"] = {"sid": f"s{number}"}
            body["data"] = {"charge": 1, "spin": 2, **extra}
            transaction.put(str(number).encode(), zlib.compress(encode(body).encode()))
        transaction.put(b"nextid", zlib.compress(encode(len(frames) + 1).encode()))
    return path


def test_aselmdb_and_ase_db_agree_with_the_frames(tmp_path: Path, read: Read) -> None:
    frames = strained()
    path = write_aselmdb(tmp_path / "a.aselmdb", frames)
    with ase.db.connect(tmp_path / "a.db") as database:
        for number, atoms in enumerate(frames, 1):
            database.write(atoms, sid=f"s{number}")
    options = ReadOptions(group_keys=("sid",))
    for opened in (open_container(path, options), open_container(tmp_path / "a.db", options)):
        kept, left_out = read(opened)
        assert (len(kept), left_out) == (3, [])
        for number, (frame, atoms) in enumerate(zip(kept, frames, strict=True), 1):
            assert frame.energy == pytest.approx(atoms.calc.results["energy"], abs=1e-12)
            np.testing.assert_allclose(frame.forces, atoms.calc.results["forces"], atol=1e-12)
            stress = atoms.get_stress(voigt=False, apply_constraint=False)
            np.testing.assert_allclose(frame.stress, stress, atol=1e-12)
            assert frame.group == ("sid", f"s{number}")
        assert np.trace(kept[0].stress) < 0 < np.trace(kept[2].stress)  # positive in tension
        np.testing.assert_array_equal(kept[0].extras["fixed"], [True, False, True, False])
        np.testing.assert_array_equal(kept[0].extras["tags"], [0, 1, 1, 2])
        assert np.abs(kept[0].forces[0]).max() > 1e-3  # a fixed atom's force is kept
    kept, _ = read(AseLmdb(path, options))
    assert (kept[0].charge, kept[0].spin_multiplicity) == (1, 2)


def test_ase_db_rows_that_are_bad_are_left_out(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "a.db"
    with ase.db.connect(path) as database:
        for atoms in strained() * 2:
            database.write(atoms)
        database.delete([2])
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE systems SET energy = NULL WHERE id = 3")
        connection.execute("UPDATE systems SET positions = ? WHERE id = 4", (b"\x00" * 7,))
    connection.close()
    kept, left_out = read(AseDb(path, OPTIONS))
    assert [frame.index for frame in kept] == [0, 3, 4]
    assert [(i.index, i.reason) for i in left_out] == [(1, Reason.NO_LABEL), (2, Reason.UNREADABLE)]
    assert "row 3" in left_out[0].detail
    (tmp_path / "cut.db").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "other.db").write_bytes(pickle.dumps([1, 2]))
    for name in ("cut.db", "other.db", "none.db"):
        with pytest.raises(DataError, match=name):
            AseDb(tmp_path / name, OPTIONS)


def test_aselmdb_rows_that_are_bad_are_left_out(tmp_path: Path, read: Read) -> None:
    path = write_aselmdb(tmp_path / "a.aselmdb", strained() * 2)
    with lmdb.open(str(path), subdir=False, map_size=2**30) as env, env.begin(write=True) as transaction:
        good = transaction.get(b"1")
        assert good is not None
        transaction.put(b"2", pickle.dumps(Runs(tmp_path / "ran")))
        transaction.put(b"3", good[:-20])
        transaction.put(b"4", zlib.compress(b"[1, 2]"))
        transaction.put(b"5", zlib.compress(b'"' + b" " * (2**28 + 10) + b'"'))
        transaction.delete(b"6")
        transaction.put(b"deleted_ids", zlib.compress(b"[6]"))
    kept, left_out = read(AseLmdb(path, OPTIONS))
    assert [frame.index for frame in kept] == [0]
    assert [item.reason for item in left_out] == [
        Reason.UNREADABLE,
        Reason.UNREADABLE,
        Reason.UNREADABLE,
        Reason.REFUSED,
        Reason.UNREADABLE,
    ]
    assert "deleted" in left_out[-1].detail
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="not an LMDB file"):
        AseLmdb(write_npz(tmp_path / "b.npz", "eV"), OPTIONS)


@pytest.mark.parametrize(
    ("name", "count", "stressed"),
    [
        ("mlearn_Si_training.json", 214, True),
        ("mlearn_Mo_training.json", 194, True),
        ("maml_Mo_Elastic.json", 121, True),
        ("maml_Mo_AIMD.json", 200, None),
        ("pyxtal_Si6.json", 2010, False),
    ],
)
def test_pymatgen_lists(sample: Sample, read: Read, name: str, count: int, stressed: bool | None) -> None:
    path = sample(f"crystals/{name}")
    reader = open_container(path, OPTIONS)
    assert isinstance(reader, PymatgenJson)
    kept, left_out = read(reader)
    assert (len(kept), left_out) == (count, [])
    for frame, body in zip(kept, json.loads(path.read_text()), strict=True):
        outputs = body.get("outputs", body)
        assert frame.energy == outputs["energy"]
        np.testing.assert_array_equal(frame.forces, outputs["forces" if "forces" in outputs else "force"])
        assert frame.pbc.all()
        if stressed is not None:
            assert (frame.stress is not None) is stressed


def test_their_stress_is_the_slope_of_the_energy(sample: Sample, read: Read) -> None:
    """Strained Mo: V·stress = dE/dstrain, shears included, gives sign, unit and order at once."""
    kept, _ = read(PymatgenJson(sample("crystals/maml_Mo_Elastic.json"), OPTIONS))
    compared = []
    for a, b in itertools.permutations(kept, 2):
        strain = np.linalg.solve(a.cell, b.cell) - np.eye(3)
        strain = 0.5 * (strain + strain.T)
        if 1e-3 < np.abs(strain).max() < 0.025:
            volume = 0.5 * (np.linalg.det(a.cell) + np.linalg.det(b.cell))
            work = volume * np.sum(0.5 * (a.stress + b.stress) * strain)
            compared.append((work, b.energy - a.energy))
    work, change = np.array(compared).T
    assert len(work) > 50
    assert np.dot(work, change) / np.dot(work, work) == pytest.approx(1, abs=0.1)
    assert np.corrcoef(work, change)[0, 1] > 0.98
    assert any(note.code == STRESS_NOTE for note in kept[0].notes)


def test_a_list_that_is_cut_or_mixed_keeps_what_is_whole(sample: Sample, tmp_path: Path, read: Read) -> None:
    whole = sample("crystals/mlearn_Mo_training.json").read_bytes()
    (tmp_path / "cut.json").write_bytes(whole[: len(whole) // 2])
    kept, left_out = read(PymatgenJson(tmp_path / "cut.json", OPTIONS))
    assert 50 < len(kept) < 194
    assert [item.reason for item in left_out] == [Reason.UNREADABLE]
    bodies = json.loads(whole)[:3]
    bodies[1] = {"structure": bodies[1]["structure"], "outputs": {"energy": None}}
    bodies.append(["no entry"])
    (tmp_path / "mixed.json").write_text(json.dumps(bodies))
    kept, left_out = read(PymatgenJson(tmp_path / "mixed.json", OPTIONS))
    assert [frame.index for frame in kept] == [0, 2]
    assert [item.reason for item in left_out] == [Reason.NO_LABEL, Reason.UNREADABLE]
    (tmp_path / "packed.json.xz").write_bytes(lzma.compress(whole))
    kept, _ = read(PymatgenJson(tmp_path / "packed.json.xz", OPTIONS))
    assert len(kept) == 194
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    with pytest.raises(DataError, match="its first entry"):
        PymatgenJson(tmp_path / "other.json", OPTIONS)
