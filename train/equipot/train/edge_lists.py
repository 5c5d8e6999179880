"""Edges of many structures at once, in a compact form, and a bounded memory of them. Knows no torch.

A compact list takes 5 bytes an edge where int64 senders, receivers and shifts take 40: edges are sorted by
receiver, so a count per atom stands for all receivers, and senders and shifts are small numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from equipot.model.errors import ModelError
from equipot.model.neighbors import NeighborList, neighbor_list
from equipot.train.structures import Structures, flat_index

ALL_PAIRS = 24
"""Isolated structures of at most so many atoms are compared pair by pair, many structures in one go: a cell
list of each costs 27 µs before its first edge, 32 molecules of 9 atoms together 90 µs this way."""
_PAIRS_AT_ONCE = 2**16


class EdgeError(ValueError):
    """A structure whose edges cannot be found.

    Attributes:
        row: which of those that were given.
    """

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


class EdgeList(NamedTuple):
    """Directed edges of one structure, sorted by receiver, in the smallest types that hold them."""

    senders: NDArray[np.unsignedinteger]
    """(n_edges,)"""
    degrees: NDArray[np.unsignedinteger]
    """(n_atoms,) how many edges each atom receives"""
    cell_shifts: NDArray[np.signedinteger] | None
    """(n_edges, 3), None if the structure is not periodic"""

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        shifts = 0 if self.cell_shifts is None else self.cell_shifts.nbytes
        return self.senders.nbytes + self.degrees.nbytes + shifts


class Edges(NamedTuple):
    """Directed edges of many structures; atoms are numbered through all of them."""

    senders: NDArray[np.int64]
    """(E,)"""
    receivers: NDArray[np.int64]
    """(E,) ascending"""
    cell_shifts: NDArray[np.signedinteger]
    """(E, 3)"""


class EdgeMemory:
    """Edge lists by number, the first ones that fit into a budget: all are asked for equally often."""

    def __init__(self, budget: int) -> None:
        self._left = budget
        self._known: dict[int, EdgeList] = {}
        self._lock = threading.Lock()

    def get(self, number: int) -> EdgeList | None:
        """The list kept under that number."""
        return self._known.get(number)

    def keep(self, number: int, edges: EdgeList) -> None:
        """Keep a list if there is room."""
        with self._lock:
            size = edges.nbytes + _BYTES_PER_ENTRY
            if size <= self._left and number not in self._known:
                self._left -= size
                self._known[number] = edges


_BYTES_PER_ENTRY = 600  # of the tuple, three array headers and the entry in the dict


def edge_lists(
    structures: Structures,
    cutoff: float,
    memory: EdgeMemory | None = None,
    numbers: Sequence[int] = (),
) -> list[EdgeList]:
    """All edges shorter than the cutoff (Å), a list per structure.

    Args:
        structures: S of them.
        cutoff: in Å.
        memory: asked first and told what was found.
        numbers: (S,) what the memory calls each structure.

    Raises:
        EdgeError: positions or cell that are not finite numbers, or that the neighbour list cannot take.
    """
    _check_finite(structures)
    small = ~structures.pbc.any(axis=1) & (structures.n_atoms <= ALL_PAIRS)
    lists: list[EdgeList | None] = [None] * len(structures)
    rows = np.flatnonzero(small)
    for row, found in zip(rows.tolist(), _all_pairs(structures, rows, cutoff), strict=True):
        lists[row] = found
    first = structures.first_atoms
    for row in np.flatnonzero(~small).tolist():
        found_before = memory.get(numbers[row]) if memory is not None else None
        if found_before is not None:
            lists[row] = found_before
            continue
        n = int(structures.n_atoms[row])
        positions = structures.positions[first[row] : first[row] + n]
        pbc = structures.pbc[row]
        try:
            found_now = neighbor_list(positions, structures.cell[row], pbc, cutoff)
        except (RuntimeError, ModelError) as error:
            raise EdgeError(row, f"its edges cannot be found ({error})") from error
        edges = _compact(found_now, n, bool(pbc.any()))
        if memory is not None:
            memory.keep(numbers[row], edges)
        lists[row] = edges
    return [edges for edges in lists if edges is not None]


def join(lists: Sequence[EdgeList], n_atoms: NDArray[np.int64]) -> Edges:
    """The edges of structures that stand one behind the other."""
    n_edges = np.array([len(edges.senders) for edges in lists])
    first = np.cumsum(n_atoms) - n_atoms
    senders = np.repeat(first, n_edges)
    senders += np.concatenate([edges.senders for edges in lists])
    receivers = np.repeat(np.arange(int(n_atoms.sum())), np.concatenate([edges.degrees for edges in lists]))
    if all(edges.cell_shifts is None for edges in lists):
        return Edges(senders, receivers, np.zeros((len(senders), 3), dtype=np.int8))
    shifts = [
        np.zeros((len(edges.senders), 3), dtype=np.int8) if edges.cell_shifts is None else edges.cell_shifts
        for edges in lists
    ]
    return Edges(senders, receivers, np.concatenate(shifts))


def _check_finite(structures: Structures) -> None:
    atoms = np.isfinite(structures.positions).all(axis=1)
    cells = np.isfinite(structures.cell).all(axis=(1, 2))
    if atoms.all() and cells.all():
        return
    of_atoms = np.repeat(np.arange(len(structures)), structures.n_atoms)
    bad = np.bincount(of_atoms[~atoms], minlength=len(structures)).astype(np.bool_) | ~cells
    raise EdgeError(
        int(np.argmax(bad)),
        "a position or cell vector is not a finite number, the store is damaged; import the data again",
    )


def _compact(edges: NeighborList, n_atoms: int, periodic: bool) -> EdgeList:
    degrees = np.bincount(edges.receivers, minlength=n_atoms)
    shifts: NDArray[np.signedinteger] | None = None
    if periodic:
        reach = int(np.abs(edges.cell_shifts).max(initial=0))
        shifts = edges.cell_shifts.astype(np.int8 if reach < 2**7 else np.int32)
    return EdgeList(
        edges.senders.astype(np.uint16 if n_atoms <= 2**16 else np.uint32),
        degrees.astype(np.uint16 if degrees.max(initial=0) < 2**16 else np.uint32),
        shifts,
    )


def _all_pairs(structures: Structures, rows: NDArray[np.int64], cutoff: float) -> list[EdgeList]:
    lists: list[EdgeList] = []
    block = max(1, _PAIRS_AT_ONCE // ALL_PAIRS**2)
    first_atoms = structures.first_atoms
    for at in range(0, len(rows), block):
        part = rows[at : at + block]
        n = structures.n_atoms[part]
        positions = structures.positions
        if len(part) < len(structures):
            positions = positions[flat_index(first_atoms[part], n)]
        lists += _all_pairs_of_block(n, positions, cutoff)
    return lists


def _all_pairs_of_block(
    n: NDArray[np.int64], positions: NDArray[np.float64], cutoff: float
) -> list[EdgeList]:
    partners = np.repeat(n, n)  # (N,) atoms of each atom's own structure
    receivers = np.repeat(np.arange(len(positions)), partners)
    ends = np.cumsum(partners)
    local = np.arange(len(receivers)) - np.repeat(ends - partners, partners)
    first = np.repeat(np.cumsum(n) - n, n)
    senders = local + first[receivers]
    vectors = positions[senders] - positions[receivers]
    within = np.einsum("ij,ij->i", vectors, vectors) < cutoff * cutoff
    within &= senders != receivers
    kept = np.flatnonzero(within)
    degrees = np.bincount(receivers[kept], minlength=len(positions)).astype(np.uint16)
    small = local[kept].astype(np.uint16)
    atom_ends = np.cumsum(n)
    edge_ends = np.concatenate([[0], np.cumsum(degrees, dtype=np.int64)])[atom_ends].tolist()
    lists, atom, edge = [], 0, 0
    for atom_end, edge_end in zip(atom_ends.tolist(), edge_ends, strict=True):
        lists.append(EdgeList(small[edge:edge_end], degrees[atom:atom_end], None))
        atom, edge = atom_end, edge_end
    return lists
