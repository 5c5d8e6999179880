"""Bounds a structure's edges before its neighbour list is built. Knows nothing of models or requests.

A tiny or nearly flat periodic cell, or thousands of atoms in one spot, would ask for more pairs than the
machine has memory for. The atoms are counted in the boxes that a neighbour search would visit, which is exact
for the work of that search and a good estimate of what it finds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from equipot.model.batch import System

FURTHEST_BOX = 2**20
"""Boxes beyond this one along an axis count as this one, so that three indices fit in one integer."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a neighbour search of one structure costs.

    Attributes:
        pairs: pairs of atoms and images whose distance it looks at; no structure has more edges.
        edges: how many of them lie within the cutoff if atoms are spread evenly over the boxes.
    """

    pairs: float
    edges: float


def footprint(system: System, cutoff: float, *, enough: float) -> Footprint:
    """The footprint of a structure whose cell is not singular.

    Args:
        system: positions and cell in Å.
        cutoff: of the neighbour list, in Å.
        enough: if there cannot be more pairs than this, the bound is returned in place of the count.
    """
    n_atoms, pbc = len(system.positions), system.pbc
    lattice = _lattice(system)
    inverse = np.linalg.inv(lattice)
    heights = 1.0 / np.sqrt((inverse * inverse).sum(axis=0))
    boxes = np.where(pbc, np.maximum(np.floor(heights / cutoff), 1.0), 0.0)
    images = np.where(boxes == 1, 2.0 * np.ceil(cutoff / heights) + 1.0, 1.0)
    bound = float(n_atoms) ** 2 * float(np.prod(images)) * 2.0 ** int((boxes == 2).sum())
    if bound <= enough:
        return Footprint(bound, bound)
    pairs = float(np.prod(images)) * _pairs_of_boxes(system.positions @ inverse, boxes, cutoff)
    visited = np.where(boxes == 1, images, np.where(boxes > 1, 3.0 / np.maximum(boxes, 1.0), 3.0 * cutoff))
    volume = abs(float(np.linalg.det(lattice))) * float(np.prod(visited))
    return Footprint(pairs, pairs * min(1.0, 4.0 / 3.0 * np.pi * cutoff**3 / volume))


def _lattice(system: System) -> npt.NDArray[np.float64]:
    """Rows: the periodic lattice vectors, and unit vectors at right angles to them for the others."""
    periodic = system.pbc
    if periodic.all():
        return system.cell
    lattice = np.eye(3)
    if periodic.any():
        n_periodic = int(periodic.sum())
        lattice[periodic] = system.cell[periodic]
        lattice[~periodic] = np.linalg.svd(system.cell[periodic])[2][n_periodic:]
    return lattice


def _pairs_of_boxes(
    fractional: npt.NDArray[np.float64], boxes: npt.NDArray[np.float64], cutoff: float
) -> float:
    """Pairs of atoms in the same or in neighbouring boxes; `boxes` is 0 where there is no period."""
    places = np.zeros(fractional.shape, dtype=np.int64)
    for axis, n_boxes in enumerate(boxes):
        along = fractional[:, axis]
        if n_boxes > 1:
            places[:, axis] = np.floor(along % 1.0 * n_boxes) % n_boxes
        elif n_boxes == 0:
            places[:, axis] = np.minimum(np.floor((along - along.min()) / cutoff), FURTHEST_BOX)
    sizes = places.max(axis=0) + 2
    strides = np.array([sizes[1] * sizes[2], sizes[2], 1])
    occupied, first, counts = np.unique(places @ strides, return_index=True, return_counts=True)
    centres = places[first]
    pairs = 0.0
    for steps in itertools.product(*[(0,) if n_boxes == 1 else (-1, 0, 1) for n_boxes in boxes]):
        neighbours = centres + np.array(steps)
        neighbours = np.where(boxes > 1, neighbours % np.maximum(boxes, 1), neighbours).astype(np.int64)
        keys = neighbours @ strides
        found = np.minimum(np.searchsorted(occupied, keys), len(occupied) - 1)
        inside = (neighbours >= 0).all(axis=1) & (occupied[found] == keys)
        pairs += float((counts * counts[found])[inside].sum())
    return pairs
