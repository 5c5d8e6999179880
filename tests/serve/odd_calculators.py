"""ASE calculators that do what real ones do on bad days. Imported in the process of a calculator."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any, ClassVar

import numpy as np
from ase.calculators.calculator import Calculator, all_changes


class Moody(Calculator):  # type: ignore[misc]  # ASE has no types
    """Energy and forces by distance from the origin; helium hangs, neon crashes, argon is no number."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]
    default_parameters: ClassVar[dict[str, Any]] = {"spring": 1.0}

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        print("computing")  # noqa: T201  # some calculators do, and it must reach nobody
        numbers = set(self.atoms.numbers)
        if 2 in numbers:
            subprocess.run(["sleep", "600"], check=True)  # as those do that drive a program
        if 10 in numbers:
            os._exit(7)
        if 36 in numbers:
            raise RuntimeError("krypton does not converge")
        spring, places = self.parameters["spring"], self.atoms.positions
        energy = np.nan if 18 in numbers else spring * (places**2).sum()
        self.results = {"energy": energy, "forces": -2.0 * spring * places}


class Charged(Calculator):  # type: ignore[misc]
    """Energy alone, which is charge and multiplicity, as semi-empirical programs take them."""

    implemented_properties: ClassVar[list[str]] = ["energy"]
    default_parameters: ClassVar[dict[str, Any]] = {"charge": 0, "multiplicity": 1}

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": self.parameters["charge"] + 0.1 * self.parameters["multiplicity"]}


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
