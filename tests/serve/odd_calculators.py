"""ASE calculators that do what real ones do on bad days. Imported in the process of a calculator."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.qchem import QChem


class Speechless(Exception):
    """Cannot be put into words."""

    def __str__(self) -> str:
        raise ValueError("not even this")


class Moody(Calculator):  # type: ignore[misc]  # ASE has no types
    """Energy and forces by distance from the origin; helium hangs, neon crashes, argon is no number.

    Xenon's forces stand askew, radon has none, and what iron says cannot be sent or even be said.

    It writes to the files that it is given, but for its model.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]
    default_parameters: ClassVar[dict[str, Any]] = {"spring": 1.0}

    def __init__(self, spring: float = 1.0, model_file: str = "", **files: str) -> None:
        super().__init__(spring=spring)
        self._files = [Path(file) for file in files.values()]

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        for path in self._files:
            with path.open("a") as file:
                file.write("computing\n")
        print("computing")  # noqa: T201  # some calculators do, and it must reach nobody
        numbers = set(self.atoms.numbers)
        if numbers & {2, 10} and os.fork() == 0:
            time.sleep(600)  # as the workers of a pool, which hold open what was open
            os._exit(0)
        if 2 in numbers:
            subprocess.run(["sleep", "600"], check=True)  # as those do that drive a program
        if 10 in numbers:
            os._exit(7)
        if 36 in numbers:
            raise RuntimeError("krypton does not converge")
        spring, places = self.parameters["spring"], self.atoms.positions
        energy = np.nan if 18 in numbers else spring * (places**2).sum()
        forces: Any = -2.0 * spring * places
        if 54 in numbers:
            forces = forces.T
        if 86 in numbers:
            forces = None
        if 26 in numbers:
            raise RuntimeError("\udcff") if 1 in numbers else Speechless
        self.results = {"energy": energy, "forces": forces}


class Charged(Calculator):  # type: ignore[misc]
    """Energy alone, which is charge and multiplicity, as semi-empirical programs take them."""

    implemented_properties: ClassVar[list[str]] = ["energy"]
    default_parameters: ClassVar[dict[str, Any]] = {"charge": 0, "multiplicity": 1}

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": self.parameters["charge"] + 0.1 * self.parameters["multiplicity"]}


class Input(QChem):  # type: ignore[misc]
    """As `Charged`: what ASE writes for Q-Chem, which has no multiplicity unless it is given one."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        super().__init__(label=f"{self._folder.name}/odd")

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes
    ) -> None:
        Calculator.calculate(self, atoms, properties, system_changes)
        self.write_input(self.atoms, properties, system_changes)
        molecule = Path(f"{self.label}.inp").read_text().partition("$molecule")[2]
        charge, multiplicity = molecule.split()[:2]
        self.results = {
            "energy": int(charge) + 0.1 * int(multiplicity),
            "forces": np.zeros_like(self.atoms.positions),
        }


class ByInfo(Calculator):  # type: ignore[misc]
    """As `Charged`, but as machine-learned potentials take them."""

    implemented_properties: ClassVar[list[str]] = ["energy"]

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": self.atoms.info["charge"] + 0.1 * self.atoms.info["spin"]}


class Slow(Calculator):  # type: ignore[misc]
    """Takes its time."""

    implemented_properties: ClassVar[list[str]] = ["energy"]
    default_parameters: ClassVar[dict[str, Any]] = {"seconds": 1.0}

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        time.sleep(self.parameters["seconds"])
        self.results = {"energy": 1.0}


def nothing() -> object:
    """Makes no calculator."""
    return object()
