"""What one model's work takes: what its batches hold and what an edge costs. Knows no queue, no engine."""

from __future__ import annotations

from dataclasses import dataclass


class BatchLimit:
    """What one model's batches may hold; smaller after one of them ran out of memory.

    Attributes:
        edges: most edges in one batch.
        atoms: most atoms in one batch.
    """

    def __init__(self, *, edges: int, atoms: int) -> None:
        self.edges = edges
        self.atoms = atoms

    def ran_out_of_memory(self, *, edges: int, atoms: int) -> bool:
        """A batch of this size did not fit: from now on half of it is the most; says whether that is news."""
        before = self.edges, self.atoms
        if edges:
            self.edges = min(self.edges, max(1, edges // 2))
        self.atoms = min(self.atoms, max(1, atoms // 2))
        return before != (self.edges, self.atoms)


@dataclass(slots=True, eq=False)
class Terms:
    """What one model's work takes. Shared with who measures it: what waits goes by what is known by then.

    Attributes:
        limit: of its batches.
        price: work per edge, in a unit that all models share: turns are given by work, not by edges.
        settled: whether the price was measured. One that follows what batches take tells nothing of the pace.
    """

    limit: BatchLimit
    price: float = 1.0
    settled: bool = True


class Backlog:
    """Edges still to be computed, by the terms on which they will be; exact, whatever comes and goes."""

    __slots__ = ("_edges",)

    def __init__(self) -> None:
        self._edges: dict[Terms, int] = {}

    def change(self, terms: Terms, edges: int) -> None:
        """Notes edges that came, or that are done or given up if below zero."""
        if left := self._edges.get(terms, 0) + edges:
            self._edges[terms] = left
        else:
            self._edges.pop(terms, None)

    @property
    def edges(self) -> int:
        """Of all terms."""
        return sum(self._edges.values())

    @property
    def work(self) -> float:
        """At today's prices; may be read from any thread."""
        return sum(edges * terms.price for terms, edges in tuple(self._edges.items()))
