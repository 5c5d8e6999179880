"""A frame of a structure whose labels are found by their keys. Knows no file format."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import System
from equipot.train.sources.base import Frame, Note, ReadOptions
from equipot.train.sources.labels import find_charge_and_spin, find_labels
from equipot.train.sources.structure import check_structure


def keyed_frame(
    index: int,
    system: System,
    values: Mapping[str, Any],
    info: Mapping[str, Any],
    group: tuple[str, str] | None,
    options: ReadOptions,
) -> Frame:
    """The checked frame.

    Args:
        index: of the frame in its file.
        system: the structure.
        values: all that the file says of it by key, in which the labels are.
        info: those of them that are of the whole structure.
        group: key and value by which it belongs to others.
        options: which keys and units to take.

    Raises:
        FrameError: the structure or a label cannot be used.
    """
    check_structure(system)
    n_atoms = len(system.atomic_numbers)
    labels = find_labels(values, n_atoms, system.cell, system.pbc, options)
    charge, spin = find_charge_and_spin(info)
    return Frame(
        index=index,
        atomic_numbers=system.atomic_numbers,
        positions=system.positions,
        cell=system.cell,
        pbc=system.pbc,
        energy=labels.energy,
        forces=labels.forces,
        stress=labels.stress,
        charge=charge,
        spin_multiplicity=spin,
        group=group,
        notes=labels.notes + _zero_forces(labels.forces, n_atoms),
    )


def _zero_forces(forces: NDArray[np.float64] | None, n_atoms: int) -> tuple[Note, ...]:
    """A note if there are forces and all are zero, which in a frame of several atoms is hardly meant."""
    if forces is None or n_atoms < 2 or forces.any():
        return ()
    return (Note("forces: all zero in a frame of several atoms", f"{n_atoms} atoms"),)
