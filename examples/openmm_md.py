"""Molecular dynamics by OpenMM with forces from an equipot server: `pip install openmm 'equipot[ase]'`.

    python examples/openmm_md.py localhost:50051 [--steps 200] [--temperature 300] [STRUCTURE]

STRUCTURE is any file that ASE reads; without one it is ethanol. OpenMM integrates NVE by leapfrog with
0.5 fs; printed are the step, and potential, kinetic and total energy in eV. A `PythonForce` of OpenMM
asks the server.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import openmm
from ase import Atoms, units
from ase.build import molecule
from ase.io import read
from openmm.unit import dalton, femtosecond, kelvin, kilojoule_per_mole, nanometer

from equipot.client import Client, ClientError, Session

EV = units.mol / units.kJ
"""kJ/mol in an eV."""

NM = 10.0
"""Å in a nm."""


def force_of(session: Session, atoms: Atoms) -> openmm.PythonForce:
    """OpenMM's force of these atoms; their session answers its every question."""

    def compute(state: openmm.State) -> tuple[float, Any]:
        positions = NM * state.getPositions(asNumpy=True).value_in_unit(nanometer)
        cell = None
        if atoms.pbc.any():
            cell = NM * np.array([state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(nanometer)])
        answer = session.predict(positions, cell)
        answer.raise_for_failures()
        return EV * float(answer.energy[0]), EV * NM * answer.forces

    force = openmm.PythonForce(compute)
    force.setUsesPeriodicBoundaryConditions(bool(atoms.pbc.any()))
    return force


def run(session: Session, atoms: Atoms, *, steps: int, temperature: float) -> None:
    """Integrates from this temperature (K) and prints energies every ten steps."""
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass * dalton)
    if atoms.pbc.any():
        # OpenMM wants a cell whose first vector is along x, as in ASE's standard form.
        atoms.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)
        system.setDefaultPeriodicBoxVectors(*(atoms.cell[:] / NM))
    system.addForce(force_of(session, atoms))
    integrator = openmm.VerletIntegrator(0.5 * femtosecond)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(atoms.positions / NM)
    context.setVelocitiesToTemperature(temperature * kelvin, 1)
    for step in range(0, steps + 1, 10):
        state = context.getState(getEnergy=True)
        potential = state.getPotentialEnergy().value_in_unit(kilojoule_per_mole) / EV
        kinetic = state.getKineticEnergy().value_in_unit(kilojoule_per_mole) / EV
        print(f"{step:6d} {potential:18.8f} {kinetic:14.8f} {potential + kinetic:18.8f}")
        if step < steps:
            integrator.step(10)


def main() -> int:
    """Runs, and prints energies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("structure", nargs="?")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=300.0)
    words = parser.parse_args()
    atoms = read(words.structure) if words.structure else molecule("CH3CH2OH")
    try:
        with Client(words.address) as client, client.session(atoms) as session:
            run(session, atoms, steps=words.steps, temperature=words.temperature)
    except (ClientError, openmm.OpenMMException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
