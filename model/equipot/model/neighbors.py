"""Who is whose neighbour, periodic images included. Knows nothing of torch; one signature, two algorithms."""

import itertools
import threading
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import vesin
from numpy.typing import NDArray

from equipot.model.errors import StructureError


class NeighborList(NamedTuple):
    """Directed edges, each pair in both directions, sorted by receiver.

    The vector of an edge is ``positions[senders] + cell_shifts @ cell - positions[receivers]``.
    """

    senders: NDArray[np.int64]
    """(n_edges,) atom the message comes from."""
    receivers: NDArray[np.int64]
    """(n_edges,) atom the message goes to, ascending."""
    cell_shifts: NDArray[np.int64]
    """(n_edges, 3) lattice vectors added to the sender's position."""


MOST_CELLS = 1e5
"""Cells that vesin divides space into; of a longer and thinner space it would make none: SIGFPE."""

_calculators = threading.local()


def _calculator(cutoff: float, *, full: bool) -> vesin.NeighborList:
    # One per thread: a calculator owns its buffers, and ctypes lets go of the interpreter lock in a call.
    cache: dict[tuple[float, bool], vesin.NeighborList] = _calculators.__dict__.setdefault("known", {})
    if (cutoff, full) not in cache:
        cache[cutoff, full] = vesin.NeighborList(cutoff=cutoff, full_list=full, sorted=full, n_threads=1)
    return cache[cutoff, full]


def neighbor_list(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> NeighborList:
    """All edges shorter than the cutoff, by vesin (cell lists; linear in the number of atoms).

    Args:
        positions: (n, 3) in Å, inside the cell or not.
        cell: (3, 3) in Å, rows are lattice vectors; rows of non-periodic directions are not read.
        pbc: (3,) periodic directions.
        cutoff: in Å; may exceed the cell, an atom then has several images of one neighbour.
    """
    check_searchable(positions, cell, pbc, cutoff)
    calculator = _calculator(float(cutoff), full=True)
    receivers, senders, shifts = calculator.compute(positions, cell, pbc, "ijS", copy=False)
    # copy=False gives views of the calculator's buffers: astype and the copies below own their memory.
    return NeighborList(senders.astype(np.int64), receivers.astype(np.int64), shifts.astype(np.int64))


def neighbor_lists(
    structures: Iterable[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]], cutoff: float
) -> list[NeighborList]:
    """`neighbor_list` of many structures (positions, cell, pbc), with one calculator and its buffers.

    Safe in any thread; the search itself holds no interpreter lock.
    """
    return [neighbor_list(positions, cell, pbc, cutoff) for positions, cell, pbc in structures]


def half_neighbor_list(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int32]]:
    """The edges of `neighbor_list` in one direction each, in no order, which takes two thirds of the time.

    Returns:
        receivers (n_edges / 2,), senders (n_edges / 2,), cell_shifts (n_edges / 2, 3): views of buffers that
        this thread's next call writes over.
    """
    check_searchable(positions, cell, pbc, cutoff)
    calculator = _calculator(float(cutoff), full=False)
    receivers, senders, shifts = calculator.compute(positions, cell, pbc, "ijS", copy=False)
    return receivers, senders, shifts


def check_searchable(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> None:
    """Refuses a few atoms in a space so long and thin that dividing it into cells would end the process.

    Raises:
        StructureError: its space is one.
    """
    if not len(positions):
        return
    lengths = np.where(pbc, np.sqrt((cell * cell).sum(axis=1)), np.ptp(positions, axis=0))
    total = float((np.maximum(lengths / cutoff, 1.0) + 1.0).prod())
    if total <= MOST_CELLS:
        return
    # Too many cells are made larger, all directions alike: each must have some left.
    fewest = max(float(_least_widths(lengths, cell, pbc).min()) / cutoff, 1.0) + 1.0
    if fewest * (MOST_CELLS / total) ** (1.0 / 3.0) >= 3.0:
        return
    raise StructureError(
        field="cell" if pbc.any() else "positions",
        message=f"its space of {' × '.join(f'{length:.3g}' for length in lengths)} Å is too long and thin"
        f" to be searched for neighbours within {cutoff:g} Å",
        remedy="leave out atoms that are far away, or shorten the vacuum",
    )


def _least_widths(
    lengths: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """(3,) Å that a space has at least across each direction: of a skewed cell far less than its vectors."""
    widths = lengths.copy()
    periodic = cell[pbc]
    # An open direction is measured at right angles to the periodic ones, which need not be its axis.
    widths[~pbc & (periodic != 0.0).any(axis=0)] = 0.0
    if len(periodic):
        # Columns of the pseudo-inverse are the reciprocal vectors: one over the distances between faces.
        widths[pbc] = 1.0 / np.linalg.norm(np.linalg.pinv(periodic), axis=0)
    return widths


def brute_force_neighbor_list(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> NeighborList:
    """The same edges by trying every pair in every image within reach: the reference for tests."""
    reach = _image_range(positions, cell, pbc, cutoff)
    others = np.array(list(itertools.product(*(range(-r, r + 1) for r in reach[1:]))), dtype=np.int64)
    found: list[NDArray[np.int64]] = []
    for first in range(-reach[0], reach[0] + 1):
        images = np.column_stack([np.full(len(others), first), others])
        vectors = positions[None, None] + (images @ cell)[:, None, None] - positions[None, :, None]
        within = np.linalg.norm(vectors, axis=-1) < cutoff
        within[~images.any(axis=-1)] &= ~np.eye(len(positions), dtype=bool)
        image, receivers, senders = np.nonzero(within)
        found.append(np.column_stack([receivers, senders, images[image]]))
    edges = np.concatenate(found).astype(np.int64)
    edges = edges[np.lexsort(edges.T[::-1])]
    return NeighborList(edges[:, 1], edges[:, 0], edges[:, 2:])


def _image_range(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float
) -> list[int]:
    periodic = np.flatnonzero(pbc)
    reach = [0, 0, 0]
    if len(positions) and len(periodic):
        # Rows of the pseudo-inverse are the reciprocal vectors of the periodic directions alone.
        reciprocal = np.linalg.pinv(cell[periodic])
        fractional = positions @ reciprocal
        per_cutoff = cutoff * np.linalg.norm(reciprocal, axis=0)
        for axis, steps in zip(periodic, per_cutoff + np.ptp(fractional, axis=0), strict=True):
            reach[axis] = int(np.ceil(steps))
    return reach
