"""Structures relaxed together go as ASE moves each of them alone, in any company, from any token on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE, LBFGS

from equipot.serve.motion.notes import Advance, Kept
from equipot.serve.motion.progress import Given
from equipot.serve.motion.relaxation import Relaxation, Telling, advance, begun
from equipot.serve.motion.relaxing import OptimizerName, Relaxing
from equipot.serve.motion.state import State
from equipot.serve.motion.strain import CellMotion

OPTIMIZERS: dict[OptimizerName, Any] = {"fire": FIRE, "lbfgs": LBFGS}
FILTERS: dict[CellMotion, dict[str, Any]] = {
    "full": {"scalar_pressure": 0.02},
    "isotropic": {"hydrostatic_strain": True, "scalar_pressure": 0.02},
    "constant_volume": {"constant_volume": True},
}


def molecules() -> list[Atoms]:
    random = np.random.default_rng(1)
    found = [molecule(name) for name in ("CH3CHO", "C6H6", "H2O", "O")]
    for atoms in found:
        atoms.rattle(0.08, rng=random)
    # One of them shares its request with atoms that stay.
    found[1].set_constraint(FixAtoms([0, 3, 7]))
    return found


def crystals() -> list[Atoms]:
    random = np.random.default_rng(2)
    found = [bulk("Cu", cubic=True), bulk("Al", a=4.2), bulk("Ni")]
    for atoms in found:
        strain = np.eye(3) + random.normal(0, 0.02, (3, 3))
        atoms.set_cell(atoms.cell[:] @ strain, scale_atoms=True)
        atoms.rattle(0.05, rng=random)
    found[0].set_constraint(FixAtoms([1]))
    return found


def given(one: Relaxation, like: Atoms, *, stress: bool) -> Given:
    atoms = Atoms(like.numbers, one.positions, cell=one.cell, pbc=like.pbc, calculator=EMT())
    return Given(
        atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False) if stress else None
    )


def start(how: Relaxing, atoms: Atoms, state: State | None = None) -> Relaxation:
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        fixed[constraint.index] = True
    return begun(how, atoms.positions.copy(), atoms.cell[:].copy(), fixed, state)


def relax(
    how: Relaxing, structures: list[Atoms], telling: Telling, states: list[State | None] | None = None
) -> list[Relaxation]:
    """All of them together; whoever is done leaves, and one joins late."""
    some = [
        start(how, atoms, state)
        for atoms, state in zip(structures, states or [None] * len(structures), strict=True)
    ]
    crew, waiting = list(zip(some[:-1], structures[:-1], strict=True)), [(some[-1], structures[-1])]
    while crew or waiting:
        advance([one for one, _ in crew], how, telling)
        crew = [(one, like) for one, like in crew if one.goes_on and one.fault is None] + waiting
        waiting = []
        for one, like in crew:
            one.progress.last = given(one, like, stress=how.moves_cell)
    return some


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cell", ["fixed", *FILTERS])
def test_the_course_is_that_of_ase_step_by_step(optimizer: OptimizerName, cell: CellMotion) -> None:
    words = FILTERS.get(cell, {})
    pressure = words.get("scalar_pressure", 0.0)
    steps = 9 if words else 25
    how = Relaxing(optimizer=optimizer, fmax=0.03, steps=steps, max_step=0.15, cell=cell, pressure=pressure)
    structures = molecules() if cell == "fixed" else crystals()
    found = relax(how, structures, Telling(every=1, frames=True))
    for one, like in zip(found, structures, strict=True):
        atoms = like.copy()
        atoms.calc = EMT()
        target = FrechetCellFilter(atoms, **words) if words else atoms
        here = OPTIMIZERS[optimizer](target, logfile=None, maxstep=0.15)
        notes = iter(one.progress.notes)
        converged = False
        for converged in here.irun(fmax=0.03, steps=steps):  # noqa: B007  # the last one
            if here.nsteps:
                note = next(notes)
                assert isinstance(note, Advance)
                assert note.step == here.nsteps
                assert note.frame is not None
                np.testing.assert_allclose(note.frame.positions, atoms.positions, rtol=0, atol=1e-7)
                np.testing.assert_allclose(note.frame.cell, atoms.cell[:], rtol=0, atol=1e-7)
                assert note.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
                largest = np.linalg.norm(atoms.get_forces(), axis=1).max()
                assert note.largest_force == pytest.approx(largest, abs=1e-6)
        assert next(notes, None) is None
        assert one.progress.steps == here.nsteps
        assert one.progress.converged == bool(converged)
    if cell == "fixed":
        # Some are at rest and some are not, so it matters that they leave.
        assert len({one.progress.steps for one in found}) > 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cell", ["fixed", "full"])
def test_no_bit_depends_on_company_or_on_a_rest(optimizer: OptimizerName, cell: CellMotion) -> None:
    how = Relaxing(optimizer=optimizer, fmax=1e-9, steps=30, cell=cell)
    structures = molecules()[:3] if cell == "fixed" else crystals()[1:]
    together = relax(how, structures, Telling(keep_every=11))
    alone = relax(how, structures[:1], Telling())[0]
    np.testing.assert_array_equal(together[0].positions, alone.positions)
    np.testing.assert_array_equal(together[0].cell, alone.cell)
    kept = [note.state for note in together[0].progress.notes if isinstance(note, Kept)]
    assert [state.step for state in kept] == [11, 22]
    for state in kept:
        again = relax(how, [structures[1], structures[0]], Telling(), [None, state])[1]
        assert again.progress.steps == 30
        np.testing.assert_array_equal(again.positions, alone.positions)
        np.testing.assert_array_equal(again.cell, alone.cell)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_that_goes_wrong_stops_alone(optimizer: OptimizerName) -> None:
    how = Relaxing(optimizer=optimizer, fmax=1e-9, steps=3, cell="full")
    structures = crystals()
    some = [start(how, atoms) for atoms in structures]
    for step in range(3):
        for one, like in zip(some, structures, strict=True):
            one.progress.last = given(one, like, stress=True)
        last = some[1].progress.last
        assert last is not None
        # From the second step on: forces beyond all bounds.
        some[1].progress.last = Given(last.energy, last.forces + (1e200 if step else 0.0), last.stress)
        advance(some, how, Telling())
        if some[1].fault is not None:
            break
    assert some[1].fault is not None
    assert some[1].fault.reason == "not_finite"
    assert np.isfinite(some[1].positions).all()
    assert all(one.fault is None and np.isfinite(one.positions).all() for one in (some[0], *some[2:]))


@pytest.mark.parametrize("pull", [-60.0, 60.0])
def test_a_cell_that_collapses_or_blows_up_is_stopped(pull: float) -> None:
    how = Relaxing(fmax=1e-9, steps=500, max_step=1.0, cell="full")
    one = start(how, bulk("Cu"))
    while one.goes_on and one.fault is None:
        one.progress.last = Given(0.0, np.zeros((1, 3)), pull * np.eye(3))
        advance([one], how, Telling())
    assert one.fault is not None
    assert (one.fault.reason, one.fault.field) == ("unstable", "cell")
