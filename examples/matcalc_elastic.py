"""Elastic constants by matcalc with forces from an equipot server: `pip install matcalc 'equipot[ase]'`.

    python examples/matcalc_elastic.py localhost:50051 [--fmax 0.01] [STRUCTURE]

STRUCTURE is a crystal in any file that ASE reads; without one it is diamond. matcalc takes any ASE
calculator, so its other properties (EOSCalc, PhononCalc, RelaxCalc, …) take `EquipotCalculator` in the
same way. The model needs stress.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from ase.build import bulk
from ase.io import read
from matcalc import ElasticityCalc

from equipot.client import ClientError, EquipotCalculator


def main() -> int:
    """Relaxes, strains, and prints moduli in GPa."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("structure", nargs="?")
    parser.add_argument("--fmax", type=float, default=0.01, help="of the crystal at rest, eV/Å")
    words = parser.parse_args()
    atoms = read(words.structure) if words.structure else bulk("C", "diamond", a=3.57, cubic=True)
    try:
        with EquipotCalculator(words.address) as calculator:
            found = ElasticityCalc(calculator, fmax=words.fmax, units_GPa=True).calc(atoms)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("elastic tensor, GPa:", np.round(np.asarray(found["elastic_tensor"].voigt), 3), sep="\n")
    print(f"bulk modulus, GPa: {found['bulk_modulus_vrh']:.4f}")
    print(f"shear modulus, GPa: {found['shear_modulus_vrh']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
