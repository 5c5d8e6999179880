"""The field's own programs with a server's forces: the same numbers as with the potential itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.io import read, write
from ase.optimize import BFGS
from tests.client.bridges.conftest import ROOT, Place
from tests.client.conftest import LENNARD_JONES

EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


def at_rest() -> Atoms:
    """Argon where the test server's potential has it rest."""
    lengths = np.linspace(5.0, 5.5, 26)
    energies = []
    for length in lengths:
        atoms = bulk("Ar", "fcc", a=length)
        atoms.calc = LennardJones(**LENNARD_JONES)
        energies.append(atoms.get_potential_energy())
    low = lengths[int(np.argmin(energies))]
    parabola = np.polyfit(lengths - low, energies, 4)
    inside = [root.real for root in np.roots(np.polyder(parabola)) if abs(root) < 0.05]
    return bulk("Ar", "fcc", a=low + inside[0])


def numbers(printed: str, before: str) -> list[float]:
    found = re.search(rf"{before}: (.*)", printed)
    assert found is not None, printed
    return [float(word) for word in found[1].split()]


@pytest.fixture(scope="module")
def phonopy(place_with: Callable[..., Place]) -> Place:
    return place_with("phonopy==4.10.0", dependencies=True)


def test_phonons_are_those_of_the_potential(phonopy: Place, server: Any, tmp_path: Path) -> None:
    atoms = at_rest()
    write(tmp_path / "ar.extxyz", atoms)
    saved = tmp_path / "phonopy.yaml"
    ran = phonopy.run(
        EXAMPLES / "phonons.py", server.address, tmp_path / "ar.extxyz", "--supercell", 3, "--out", saved
    )
    assert ran.returncode == 0, ran.stderr
    assert np.abs(numbers(ran.stdout, "at Γ, THz")).max() < 1e-3
    # At 300 K all three modes of argon are full: 3 R.
    (capacity,) = numbers(ran.stdout, "heat capacity at 300 K, J/K/mol")
    assert 24.0 < capacity < 3 * 8.3145
    # The same by the potential itself, at the zone's border.
    script = f"""
import phonopy, numpy as np
from ase import Atoms
from ase.calculators.lj import LennardJones
phonon = phonopy.load({str(saved)!r})
phonon.run_qpoints([[0.5, 0.5, 0.0]])
print("there:", *phonon.get_qpoints_dict()["frequencies"][0])
forces = []
for cell in phonon.supercells_with_displacements:
    atoms = Atoms(cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=True)
    atoms.calc = LennardJones(**{LENNARD_JONES!r})
    forces.append(atoms.get_forces())
phonon.forces = forces
phonon.produce_force_constants()
phonon.symmetrize_force_constants()
phonon.run_qpoints([[0.5, 0.5, 0.0]])
print("here:", *phonon.get_qpoints_dict()["frequencies"][0])
"""
    (tmp_path / "again.py").write_text(script)
    again = phonopy.run(tmp_path / "again.py")
    assert again.returncode == 0, again.stderr
    there, here = numbers(again.stdout, "there"), numbers(again.stdout, "here")
    np.testing.assert_allclose(there, here, rtol=1e-6)
    assert min(here) > 0.5


def test_phonons_of_what_the_model_does_not_know(phonopy: Place, server: Any, tmp_path: Path) -> None:
    write(tmp_path / "he.extxyz", bulk("He", "fcc", a=4.0))
    ran = phonopy.run(EXAMPLES / "phonons.py", server.address, tmp_path / "he.extxyz")
    assert ran.returncode == 2
    assert "helium (2) is unknown" in ran.stderr


def test_elastic_constants_by_matcalc(place_with: Callable[..., Place], server: Any, tmp_path: Path) -> None:
    matcalc = place_with("matcalc==0.7.0", dependencies=True)
    atoms = at_rest()
    write(tmp_path / "ar.extxyz", atoms)
    ran = matcalc.run(EXAMPLES / "matcalc_elastic.py", server.address, tmp_path / "ar.extxyz")
    assert ran.returncode == 0, ran.stderr
    (modulus,) = numbers(ran.stdout, "bulk modulus, GPa")
    volumes, energies = [], []
    for scale in np.linspace(0.99, 1.01, 9):
        cell = atoms.copy()
        cell.set_cell(scale * atoms.cell[:], scale_atoms=True)
        cell.calc = LennardJones(**LENNARD_JONES)
        volumes.append(cell.get_volume())
        energies.append(cell.get_potential_energy())
    curve = np.polyder(np.polyfit(volumes, energies, 4), 2)
    assert modulus == pytest.approx(
        atoms.get_volume() * np.polyval(curve, atoms.get_volume()) * 160.2177, rel=0.05
    )


