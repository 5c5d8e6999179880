"""Structures of a run as graphs and labels in memory, and their sizes. Knows no order of steps, no loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from equipot.model.batch import Graph, System, SystemBatch, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.errors import ModelError
from equipot.train.edges import edge_counts
from equipot.train.errors import DataError
from equipot.train.places import Keys, in_blocks
from equipot.train.store import Labels, Store

_BYTES_PER_EDGE = 40  # sender, receiver and three shifts, int64
_BYTES_PER_ATOM = 64  # number, position and labels


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Labels of a batch; NaN where absent."""

    energy: torch.Tensor
    """(S,) float64 eV"""
    forces: torch.Tensor
    """(N, 3) eV/Å"""
    stress: torch.Tensor
    """(S, 3, 3) eV/Å³"""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Structures ready to be computed, with their labels and where they come from."""

    systems: SystemBatch
    targets: Targets
    keys: NDArray[np.int64]
    """(S, 2) store and structure index"""


class Dataset:
    """Graphs and labels of stores, kept in memory within a budget once they were made.

    The first structures that fit are kept: an epoch visits all of them once, so none is more worth keeping.
    """

    def __init__(self, stores: Sequence[Store], config: ModelConfig, *, cache_mib: int = 0) -> None:
        self._stores = stores
        self._config = config
        self._levels = [config.levels_of_theory.index(store.manifest.level_of_theory) for store in stores]
        self._cache: dict[tuple[int, int], tuple[Graph, Labels]] = {}
        self._budget = cache_mib * 2**20

    def batch(
        self,
        keys: NDArray[np.int64],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Collate structures (n, 2) of store and structure index."""
        pairs = [self._item(int(store), int(index)) for store, index in keys]
        labels = [label for _, label in pairs]
        absent = np.full((3, 3), np.nan)
        stress = np.stack(
            [
                # a slab's or chain's stress has no volume to refer to, so the model gives none
                label.stress if label.stress is not None and graph.system.pbc.all() else absent
                for graph, label in pairs
            ]
        )
        targets = Targets(
            energy=torch.tensor([label.energy for label in labels], dtype=torch.float64, device=device),
            forces=torch.from_numpy(np.concatenate([label.forces for label in labels])).to(device, dtype),
            stress=torch.from_numpy(stress).to(device, dtype),
        )
        graphs = [graph for graph, _ in pairs]
        return Batch(collate(graphs, dtype=dtype, device=device), targets, keys)

    def describe(self, keys: NDArray[np.int64]) -> str:
        """How an error message calls structures."""
        names = []
        for store, index in keys[:10]:
            origin = self._stores[store].origin(int(index))
            names.append(f"{self._stores[store].path}[{index}] ({origin.file}, frame {origin.frame})")
        more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
        return ", ".join(names) + more

    def _item(self, store: int, index: int) -> tuple[Graph, Labels]:
        found = self._cache.get((store, index))
        if found is not None:
            return found
        system = self._known(self._stores[store].system(index), store)
        try:
            item = build_graph(system, self._config.cutoff), self._stores[store].labels(index)
        except ModelError as error:
            raise DataError(f"{self.describe(np.array([[store, index]]))}: {error}") from error
        size = item[0].n_edges * _BYTES_PER_EDGE + item[0].n_atoms * _BYTES_PER_ATOM
        if size <= self._budget:
            self._budget -= size
            self._cache[store, index] = item
        return item

    def _known(self, system: System, store: int) -> System:
        values = self._config.spin_multiplicities
        stated = system.spin_multiplicity
        spin = values[0] if stated == 0 and len(values) == 1 else stated
        return replace(system, level_of_theory=self._levels[store], spin_multiplicity=spin)


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """Atoms and edges of every structure, by store."""

    atoms: tuple[NDArray[np.int64], ...]
    edges: tuple[NDArray[np.int32], ...]

    @staticmethod
    def of(stores: Sequence[Store], cutoff: float, *, progress: bool) -> Sizes:
        """Count edges within the cutoff (Å), or read the counts kept beside the stores."""
        edges = tuple(edge_counts(store, cutoff, progress=progress) for store in stores)
        return Sizes(tuple(store.n_atoms for store in stores), edges)

    def costs(self, keys: Keys) -> NDArray[np.int64]:
        """(k,) relative cost of computing each structure: edges, and atoms for those that have none."""
        costs = np.empty(len(keys), dtype=np.int64)
        start = 0
        for block in in_blocks(keys):
            stop = start + len(block)
            costs[start:stop] = self._pick(self.edges, block) + self._pick(self.atoms, block)
            start = stop
        return costs

    def mean_neighbors(self, keys: Keys) -> float:
        """Mean number of neighbours of an atom of these structures; 1 if there is no edge at all."""
        edges = atoms = 0
        for block in in_blocks(keys):
            edges += int(self._pick(self.edges, block).sum())
            atoms += int(self._pick(self.atoms, block).sum())
        return edges / atoms if edges else 1.0

    @staticmethod
    def _pick(columns: Sequence[NDArray[np.integer]], keys: NDArray[np.int64]) -> NDArray[np.int64]:
        values = np.empty(len(keys), dtype=np.int64)
        for store, column in enumerate(columns):
            rows = keys[:, 0] == store
            values[rows] = column[keys[rows, 1]]
        return values
