"""The checks every frame passes before it is stored, whatever file it came from: the model's own.

They take longer than reading most frames, so a look that is a tenth of their cost comes first. It is sound
and not complete: what it calls fine passes all of them, and what it does not is left to them.
"""

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import System, build_graph
from equipot.model.errors import StructureError
from equipot.model.validate import MAX_DENSITY, MIN_DISTANCE, check_graph, check_system
from equipot.train.sources.base import FrameError, Reason

MAX_ATOMIC_NUMBER = 118
_SEARCH_RADIUS = 1.5  # Å; a cell list of 0.1 Å has so many cells that it takes fifty times longer
_NEAR = 1.1 * MIN_DISTANCE
_FEW = 512  # points whose distances are all computed at once
_EXTENT = 1e5  # Å; up to here the squared distances of `_squared` are good to 1e-5 Å²
_CUBE = 12.0  # Å²; the diagonal of the 2 Å cubes in which `check_system` counts atoms, squared
_CROWD = 80  # atoms in such a cube


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
    if _plainly_fine(system):
        return
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


def _plainly_fine(system: System) -> bool:
    """Whether the structure passes `check_system` and `check_graph` for certain."""
    positions, cell, pbc = system.positions, system.cell, system.pbc
    n = len(system.atomic_numbers)
    if n > _FEW or positions.shape != (n, 3) or cell.shape != (3, 3) or pbc.shape != (3,):
        return False
    if not np.abs(positions).max() <= _EXTENT:  # NaN is not less than anything
        return False
    periodic = int(pbc.sum())
    if periodic == 3:
        points = _with_images(positions, cell)
    elif periodic == 0 and np.abs(cell).max() <= _EXTENT:
        points = positions - positions[0]
    else:
        return False
    if points is None or len(points) > _FEW:
        return False
    squared = _squared(points)
    if squared.min() < _NEAR**2:
        return False
    return n <= _CROWD or int((squared < _CUBE).sum(axis=1).max()) < _CROWD


def _squared(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, n) squared distances, infinite between a point and itself."""
    products = points @ points.T
    sizes = products.diagonal().copy()
    squared = np.asarray(sizes[:, None] + sizes - 2.0 * products)
    np.fill_diagonal(squared, np.inf)
    return squared


def _with_images(positions: NDArray[np.float64], cell: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The atoms of a periodic cell, and images of those near its lower faces beyond the upper ones.

    Two atoms that are close to each other through the boundary are close in this list. None for cells that
    are not plainly fine: flat, thin, or too dense.
    """
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = cell.tolist()
    crosses = (
        (by * cz - bz * cy, bz * cx - bx * cz, bx * cy - by * cx),
        (cy * az - cz * ay, cz * ax - cx * az, cx * ay - cy * ax),
        (ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx),
    )
    volume = ax * crosses[0][0] + ay * crosses[0][1] + az * crosses[0][2]
    size = abs(volume)
    if not size * MAX_DENSITY > len(positions) or size > _EXTENT**3:
        return None
    # Columns of the inverse are the reciprocal vectors; their lengths are one over the plane spacings.
    inverse = np.array(crosses).T / volume
    spacings = [size / (x * x + y * y + z * z) ** 0.5 for x, y, z in crosses]
    lengths = [(x * x + y * y + z * z) ** 0.5 for x, y, z in cell.tolist()]
    if min(spacings) < 1.0 or max(lengths) > 100.0 * min(spacings):
        return None
    fractional = positions @ inverse
    fractional -= np.floor(fractional)
    points = fractional
    for axis in range(3):
        near = points[:, axis] < _NEAR / spacings[axis]
        if near.any():
            images = points[near]
            images[:, axis] += 1.0
            points = np.concatenate([points, images])
    return np.asarray((points - points[0]) @ cell)