def test_dynamics_by_openmm(
    place_with: Callable[..., Place], server: Any, cluster: Any, tmp_path: Path
) -> None:
    openmm = place_with("openmm==8.6.1", dependencies=True)
    crystal = bulk("Ar", "fcc", a=5.3, cubic=True)
    for atoms in (cluster(4), crystal):
        write(tmp_path / "start.extxyz", atoms)
        ran = openmm.run(
            EXAMPLES / "openmm_md.py", server.address, tmp_path / "start.extxyz", "--temperature", 30
        )
        assert ran.returncode == 0, ran.stderr
        rows = np.array([[float(word) for word in line.split()] for line in ran.stdout.splitlines()])
        atoms.calc = LennardJones(**LENNARD_JONES)
        assert rows[0, 1] == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        assert rows[0, 2] > 0
        assert np.ptp(rows[:, 3]) < 0.02 * np.ptp(rows[:, 1])
    write(tmp_path / "he.extxyz", bulk("He", "fcc", a=5.3, cubic=True))
    ran = openmm.run(EXAMPLES / "openmm_md.py", server.address, tmp_path / "he.extxyz")
    assert ran.returncode == 2
    assert "helium (2) is unknown" in ran.stderr


@pytest.fixture(scope="module")
def torchsim(place_with: Callable[..., Place]) -> Place:
    return place_with("torch-sim-atomistic==0.3.0", dependencies=True)


class TestTorchSim:
    def test_relaxes_all_frames_together(
        self, torchsim: Place, server: Any, cluster: Any, tmp_path: Path
    ) -> None:
        frames = [cluster(size, seed=size) for size in (3, 5, 4)]
        for frame in frames:
            frame.set_cell([30.0] * 3)
        write(tmp_path / "in.extxyz", frames)
        ran = torchsim.run(
            EXAMPLES / "torchsim_model.py",
            server.address,
            tmp_path / "in.extxyz",
            *("--out", tmp_path / "out.extxyz", "--fmax", 1e-3, "--steps", 2_000),
        )
        assert ran.returncode == 0, ran.stderr
        for frame, relaxed in zip(frames, read(tmp_path / "out.extxyz", ":"), strict=True):
            frame.calc = LennardJones(**LENNARD_JONES)
            relaxed.calc = LennardJones(**LENNARD_JONES)
            BFGS(frame, logfile=None).run(fmax=1e-3)
            assert np.linalg.norm(relaxed.get_forces(), axis=1).max() < 2e-3
            assert relaxed.get_potential_energy() == pytest.approx(frame.get_potential_energy(), abs=1e-4)

    def test_model_is_as_torchsim_wants_it(self, torchsim: Place, server: Any, tmp_path: Path) -> None:
        script = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import torch, torch_sim as ts
from ase.build import bulk
from ase.calculators.lj import LennardJones
from torchsim_model import EquipotModel
from equipot.client import Client
frames = [bulk("Ar", "fcc", a=5.2, cubic=True), bulk("Ar", "hcp", a=3.7)]
for seed, frame in enumerate(frames):
    frame.rattle(0.05, seed=seed)
    frame.set_cell(frame.cell[:] + [[0.0, 0.1, 0.0], [0.0, 0.0, 0.2], [0.0, 0.0, 0.0]], scale_atoms=True)
with Client({server.address!r}) as client:
    model = EquipotModel(client, stress=True)
    state = ts.io.atoms_to_state(frames, torch.device("cpu"), torch.float64)
    found = model(state)
    for place, frame in enumerate(frames):
        frame.calc = LennardJones(**{LENNARD_JONES!r})
        assert abs(found["energy"][place] - frame.get_potential_energy()) < 1e-9
        mine = found["forces"][state.system_idx == place]
        assert torch.allclose(mine, torch.as_tensor(frame.get_forces()), atol=1e-9)
        stress = torch.as_tensor(frame.get_stress(voigt=False))
        assert torch.allclose(found["stress"][place], stress, atol=1e-9)
    moved = ts.integrate(frames, model, integrator=ts.nve, n_steps=5, temperature=20, timestep=0.002)
    assert moved.positions.shape == state.positions.shape
print("as it should be")
"""
        (tmp_path / "conform.py").write_text(script)
        ran = torchsim.run(tmp_path / "conform.py")
        assert ran.returncode == 0, ran.stderr
        assert "as it should be" in ran.stdout
