"""Any ASE calculator, one structure at a time. Runs in the calculator's process."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from equipot.serve.foreign.files import sha256, stamps, written
from equipot.serve.foreign.words import Answered, Facts, Refused, Structure, answered


class AseBackend:
    """One calculator, asked for one structure after the other."""

    def __init__(self, calculator: Any, *, factory: str, charge: str, known: Facts) -> None:  # noqa: ANN401
        self._calculator = calculator
        self._charge = charge
        self._facts = known
        self._name = factory
        # As it was made: for those who say nothing of it, whatever others have asked for since.
        made = getattr(calculator, "parameters", None) or {}
        self._unsaid = {name: made[name] for name in ("multiplicity",) if name in made}

    def facts(self) -> Facts:
        """What it says of itself."""
        return self._facts

    def compute(self, structures: list[Structure], *, forces: bool, stress: bool) -> list[Answered | Refused]:
        """Answers in order."""
        return [self._one(structure, forces=forces, stress=stress) for structure in structures]

    def _one(self, structure: Structure, *, forces: bool, stress: bool) -> Answered | Refused:
        atoms = Atoms(structure.numbers, structure.places, cell=structure.lattice, pbc=structure.pbc)
        self._tell_charge(atoms, structure)
        # ASE compares atoms with the last ones, but not what they say of charge and spin.
        if hasattr(self._calculator, "reset"):
            self._calculator.reset()
        atoms.calc = self._calculator
        energy = atoms.get_potential_energy()
        all_forces: Any = atoms.get_forces() if forces else None
        if forces and np.shape(all_forces) != (len(atoms), 3):
            # As bytes, (3, n) would be as good as (n, 3).
            raise ValueError(f"its forces have shape {np.shape(all_forces)} for {len(atoms)} atoms")
        all_stress = None
        if stress:
            periodic = all(structure.pbc)
            all_stress = (
                voigt_6_to_full_3x3_stress(atoms.get_stress()) if periodic else np.full((3, 3), np.nan)
            )
        return answered(energy, all_forces, all_stress)

    def _tell_charge(self, atoms: Any, structure: Structure) -> None:  # noqa: ANN401
        charge, multiplicity = structure.charge, structure.spin_multiplicity
        if self._charge == "info":
            atoms.info |= {"charge": charge, "spin": multiplicity, "spin_multiplicity": multiplicity}
        elif self._charge == "initial":
            # Calculators sum them up; how they are spread over the atoms is theirs to find.
            atoms.set_initial_charges(np.full(len(atoms), charge / len(atoms)))
            if multiplicity:
                atoms.set_initial_magnetic_moments(np.full(len(atoms), (multiplicity - 1) / len(atoms)))
        elif self._charge == "parameter":
            said = {"multiplicity": multiplicity} if multiplicity else self._unsaid
            wanted = {"charge": charge, **said}
            parameters = self._calculator.parameters
            if not said:
                # Not set to None, which is no number to a calculator that goes by whether it is there.
                parameters.pop("multiplicity", None)
            if any(parameters.get(name) != value for name, value in wanted.items()):
                self._calculator.set(**wanted)


def build(target: str, arguments: Mapping[str, Any], charge: str, device: str) -> AseBackend:
    """Makes the calculator.

    Args:
        target: "module:factory" or "file.py:factory".
        arguments: of the factory.
        charge: how it is told of charges.
        device: not used: calculators take theirs as an argument.

    Raises:
        TypeError: what the factory makes is no calculator.
    """
    place, _, name = target.rpartition(":")
    factory, versions, weights = _factory(place, name)
    before = stamps(arguments)
    calculator = factory(**arguments)
    has = list(getattr(calculator, "implemented_properties", ()))
    if not callable(getattr(calculator, "get_potential_energy", None)) or "energy" not in has:
        raise TypeError(
            f"{target} made a {type(calculator).__name__}, which is no ASE calculator of energies"
        )
    parameters = getattr(calculator, "default_parameters", {})
    if charge == "auto":
        charge = "parameter" if "charge" in parameters and hasattr(calculator, "set") else "refuse"
    # Other weights are another model; what it wrote while it was made is none.
    read = before.keys() - written(arguments, before)
    weights |= {argument: sha256(arguments[argument]) for argument in sorted(read)}
    known = Facts(
        elements=(),
        cutoff=0.0,
        level_of_theory=type(calculator).__name__,
        has_forces="forces" in has,
        has_stress="stress" in has,
        conservative=False,
        dtype="",
        n_parameters=0,
        charge=charge,
        batched=False,
        versions=versions,
        weights=weights,
    )
    return AseBackend(calculator, factory=name, charge=charge, known=known)


def _factory(place: str, name: str) -> tuple[Callable[..., Any], dict[str, str], dict[str, str]]:
    versions = {"ase": importlib.metadata.version("ase")}
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("equipot_calculator", place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name), versions, {Path(place).name: sha256(place)}
    module = importlib.import_module(place)
    top = place.partition(".")[0]
    for package in importlib.metadata.packages_distributions().get(top, []):
        versions[package] = importlib.metadata.version(package)
    return getattr(module, name), versions, {}
