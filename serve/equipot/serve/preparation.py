"""From structures to graphs for any engine: checks, limits and neighbour lists. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from equipot.model.batch import Graph, System, build_graphs
from equipot.model.errors import StructureError
from equipot.model.neighbors import check_searchable
from equipot.model.skin import SkinnedNeighbors, follow
from equipot.model.validate import MIN_DISTANCE, check_graph, check_system
from equipot.serve.config import RequestLimits
from equipot.serve.errors import Fault
from equipot.serve.footprint import Footprint, footprint

ESTIMATE_MARGIN = 2.0
"""A structure is refused unbuilt if its estimated edges are this many times the limit."""

LEAST_SKIN = 0.05
"""Å; a list with less serves for no step."""

MOST_PAIRS = 1e9
"""Pairs beyond which the search for neighbours alone would hold a core for seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """How the structures of one model are prepared; may be called from any thread.

    Attributes:
        cutoff: of its edges, in Å.
        limits: of one structure.
        supported: the structure as the model is to see it; raises StructureError for what it does not know.
    """

    cutoff: float
    limits: RequestLimits
    supported: Callable[[System], System]

    def __call__(
        self, systems: Sequence[System], neighbors: Sequence[SkinnedNeighbors] | None = None
    ) -> list[Graph | Fault]:
        """Checks structures, refuses those that are too large, and finds the edges of the others at once."""
        if neighbors is not None:
            followed = follow(systems, neighbors, self._check, self._reach)
            return [one if isinstance(one, Fault) else self._check_edges(*one) for one in followed]
        checked = [self._check(system) for system in systems]
        good = [system for system in checked if isinstance(system, System)]
        graphs = iter(build_graphs(good, self.cutoff))
        return [self._check_edges(next(graphs)) if isinstance(one, System) else one for one in checked]

    def _check(self, system: System) -> System | Fault:
        """The structure as the model is to see it."""
        try:
            if fault := self._too_many_atoms(system):
                return fault
            check_system(system)
            check_searchable(system.positions, system.cell, system.pbc, self.cutoff)
            supported = self.supported(system)
        except StructureError as error:
            return _fault(error)
        return self._too_dense(system) or supported

    def _reach(self, system: System, kept: SkinnedNeighbors) -> float:
        """Å, of a list that has no more edges than a structure may have: with its skin, or as much of it."""
        skin, limit = kept.skin, self.limits.structure_edges
        while self._is_too_dense(footprint(system, kept.cutoff + skin, enough=limit)):
            skin /= 2.0
            if skin < LEAST_SKIN:
                return kept.cutoff
        return kept.cutoff + skin

    def _check_edges(self, graph: Graph, shortest_squared: float = 0.0) -> Graph | Fault:
        if graph.n_edges > self.limits.structure_edges:
            return self._too_many_edges(graph.n_edges, "")
        if shortest_squared >= MIN_DISTANCE**2:
            return graph
        try:
            check_graph(graph)
        except StructureError as error:
            return _fault(error)
        return graph

    def _too_many_atoms(self, system: System) -> Fault | None:
        n_atoms, limit = len(system.atomic_numbers), self.limits.structure_atoms
        if n_atoms <= limit:
            return None
        return Fault(
            "too_large",
            "n_atoms",
            f"has {n_atoms} atoms, the limit is {limit}",
            "split it, or raise the server's --max-atoms",
        )

    def _too_dense(self, system: System) -> Fault | None:
        cost = footprint(system, self.cutoff, enough=self.limits.structure_edges)
        return self._too_many_edges(cost.edges, "about ") if self._is_too_dense(cost) else None

    def _is_too_dense(self, cost: Footprint) -> bool:
        return cost.edges > ESTIMATE_MARGIN * self.limits.structure_edges or cost.pairs > MOST_PAIRS

    def _too_many_edges(self, n_edges: float, about: str) -> Fault:
        return Fault(
            "too_large",
            "positions",
            f"has {about}{n_edges:.3g} pairs of atoms within {self.cutoff:g} Å,"
            f" the limit is {self.limits.structure_edges}",
            "check cell and units (Å), send a smaller structure, or raise the server's --max-edges",
        )


def _fault(error: StructureError) -> Fault:
    return Fault(error.reason, error.field, error.message, error.remedy)
