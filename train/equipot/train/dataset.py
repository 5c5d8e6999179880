"""Stores, splits and chemistry of a run as graphs and labels in memory. Knows no order of steps, no loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from equipot.model.batch import Graph, System, SystemBatch, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.errors import ModelError
from equipot.train.edges import edge_counts
from equipot.train.errors import DataError
from equipot.train.splits import Splits
from equipot.train.store import Labels, Store

_CHUNK = 65536
_BYTES_PER_EDGE = 40  # sender, receiver and three shifts, int64
_BYTES_PER_ATOM = 64  # number, position and labels


@dataclass(frozen=True, slots=True)
class Chemistry:
    """What occurs in some structures, each ascending."""

    elements: tuple[int, ...]
    charges: tuple[int, ...]
    spin_multiplicities: tuple[int, ...]


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


def open_stores(paths: Sequence[Path]) -> list[Store]:
    """Open the stores of a recipe.

    Raises:
        DataError: one is no store, or damaged, or holds nothing.
    """
    stores = [Store.open(path) for path in paths]
    for store in stores:
        if len(store) == 0:
            raise DataError(f"{store.path} holds no structures; import some with `equipot data import`")
    return stores


def levels_of_theory(stores: Sequence[Store]) -> tuple[str, ...]:
    """Names of the stores' levels of theory, each once, in the order of the stores."""
    return tuple(dict.fromkeys(store.manifest.level_of_theory for store in stores))


def chemistry(stores: Sequence[Store], keys: NDArray[np.int64]) -> Chemistry:
    """What occurs in these structures, (k, 2) of store and structure index."""
    elements: set[int] = set()
    charges: set[int] = set()
    spins: set[int] = set()
    for store, rows in _by_store(stores, keys):
        indices = keys[rows, 1]
        for chunk in np.array_split(indices, max(1, -(-len(indices) // _CHUNK))):
            present = store.element_counts(chunk).sum(axis=0)
            elements.update(int(number) for number in np.flatnonzero(present))
        charges.update(int(value) for value in np.unique(store.column("charge")[indices]))
        spins.update(int(value) for value in np.unique(store.column("spin_multiplicity")[indices]))
    return Chemistry(tuple(sorted(elements)), tuple(sorted(charges)), tuple(sorted(spins)))


def supported(stores: Sequence[Store], keys: NDArray[np.int64], known: Chemistry) -> NDArray[np.bool_]:
    """Which of these structures hold only what a model of that chemistry knows."""
    result = np.ones(len(keys), dtype=np.bool_)
    for store, rows in _by_store(stores, keys):
        for chunk in np.array_split(rows, max(1, -(-len(rows) // _CHUNK))):
            counts = store.element_counts(keys[chunk, 1])
            counts[:, list(known.elements)] = 0
            result[chunk] = ~counts.any(axis=1)
        indices = keys[rows, 1]
        spins = store.column("spin_multiplicity")[indices]
        unstated_is_fine = (spins == 0) & (len(known.spin_multiplicities) == 1)
        result[rows] &= np.isin(store.column("charge")[indices], known.charges)
        result[rows] &= np.isin(spins, known.spin_multiplicities) | unstated_is_fine
    return result


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

    def costs(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """(k,) relative cost of computing each structure: edges, and atoms for those that have none."""
        return self._pick(self.edges, keys) + self._pick(self.atoms, keys)

    def mean_neighbors(self, keys: NDArray[np.int64]) -> float:
        """Mean number of neighbours of an atom of these structures; 1 if there is no edge at all."""
        edges, atoms = self._pick(self.edges, keys).sum(), self._pick(self.atoms, keys).sum()
        return float(edges / atoms) if edges else 1.0

    @staticmethod
    def _pick(columns: Sequence[NDArray[np.integer]], keys: NDArray[np.int64]) -> NDArray[np.int64]:
        values = np.empty(len(keys), dtype=np.int64)
        for store, column in enumerate(columns):
            rows = keys[:, 0] == store
            values[rows] = column[keys[rows, 1]]
        return values


def splits_summary(splits: Splits) -> dict[str, int]:
    """Number of structures in each split."""
    return {name: len(splits.part(name)) for name in ("train", "validation", "test")}


def _by_store(stores: Sequence[Store], keys: NDArray[np.int64]) -> Iterator[tuple[Store, NDArray[np.int64]]]:
    for number, store in enumerate(stores):
        rows = np.flatnonzero(keys[:, 0] == number)
        if len(rows):
            yield store, rows
