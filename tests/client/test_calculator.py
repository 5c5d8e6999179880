"""The ASE calculator: a local one's numbers, nothing asked for twice, nothing stale, one bundle per run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.io.trajectory import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from equipot.client import (
    Client,
    ClientError,
    EquipotCalculator,
    InvalidStructure,
    ModelChanged,
    ModelNotFound,
    RetryPolicy,
    ServerError,
    ServerUnavailable,
    StructureFailure,
)

OTHER_DIGEST = "sha256:" + "cd" * 32


@pytest.fixture
def calculator(server: Any) -> Iterator[EquipotCalculator]:
    with EquipotCalculator(server.address) as calculator:
        yield calculator


def n_calls(server: Any) -> int:
    return len(server.seen)


def test_numbers_are_those_of_a_local_calculator(
    crystal: Atoms, calculator: EquipotCalculator, make_local: Callable[[], Any]
) -> None:
    local = crystal.copy()
    crystal.calc, local.calc = calculator, make_local()
    assert crystal.get_potential_energy() == local.get_potential_energy()
    assert crystal.get_potential_energy(force_consistent=True) == local.get_potential_energy()
    np.testing.assert_array_equal(crystal.get_forces(), local.get_forces())
    np.testing.assert_allclose(crystal.get_stress(), local.get_stress(), rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(crystal.get_stress(voigt=False), local.get_stress(voigt=False), atol=1e-16)


def test_what_is_known_is_not_asked_for_again(
    server: Any, cluster: Callable[..., Atoms], calculator: EquipotCalculator
) -> None:
    atoms = cluster(4)
    atoms.calc = calculator
    atoms.get_potential_energy()
    atoms.get_forces()
    atoms.get_potential_energy(force_consistent=True)
    assert n_calls(server) == 1
    atoms.positions[0, 0] += 0.01
    atoms.get_forces()
    atoms.get_potential_energy()
    assert n_calls(server) == 2


def test_stress_is_asked_for_only_where_it_is_read(
    server: Any, crystal: Atoms, calculator: EquipotCalculator
) -> None:
    crystal.calc = calculator

    def step(*properties: str) -> None:
        crystal.positions[0, 0] += 0.01
        for name in properties:
            calculator.get_property(name, crystal)

    step("forces", "energy")
    assert [seen.properties for seen in server.seen] == [[1, 2]]
    step("forces", "stress")
    assert [seen.properties for seen in server.seen[1:]] == [[1, 2], [1, 2, 3]]
    # A cell relaxation reads both at each step: one call is enough from the second step on.
    step("forces", "stress")
    step("energy", "forces", "stress")
    assert [seen.properties for seen in server.seen[3:]] == [[1, 2, 3], [1, 2, 3]]
    step("forces")
    step("forces")
    assert [seen.properties for seen in server.seen[5:]] == [[1, 2, 3], [1, 2]]
    step("energy")
    step("energy")
    assert [seen.properties for seen in server.seen[7:]] == [[1, 2], [1]]


def test_no_stress_without_three_periodic_directions(
    server: Any, crystal: Atoms, calculator: EquipotCalculator
) -> None:
    crystal.pbc = (True, True, False)
    crystal.calc = calculator
    crystal.get_potential_energy()
    with pytest.raises(PropertyNotImplementedError, match="periodic in all three"):
        crystal.get_stress()
    assert n_calls(server) == 1
    assert np.isfinite(crystal.get_forces()).all()


def test_no_stress_from_a_model_without_it(
    server: Any, crystal: Atoms, calculator: EquipotCalculator
) -> None:
    server.has_stress = False
    crystal.calc = calculator
    with pytest.raises(PropertyNotImplementedError, match="has no stress"):
        crystal.get_stress()
    assert n_calls(server) == 0
    assert np.isfinite(crystal.get_forces()).all()


@pytest.mark.parametrize(("key", "value", "shift"), [("charge", -1, -1.0), ("spin", 3, 0.375)])
def test_charge_and_spin_are_sent_and_part_of_the_cache(
    server: Any,
    cluster: Callable[..., Atoms],
    calculator: EquipotCalculator,
    key: str,
    value: int,
    shift: float,
) -> None:
    atoms = cluster(3)
    atoms.calc = calculator
    neutral = atoms.get_potential_energy()
    atoms.info[key] = value
    assert atoms.get_potential_energy() == pytest.approx(neutral + shift, abs=1e-12)
    assert atoms.get_potential_energy() == pytest.approx(neutral + shift, abs=1e-12)
    assert n_calls(server) == 2
    del atoms.info[key]
    assert atoms.get_potential_energy() == neutral
    atoms.info["comment"] = "of no account"
    atoms.get_potential_energy()
    assert n_calls(server) == 3


def test_a_charge_that_is_none_leaves_no_results(
    cluster: Callable[..., Atoms], calculator: EquipotCalculator
) -> None:
    atoms = cluster(3)
    atoms.calc = calculator
    atoms.get_forces()
    atoms.info["charge"] = "unknown"
    with pytest.raises(InvalidStructure, match="charge: is 'unknown'"):
        atoms.get_forces()
    assert calculator.results == {}


@pytest.mark.parametrize("code", ["INTERNAL", "UNAVAILABLE"])
def test_after_an_error_nothing_stale_is_left(server: Any, cluster: Callable[..., Atoms], code: str) -> None:
    atoms = cluster(4)
    with Client(server.address, retry=RetryPolicy(attempts=1)) as client:
        atoms.calc = EquipotCalculator(client)
        before = atoms.get_forces()
        atoms.positions[0, 0] += 0.3
        server.fail(grpc.StatusCode[code])
        with pytest.raises((ServerError, ServerUnavailable)):
            atoms.get_forces()
        assert atoms.calc.results == {}
        assert atoms.calc.get_property("forces", atoms, allow_calculation=False) is None
        after = atoms.get_forces()
    assert np.abs(after - before).max() > 1e-4


def test_a_structure_the_model_cannot_do_raises_and_leaves_no_results(
    cluster: Callable[..., Atoms], calculator: EquipotCalculator
) -> None:
    atoms = cluster(3)
    atoms.calc = calculator
    atoms.get_forces()
    atoms.numbers[1] = 2
    with pytest.raises(StructureFailure, match="helium") as caught:
        atoms.get_potential_energy()
    assert caught.value.field == "atomic_numbers"
    assert calculator.results == {}


def test_positions_that_blew_up_raise(cluster: Callable[..., Atoms], calculator: EquipotCalculator) -> None:
    atoms = cluster(3)
    atoms.calc = calculator
    atoms.positions[2, 2] = np.nan
    with pytest.raises(StructureFailure, match="not finite for atom 2"):
        atoms.get_forces()


def test_a_run_stays_on_the_bundle_that_answered_first(
    server: Any, cluster: Callable[..., Atoms], calculator: EquipotCalculator
) -> None:
    atoms = cluster(4)
    atoms.calc = calculator
    assert calculator.model_reference is None
    atoms.get_forces()
    first = server.pinned
    assert calculator.model_reference is not None
    assert calculator.model_reference.pinned == first
    assert calculator.model_reference.level_of_theory == "LJ"
    atoms.rattle(0.01, seed=1)
    atoms.get_forces()
    assert [seen.model for seen in server.seen] == ["", first]

    server.digest = OTHER_DIGEST
    atoms.rattle(0.01, seed=2)
    with pytest.raises(ModelChanged, match="no longer serves") as caught:
        atoms.get_forces()
    assert first in str(caught.value)
    assert "new calculator" in str(caught.value)
    assert calculator.results == {}
    with EquipotCalculator(server.address) as renewed:
        atoms.calc = renewed
        atoms.get_forces()
        assert renewed.model_reference is not None
        assert renewed.model_reference.digest == OTHER_DIGEST


def test_an_answer_of_another_bundle_than_asked_for_is_refused(
    server: Any, cluster: Callable[..., Atoms], calculator: EquipotCalculator
) -> None:
    atoms = cluster(4)
    atoms.calc = calculator
    atoms.get_forces()
    server.tamper = lambda response: setattr(response.model, "digest", OTHER_DIGEST)
    atoms.rattle(0.01)
    with pytest.raises(ModelChanged, match=OTHER_DIGEST):
        atoms.get_forces()


def test_a_model_that_never_was_is_not_called_changed(server: Any, cluster: Callable[..., Atoms]) -> None:
    atoms = cluster(2)
    with EquipotCalculator(server.address, model="other") as calculator:
        atoms.calc = calculator
        with pytest.raises(ModelNotFound, match="other"):
            atoms.get_forces()


def test_setting_another_model_asks_anew(
    server: Any, cluster: Callable[..., Atoms], calculator: EquipotCalculator
) -> None:
    atoms = cluster(2)
    atoms.calc = calculator
    atoms.get_forces()
    calculator.set(model="lennard-jones", level_of_theory="LJ")
    assert calculator.results == {}
    assert calculator.model_reference is None
    atoms.get_forces()
    assert (server.seen[-1].model, server.seen[-1].level_of_theory) == ("lennard-jones", "LJ")


def test_relaxation_reaches_the_minimum(cluster: Callable[..., Atoms], calculator: EquipotCalculator) -> None:
    atoms = cluster(4, seed=3)
    atoms.calc = calculator
    assert BFGS(atoms, logfile=None).run(fmax=1e-4, steps=200)
    # Four Lennard-Jones atoms end as a tetrahedron: six bonds of −ε, up to the smoothing beyond 6 Å.
    distances = atoms.get_all_distances()[np.triu_indices(4, 1)]
    np.testing.assert_allclose(distances, 2 ** (1 / 6) * 3.4, atol=5e-3)
    assert atoms.get_potential_energy() == pytest.approx(-6 * 0.0104, abs=1e-6)


def test_cell_relaxation_reaches_zero_stress(
    server: Any, crystal: Atoms, calculator: EquipotCalculator
) -> None:
    crystal.calc = calculator
    optimizer = BFGS(FrechetCellFilter(crystal), logfile=None)
    assert optimizer.run(fmax=2e-3, steps=100)
    assert np.abs(crystal.get_stress()).max() < 1e-4
    assert n_calls(server) <= optimizer.nsteps + 3


def test_dynamics_conserves_energy(
    server: Any, cluster: Callable[..., Atoms], calculator: EquipotCalculator
) -> None:
    atoms = cluster(8, seed=1)
    atoms.calc = calculator
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=200)
    widths = np.sqrt(atoms.get_masses() * 20 * units.kB)[:, None]
    atoms.set_momenta(widths * np.random.default_rng(1).normal(size=(8, 3)))
    calls = n_calls(server)
    dynamics = VelocityVerlet(atoms, timestep=5 * units.fs)
    total, kinetic = [], []
    for _ in range(200):
        dynamics.run(1)
        total.append(atoms.get_total_energy())
        kinetic.append(atoms.get_kinetic_energy())
    assert np.ptp(total) < 0.01 * np.ptp(kinetic)
    assert n_calls(server) - calls <= 202


def test_a_trajectory_says_where_its_numbers_come_from(
    server: Any, crystal: Atoms, calculator: EquipotCalculator, tmp_path: Path
) -> None:
    crystal.calc = calculator
    crystal.set_constraint(FixAtoms([0]))
    path = tmp_path / "run.traj"
    with Trajectory(path, "w", crystal) as trajectory:
        for _ in range(3):
            crystal.rattle(0.01)
            crystal.get_forces()
            trajectory.write()
    frames = read(path, ":")
    assert len(frames) == 3
    assert frames[-1].calc.name == "equipot"
    assert frames[-1].calc.parameters["model"] == server.pinned
    assert frames[-1].calc.parameters["level_of_theory"] == "LJ"
    assert frames[-1].get_potential_energy() == crystal.get_potential_energy()
    np.testing.assert_array_equal(frames[-1].get_forces(), crystal.get_forces())
    assert n_calls(server) == 3


def test_extxyz_carries_the_results(crystal: Atoms, calculator: EquipotCalculator, tmp_path: Path) -> None:
    crystal.calc = calculator
    crystal.get_stress()
    path = tmp_path / "one.extxyz"
    write(path, crystal)
    back = read(path)
    assert back.get_potential_energy() == pytest.approx(crystal.get_potential_energy())
    np.testing.assert_allclose(back.get_forces(), crystal.get_forces(), atol=1e-8)
    np.testing.assert_allclose(back.get_stress(), crystal.get_stress(), atol=1e-8)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_works_by_itself(
    server: Any, cluster: Callable[..., Atoms], calculator: EquipotCalculator, way: Callable[[Any], Any]
) -> None:
    atoms = cluster(4)
    atoms.calc = calculator
    energy = atoms.get_potential_energy()
    copied = way(atoms)
    assert copied.get_potential_energy() == energy
    assert n_calls(server) == 1
    calculator.close()
    copied.rattle(0.01)
    copied.get_forces()
    assert copied.calc.model_reference == calculator.model_reference
    atoms.rattle(0.01)
    with pytest.raises(ClientError, match="is closed"):
        atoms.get_forces()


def test_a_given_client_stays_its_owners(server: Any, cluster: Callable[..., Atoms]) -> None:
    with Client(server.address, model="lennard-jones") as client:
        with EquipotCalculator(client, timeout=9) as calculator:
            atoms = cluster(2)
            atoms.calc = calculator
            atoms.get_forces()
        assert client.predict(cluster(2)).failures == ()
    assert server.seen[0].model == "lennard-jones"
    assert server.seen[0].time_left < 9.5
