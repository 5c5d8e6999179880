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
from equipot.model.neighbors import half_neighbor_list
from equipot.train.structures import Structures, flat_index

ALL_PAIRS = 24
"""Isolated structures of at most so many atoms are compared pair by pair, many structures in one go: a cell
list of each costs 27 µs before its first edge, 32 molecules of 9 atoms together 90 µs this way."""
_STRUCTURES_AT_ONCE = 2**16 // ALL_PAIRS**2  # of them, so that the pairs stay in a core's cache


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
    small = _small(structures)
    lists: list[EdgeList | None] = [None] * len(structures)
    rows = np.flatnonzero(small)
    for row, found in zip(rows.tolist(), _small_lists(structures, rows, cutoff), strict=True):
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
            half = half_neighbor_list(positions, structures.cell[row], pbc, cutoff)
        except (RuntimeError, ModelError) as error:
            raise EdgeError(row, f"its edges cannot be found ({error})") from error
        edges = _both_directions(*half, n, periodic=bool(pbc.any()))
        if memory is not None:
            memory.keep(numbers[row], edges)
        lists[row] = edges
    return [edges for edges in lists if edges is not None]


def join(lists: Sequence[EdgeList], n_atoms: NDArray[np.int64]) -> Edges:
    """The edges of structures that stand one behind the other."""
    n_edges = np.array([len(edges.senders) for edges in lists])
    senders = np.repeat(np.cumsum(n_atoms) - n_atoms, n_edges)
    senders += np.concatenate([edges.senders for edges in lists])
    receivers = np.repeat(np.arange(int(n_atoms.sum())), np.concatenate([edges.degrees for edges in lists]))
    shifts = [
        np.zeros((len(edges.senders), 3), dtype=np.int8) if edges.cell_shifts is None else edges.cell_shifts
        for edges in lists
    ]
    return Edges(senders, receivers, np.concatenate(shifts))


def edges_of(
    structures: Structures, cutoff: float, memory: EdgeMemory | None = None, numbers: Sequence[int] = ()
) -> Edges:
    """`edge_lists` joined; quicker where all structures are small and isolated."""
    if len(structures) > _STRUCTURES_AT_ONCE or not _small(structures).all():
        return join(edge_lists(structures, cutoff, memory, numbers), structures.n_atoms)
    _check_finite(structures)
    pairs = _all_pairs(structures.n_atoms, structures.positions, cutoff)
    return Edges(pairs.senders, pairs.receivers, np.zeros((len(pairs.senders), 3), dtype=np.int8))


def _small(structures: Structures) -> NDArray[np.bool_]:
    small: NDArray[np.bool_] = (structures.n_atoms <= ALL_PAIRS) & ~structures.pbc.any(axis=1)
    return small


def _check_finite(structures: Structures) -> None:
    # a sum is finite unless something in it is not, or it overflows, and then what follows looks closer
    if np.isfinite(structures.positions.sum() + structures.cell.sum()):
        return
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


def _both_directions(
    receivers: NDArray[np.uint64],
    senders: NDArray[np.uint64],
    cell_shifts: NDArray[np.int32],
    n_atoms: int,
    *,
    periodic: bool,
) -> EdgeList:
    """Edges given in one direction each in both, sorted by receiver."""
    kind = np.uint16 if n_atoms <= 2**16 else np.uint32
    ends = np.empty((2, 2 * len(receivers)), dtype=kind)
    ends[0, : len(receivers)] = ends[1, len(receivers) :] = receivers
    ends[1, : len(receivers)] = ends[0, len(receivers) :] = senders
    order = np.argsort(ends[0], kind="stable")  # by radix for 16 bits
    degrees = np.bincount(ends[0], minlength=n_atoms)
    shifts: NDArray[np.signedinteger] | None = None
    if periodic:
        reach = max(int(cell_shifts.max(initial=0)), -int(cell_shifts.min(initial=0)))
        small = cell_shifts.astype(np.int8 if reach < 2**7 else np.int32)
        shifts = np.concatenate([small, np.negative(small)])[order]
    widest = np.uint16 if degrees.max(initial=0) < 2**16 else np.uint32
    return EdgeList(ends[1][order], degrees.astype(widest), shifts)


def _small_lists(structures: Structures, rows: NDArray[np.int64], cutoff: float) -> list[EdgeList]:
    lists: list[EdgeList] = []
    first_atoms = structures.first_atoms
    for at in range(0, len(rows), _STRUCTURES_AT_ONCE):
        part = rows[at : at + _STRUCTURES_AT_ONCE]
        n = structures.n_atoms[part]
        atoms = flat_index(first_atoms[part], n)
        pairs = _all_pairs(n, structures.positions[atoms], cutoff)
        degrees = np.bincount(pairs.receivers, minlength=len(atoms)).astype(np.uint16)
        first = np.cumsum(n) - n
        local = (pairs.senders - np.repeat(np.repeat(first, n), degrees)).astype(np.uint16)
        atom_ends = np.cumsum(n)
        edge_ends = np.cumsum(degrees, dtype=np.int64)[atom_ends - 1]
        atom = edge = 0
        for atom_end, edge_end in zip(atom_ends.tolist(), edge_ends.tolist(), strict=True):
            lists.append(EdgeList(local[edge:edge_end], degrees[atom:atom_end], None))
            atom, edge = atom_end, edge_end
    return lists


class _Pairs(NamedTuple):
    senders: NDArray[np.int64]
    receivers: NDArray[np.int64]


def _all_pairs(n: NDArray[np.int64], positions: NDArray[np.float64], cutoff: float) -> _Pairs:
    """All edges of structures of n atoms that stand one behind the other, by comparing every pair of each."""
    partners = np.repeat(n, n)  # (N,) atoms of each atom's own structure
    first = np.repeat(np.cumsum(n) - n, n)
    senders = flat_index(first, partners)
    receivers = np.repeat(np.arange(len(positions)), partners)
    vectors = positions[senders]
    vectors -= np.repeat(positions, partners, axis=0)
    within = np.einsum("ij,ij->i", vectors, vectors) < cutoff * cutoff
    within &= senders != receivers
    return _Pairs(senders[within], receivers[within])
