"""How quick the engine is alone, in this process: what a server is measured against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from equipot.model.batch import Graph, System
from equipot.serve.capacity import measure
from equipot.serve.config import CPU_BUDGET, DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, use_threads
from equipot.serve.errors import ServeError
from equipot.serve.terms import BatchLimit


class EngineSpeed:
    """An engine with a server's budget of batches.

    Attributes:
        engine: loaded.
        limit: of its batches.
    """

    def __init__(self, bundle: Path, *, threads: int | None, batch_edges: int | None) -> None:
        use_threads(threads)
        self.engine = LocalEngine.load(
            bundle, dtype=None, device="cpu", limits=DEFAULT_LIMITS, threads=threads
        )
        found = measure(self.engine, CPU_BUDGET, calibrate=batch_edges is None, device="cpu")
        self.limit = found.limit
        if batch_edges is not None:
            self.limit = BatchLimit(edges=batch_edges, atoms=CPU_BUDGET.batch_atoms)

    def graphs(self, systems: Sequence[System]) -> list[Graph]:
        """The structures with their edges.

        Raises:
            ServeError: the model takes one of them for none of its own.
        """
        graphs = []
        for graph in self.engine.prepare(systems):
            if not isinstance(graph, Graph):
                raise ServeError(f"the model refuses the structures of the load: {graph.message}")
            graphs.append(graph)
        return graphs

    def structures_per_second(self, systems: Sequence[System], *, seconds: float) -> float:
        """Prepares and computes these structures over and over, in full batches, for so long."""
        begun, done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begun) < seconds:
            graphs = self.graphs(systems)
            for batch in self._batches(graphs):
                self.engine.compute(batch, forces=True, stress=False)
            done += len(graphs)
        return done / elapsed

    def _batches(self, graphs: Sequence[Graph]) -> list[list[Graph]]:
        batches: list[list[Graph]] = [[]]
        edges = atoms = 0
        for graph in graphs:
            edges += graph.n_edges
            atoms += graph.n_atoms
            if batches[-1] and (edges > self.limit.edges or atoms > self.limit.atoms):
                batches.append([])
                edges, atoms = graph.n_edges, graph.n_atoms
            batches[-1].append(graph)
        return batches
