"""Writes structures of a store back as extended xyz, with their labels. The only writer that needs ASE."""

import os
from collections.abc import Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from equipot.train.columns import Column
from equipot.train.errors import DataError
from equipot.train.places import in_blocks
from equipot.train.store import Store


def write_frames(stores: Sequence[Store], keys: Column, path: Path) -> int:
    """Writes structures in their order; returns how many.

    Each frame has energy, forces and stress where known, charge and spin_multiplicity where stated, and
    where it comes from (level_of_theory, source_file, source_frame), under names the importer reads back.

    Raises:
        DataError: nothing to write, or the file cannot be written.
    """
    if not len(keys):
        raise DataError("no structure to write: this split is empty")
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            for block in in_blocks(keys):
                for k, i in block.tolist():
                    ase.io.write(file, as_atoms(stores[k], i), format="extxyz")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    return len(keys)


def as_atoms(store: Store, index: int) -> ase.Atoms:
    """One structure as ASE's Atoms with a SinglePointCalculator that holds its labels."""
    system, labels, origin = store.system(index), store.labels(index), store.origin(index)
    atoms = ase.Atoms(system.atomic_numbers, system.positions, cell=system.cell, pbc=system.pbc)
    if system.charge:
        atoms.info["charge"] = system.charge
    if system.spin_multiplicity:
        atoms.info["spin_multiplicity"] = system.spin_multiplicity
    atoms.info["level_of_theory"] = store.manifest.level_of_theory
    atoms.info["source_file"] = origin.file
    atoms.info["source_frame"] = origin.frame
    if store.name(index):
        atoms.info["source_name"] = store.name(index)
    _add_extras(atoms, store, index)
    results: dict[str, object] = {}
    if np.isfinite(labels.energy):
        results["energy"] = labels.energy
    if np.isfinite(labels.forces).all():
        results["forces"] = labels.forces
    if labels.stress is not None:
        results["stress"] = labels.stress[(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]  # ASE's Voigt order
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _add_extras(atoms: ase.Atoms, store: Store, index: int) -> None:
    """Tags, fixed atoms and magnetic moments, where the store has them."""
    tags, fixed, moments = (store.extra(index, name) for name in ("tags", "fixed", "magmoms"))
    if tags is not None and (tags >= 0).all():
        atoms.set_tags(tags.astype(np.int64))
    if fixed is not None and fixed.any():
        atoms.set_constraint(FixAtoms(np.flatnonzero(fixed)))
    if moments is not None and np.isfinite(moments).all():
        atoms.set_array("magmoms", moments.astype(np.float64))
