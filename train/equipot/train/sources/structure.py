"""The checks every frame passes before it is stored, whatever file it came from."""

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import System
from equipot.model.errors import StructureError
from equipot.model.neighbors import neighbor_list
from equipot.model.validate import check_system
from equipot.train.sources.base import FrameError, Reason

MIN_DISTANCE = 0.1
"""Å. Two atoms closer than this are one atom written twice, or a unit other than Å."""
MAX_ATOMIC_NUMBER = 118


def check_structure(system: System) -> None:
    """Raises FrameError for a structure that no model could be trained on, periodic images included."""
    numbers, positions = system.atomic_numbers, system.positions
    if len(numbers) == 0:
        raise FrameError(Reason.NO_ATOMS, "0 atoms")
    bad = np.flatnonzero((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER))
    if len(bad):
        raise FrameError(Reason.INVALID, f"atom {bad[0]} has atomic number {numbers[bad[0]]}")
    finite = np.isfinite(positions).all(axis=1)
    if not finite.all():
        atom = int(np.flatnonzero(~finite)[0])
        raise FrameError(Reason.NON_FINITE_POSITIONS, f"atom {atom} is at {positions[atom].tolist()}")
    try:
        check_system(system)
    except StructureError as error:
        reason = Reason.SINGULAR_CELL if error.field == "cell" else Reason.INVALID
        raise FrameError(reason, error.message) from None
    pairs = neighbor_list(positions, system.cell, system.pbc, MIN_DISTANCE)
    if len(pairs.senders):
        a, b, distance = _closest(system, pairs.senders, pairs.receivers, pairs.cell_shifts)
        raise FrameError(Reason.OVERLAP, f"atoms {a} and {b} are {distance:.3g} Å apart, the least is {MIN_DISTANCE} Å")


def _closest(
    system: System, senders: NDArray[np.int64], receivers: NDArray[np.int64], shifts: NDArray[np.int64]
) -> tuple[int, int, float]:
    vectors = system.positions[senders] + shifts @ system.cell - system.positions[receivers]
    distances = np.linalg.norm(vectors, axis=1)
    k = int(distances.argmin())
    a, b = sorted((int(senders[k]), int(receivers[k])))
    return a, b, float(distances[k])
