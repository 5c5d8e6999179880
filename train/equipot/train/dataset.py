"""Structures of a run as graphs and labels in memory, and their sizes. Knows no order of steps, no loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from equipot.model.batch import SystemBatch
from equipot.model.config import ModelConfig
from equipot.train.columns import Column
from equipot.train.edge_lists import EdgeError, EdgeMemory, Edges, edges_of
from equipot.train.edges import structure_sizes
from equipot.train.errors import DataError
from equipot.train.places import in_blocks
from equipot.train.store import Store
from equipot.train.structures import Structures

_NUMPY: dict[torch.dtype, DTypeLike] = {torch.float32: np.float32, torch.float64: np.float64}


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
    counts: bool = True
    """False: computed only to stay in step with other ranks."""

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(
            getattr(part, name).nbytes for part in (self.systems, self.targets) for name in part.__slots__
        )

    def without_labels(self) -> Batch:
        """The same structures, counting for nothing in a loss."""
        values = {name: torch.full_like(getattr(self.targets, name), np.nan) for name in Targets.__slots__}
        return replace(self, targets=Targets(**values), counts=False)


class Dataset:
    """Structures of stores as batches: read, joined and given their edges many at a time.

    Edge lists of larger and periodic structures are kept in memory, in a compact form and within a budget;
    what is not kept is computed again. A batch is the same to the last bit either way. Safe to be used from
    several threads.
    """

    def __init__(self, stores: Sequence[Store], config: ModelConfig, *, cache_mib: int = 0) -> None:
        self._stores = stores
        self._cutoff = config.cutoff
        self._levels = np.array(
            [config.levels_of_theory.index(store.manifest.level_of_theory) for store in stores]
        )
        values = config.spin_multiplicities
        self._unstated_spin = values[0] if len(values) == 1 else 0
        self._firsts = np.cumsum([0, *(len(store) for store in stores)])
        self._memory = EdgeMemory(cache_mib * 2**20)

    def batch(
        self,
        keys: NDArray[np.int64],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Collate structures (n, 2) of store and structure index.

        Below float64, positions are taken relative to each structure's centre, as `collate` does.

        Raises:
            DataError: a structure cannot be read or has no finite positions; it is named.
        """
        structures = self._read(keys)
        edges = self._edges(keys, structures)
        n, positions = structures.n_atoms, structures.positions
        system_idx = np.repeat(np.arange(len(n)), n)
        if dtype != torch.float64:
            centres = np.add.reduceat(positions, structures.first_atoms) / n[:, None]
            positions = positions - centres[system_idx]
        spin = structures.spin_multiplicity.astype(np.int64)
        spin[spin == 0] = self._unstated_spin
        # a slab's or chain's stress has no volume to refer to, so the model gives none
        stress = structures.stress  # a copy already
        stress[~structures.pbc.all(axis=1) | np.isnan(stress).any(axis=(1, 2))] = np.nan
        kind = _NUMPY[dtype]

        def put(array: NDArray[Any], kind: DTypeLike = np.int64) -> torch.Tensor:
            # converted by numpy: torch would start another pool of threads for the thread that calls
            return torch.from_numpy(array.astype(kind, copy=False)).to(device)

        systems = SystemBatch(
            atomic_numbers=put(structures.atomic_numbers),
            positions=put(positions, kind),
            cell=put(structures.cell, kind),
            pbc=put(structures.pbc, np.bool_),
            system_idx=put(system_idx),
            level_idx=put(self._levels[keys[:, 0]]),
            charge=put(structures.charge),
            spin_multiplicity=put(spin),
            senders=put(edges.senders),
            receivers=put(edges.receivers),
            cell_shifts=put(edges.cell_shifts, kind),
        )
        targets = Targets(
            energy=put(structures.energy, np.float64),
            forces=put(structures.forces, kind),
            stress=put(stress, kind),
        )
        return Batch(systems, targets, keys)

    def origin(self, store: int, index: int) -> tuple[str, str, int]:
        """A structure's store, and the file and frame that it was imported from."""
        origin = self._stores[store].origin(index)
        return str(self._stores[store].path), origin.file, origin.frame

    def describe(self, keys: NDArray[np.int64]) -> str:
        """How an error message calls structures."""
        names = []
        for store, index in keys[:10]:
            path, file, frame = self.origin(int(store), int(index))
            names.append(f"{path}[{index}] ({file}, frame {frame})")
        more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
        return ", ".join(names) + more

    def _read(self, keys: NDArray[np.int64]) -> Structures:
        store_of = keys[:, 0]
        order = np.argsort(store_of, kind="stable")
        present = np.flatnonzero(np.bincount(store_of)).tolist()
        found = Structures.joined([self._stores[k].read(keys[store_of == k, 1]) for k in present])
        return found if len(present) == 1 else found.take(np.argsort(order))

    def _edges(self, keys: NDArray[np.int64], structures: Structures) -> Edges:
        numbers = (self._firsts[keys[:, 0]] + keys[:, 1]).tolist()
        try:
            return edges_of(structures, self._cutoff, self._memory, numbers)
        except EdgeError as error:
            raise DataError(f"{self.describe(keys[error.row : error.row + 1])}: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """Atoms and edges of every structure, by store."""

    of_store: tuple[NDArray[np.int32], ...]
    """(n_structures, 2) each"""

    @staticmethod
    def of(stores: Sequence[Store], cutoff: float, *, progress: bool) -> Sizes:
        """Count edges within the cutoff (Å), or find the counts kept beside the stores."""
        return Sizes(tuple(structure_sizes(store, cutoff, progress=progress) for store in stores))

    def costs(self, keys: Column) -> NDArray[np.int64]:
        """(k,) relative cost of computing each structure: edges, and atoms for those that have none."""
        parts = [self.rows(part).sum(axis=1) for part in in_blocks(keys)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def cost_column(self, keys: Column) -> Column:
        """The same, found when they are asked for."""
        return _Costs(self, keys)

    def mean_neighbors(self, keys: Column) -> float:
        """Mean number of neighbours of an atom of these structures; 1 if there is no edge at all."""
        atoms, edges = sum((self.rows(part).sum(axis=0) for part in in_blocks(keys)), np.zeros(2, np.int64))
        return float(edges / atoms) if edges else 1.0

    def rows(self, keys: NDArray[np.integer]) -> NDArray[np.int64]:
        """(k, 2) atoms and edges of structures."""
        values = np.empty((len(keys), 2), dtype=np.int64)
        for store, sizes in enumerate(self.of_store):
            rows = np.flatnonzero(keys[:, 0] == store)
            if len(rows):
                values[rows] = sizes[keys[rows, 1]]
        return values


class _Costs:
    def __init__(self, sizes: Sizes, keys: Column) -> None:
        self._sizes = sizes
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.int64]:
        return self._sizes.costs(self._keys[rows])
