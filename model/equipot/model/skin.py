"""Neighbour lists of many systems that move little between calls. Knows nothing of torch.

A list is built for the cutoff and a skin around it, and serves, filtered by distance, until an atom has moved
half the skin since then (Verlet, "Computer experiments on classical fluids", 1967). It is exact at any time,
and its edges have one order whenever it was built, so that sums over them have the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import Graph, System
from equipot.model.errors import ModelError
from equipot.model.neighbors import NeighborList, neighbor_list


@dataclass(frozen=True, slots=True, eq=False)
class _Reference:
    """One system as it was when its list was built, and the list with the skin."""

    system: System
    wide: Graph

    def serves(self, system: System, skin: float) -> bool:
        old = self.system
        if system.n_atoms != old.n_atoms or not np.array_equal(system.pbc, old.pbc):
            return False
        # A cell that changes moves images by more than their atoms.
        if not np.array_equal(system.cell, old.cell):
            return False
        moved = ((system.positions - old.positions) ** 2).sum(-1).max(initial=0.0)
        return bool(4.0 * moved < skin * skin)


class SkinnedNeighbors:
    """Neighbour lists that a caller keeps between calls with the same systems in the same order.

    Whoever keeps it owns it: one per trajectory or relaxation, used by one thread at a time.
    """

    def __init__(self, cutoff: float, *, skin: float = 0.5) -> None:
        """Lists for a cutoff in Å.

        Args:
            cutoff: the model's.
            skin: in Å; more means rarer rebuilding and more pairs to filter. 0 rebuilds on every move.

        Raises:
            ModelError: a cutoff that is not positive, or a negative skin.
        """
        if not cutoff > 0 or not skin >= 0:
            raise ModelError(
                f"neighbours: cutoff is {cutoff} Å and skin {skin} Å; give cutoff > 0 and skin ≥ 0"
            )
        self.cutoff, self.skin = cutoff, skin
        self.n_built = 0
        """How many lists were built since the start."""
        self._references: list[_Reference] = []

    def graphs(self, systems: Sequence[System]) -> list[Graph]:
        """The systems with all their edges shorter than the cutoff, as `build_graph` finds them.

        A system that does not follow from the one in its place before (other atoms, another cell) is simply
        built anew.
        """
        references = [self._reference(place, system) for place, system in enumerate(systems)]
        self._references = references
        return [
            _within(reference.wide, system, self.cutoff)
            for reference, system in zip(references, systems, strict=True)
        ]

    def _reference(self, place: int, system: System) -> _Reference:
        if place < len(self._references) and self._references[place].serves(system, self.skin):
            return self._references[place]
        self.n_built += 1
        wide = _ordered(neighbor_list(system.positions, system.cell, system.pbc, self.cutoff + self.skin))
        # A copy: the caller may move atoms in place.
        then = System(system.atomic_numbers, system.positions.copy(), system.cell.copy(), system.pbc.copy())
        return _Reference(then, Graph(then, *wide))


def _ordered(edges: NeighborList) -> NeighborList:
    """By receiver, sender and image: the search's own order depends on where atoms were in space."""
    order = np.lexsort((*edges.cell_shifts.T, edges.senders, edges.receivers))
    return NeighborList(edges.senders[order], edges.receivers[order], edges.cell_shifts[order])


def _within(wide: Graph, system: System, cutoff: float) -> Graph:
    now = Graph(system, wide.senders, wide.receivers, wide.cell_shifts)
    vectors = now.vectors()
    near: NDArray[np.bool_] = np.einsum("ek,ek->e", vectors, vectors) < cutoff * cutoff
    return Graph(system, wide.senders[near], wide.receivers[near], wide.cell_shifts[near])
