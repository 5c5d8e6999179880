"""The checks every frame passes before it is stored, whatever file it came from: the model's own."""

import numpy as np

from equipot.model.batch import System, build_graph
from equipot.model.errors import StructureError
from equipot.model.validate import check_graph, check_system
from equipot.train.sources.base import FrameError, Reason

MAX_ATOMIC_NUMBER = 118
_SEARCH_RADIUS = 1.5  # Å; a cell list of 0.1 Å has so many cells that it takes fifty times longer


def check_structure(system: System) -> None:
    """Raises FrameError for a structure that no model could be trained on, periodic images included."""
    numbers, positions = system.atomic_numbers, system.positions
    if len(numbers) == 0:
        raise FrameError(Reason.NO_ATOMS, "there are no atoms")
    bad = np.flatnonzero((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER))
    if len(bad):
        raise FrameError(Reason.INVALID, f"atom {bad[0]} has atomic number {numbers[bad[0]]}")
    if not np.isfinite(positions).all():
        atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise FrameError(Reason.NON_FINITE_POSITIONS, f"atom {atom} is at {positions[atom].tolist()}")
    try:
        check_system(system)
    except StructureError as error:
        singular = error.field == "cell" and np.isfinite(system.cell).all()
        reason = Reason.CELL if singular else Reason.INVALID
        raise FrameError(reason, f"{error.field}: {error.message}") from None
    try:
        check_graph(build_graph(system, _SEARCH_RADIUS))
    except StructureError as error:
        raise FrameError(Reason.OVERLAP, error.message) from None
