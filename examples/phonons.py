"""Phonons by phonopy with forces from an equipot server: `pip install phonopy 'equipot[ase]'`.

    python examples/phonons.py localhost:50051 [--supercell 2] [--mesh 20] [--out FILE] [STRUCTURE]

STRUCTURE is a crystal in any file that ASE reads, at rest; without one it is diamond. All displaced
supercells are asked for in one batch. Prints the frequencies at Γ and the heat capacity at 300 K.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import read
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from equipot.client import Client, ClientError


def phonons(client: Client, atoms: Atoms, *, supercell: int, displacement: float = 0.01) -> Phonopy:
    """Force constants of a crystal at rest.

    Args:
        client: of the server.
        atoms: the crystal.
        supercell: how many cells along each vector.
        displacement: of one atom at a time, in Å.

    Raises:
        StructureFailure: one of the supercells cannot be answered.
    """
    cell = PhonopyAtoms(
        symbols=atoms.symbols, cell=atoms.cell[:], scaled_positions=atoms.get_scaled_positions()
    )
    phonon = Phonopy(cell, np.diag([supercell] * 3))
    phonon.generate_displacements(distance=displacement)
    answer = client.predict(
        [
            Atoms(each.symbols, cell=each.cell, scaled_positions=each.scaled_positions, pbc=True)
            for each in phonon.supercells_with_displacements
        ]
    )
    answer.raise_for_failures()
    phonon.forces = [each.forces for each in answer]
    phonon.produce_force_constants()
    phonon.symmetrize_force_constants()
    return phonon


def main() -> int:
    """Computes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("structure", nargs="?")
    parser.add_argument("--supercell", type=int, default=2)
    parser.add_argument("--mesh", type=int, default=20)
    parser.add_argument("--out", help="where phonopy saves all of it, as YAML")
    words = parser.parse_args()
    atoms = read(words.structure) if words.structure else bulk("C", "diamond", a=3.57)
    try:
        with Client(words.address) as client:
            phonon = phonons(client, atoms, supercell=words.supercell)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    phonon.run_qpoints([[0, 0, 0]])
    print("at Γ, THz:", " ".join(f"{value:.4f}" for value in phonon.get_qpoints_dict()["frequencies"][0]))
    phonon.run_mesh([words.mesh] * 3)
    phonon.run_thermal_properties(temperatures=[300])
    print(f"heat capacity at 300 K, J/K/mol: {phonon.get_thermal_properties_dict()['heat_capacity'][0]:.4f}")
    if words.out:
        phonon.save(words.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
