"""Structures, structures with edges, and batches of them. Numpy up to `collate`, torch from there on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor

from equipot.model.errors import StructureError
from equipot.model.neighbors import neighbor_lists


@dataclass(frozen=True, slots=True, eq=False)
class System:
    """One structure, isolated or periodic in any of the three directions.

    Array-likes are converted to the dtypes below without a copy where they match.
    """

    atomic_numbers: NDArray[np.int64]
    """(n_atoms,)"""
    positions: NDArray[np.float64]
    """(n_atoms, 3) Å"""
    cell: NDArray[np.float64]
    """(3, 3) Å, rows are lattice vectors; zeros where there is no periodicity."""
    pbc: NDArray[np.bool_]
    """(3,)"""
    charge: int = 0
    """Total charge in units of e."""
    spin_multiplicity: int = 0
    """2S + 1, or 0 when not stated."""
    level_of_theory: int = 0
    """Index into ``ModelConfig.levels_of_theory``."""

    def __post_init__(self) -> None:
        for name, dtype in _SYSTEM_DTYPES.items():
            object.__setattr__(self, name, _as_array(name, getattr(self, name), dtype))

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.atomic_numbers)


_SYSTEM_DTYPES: dict[str, DTypeLike] = {
    "atomic_numbers": np.int64,
    "positions": np.float64,
    "cell": np.float64,
    "pbc": np.bool_,
}


def _as_array(name: str, value: ArrayLike, dtype: DTypeLike) -> NDArray[np.generic]:
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise StructureError(
            field=name,
            message=f"cannot be read as an array of {np.dtype(dtype).name} ({error})",
            remedy="give a plain numeric array",
        ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A system with its directed edges, sorted by receiver."""

    system: System
    senders: NDArray[np.int64]
    """(n_edges,)"""
    receivers: NDArray[np.int64]
    """(n_edges,) ascending"""
    cell_shifts: NDArray[np.int64]
    """(n_edges, 3)"""

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return self.system.n_atoms

    @property
    def n_edges(self) -> int:
        """Number of directed edges."""
        return len(self.senders)

    def vectors(self) -> NDArray[np.float64]:
        """Edge vectors (n_edges, 3) in Å, from receiver to sender."""
        positions = self.system.positions
        shifts: NDArray[np.float64] = self.cell_shifts @ self.system.cell
        return positions[self.senders] + shifts - positions[self.receivers]


@dataclass(frozen=True, slots=True, eq=False)
class SystemBatch:
    """Several systems as one disconnected graph; S systems, N atoms, E edges."""

    atomic_numbers: Tensor
    """(N,) int64"""
    positions: Tensor
    """(N, 3) Å; below float64 each system is moved to its own centre, see `collate`."""
    cell: Tensor
    """(S, 3, 3) Å"""
    pbc: Tensor
    """(S, 3) bool"""
    system_idx: Tensor
    """(N,) int64, ascending"""
    level_idx: Tensor
    """(S,) int64"""
    charge: Tensor
    """(S,) int64"""
    spin_multiplicity: Tensor
    """(S,) int64"""
    senders: Tensor
    """(E,) int64"""
    receivers: Tensor
    """(E,) int64, ascending"""
    cell_shifts: Tensor
    """(E, 3), in the positions' dtype"""

    @property
    def n_systems(self) -> int:
        """Number of systems S."""
        return self.level_idx.shape[0]

    @property
    def n_atoms(self) -> int:
        """Number of atoms N in all systems."""
        return self.atomic_numbers.shape[0]

    @property
    def n_edges(self) -> int:
        """Number of directed edges E in all systems."""
        return self.senders.shape[0]

    def edge_vectors(self) -> Tensor:
        """Edge vectors (E, 3) in Å, from receiver to sender."""
        vectors = self.positions[self.senders] - self.positions[self.receivers]
        # An isolated system has no shifts, but a cell of zeros makes the product vanish all the same.
        cell_E33 = self.cell[self.system_idx[self.receivers]]
        return vectors + torch.einsum("ek,ekl->el", self.cell_shifts, cell_E33)

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "SystemBatch":
        """The batch on another device, or with another floating-point dtype."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return SystemBatch(*(move(getattr(self, name)) for name in self.__slots__))

    def alone(self) -> "Iterator[SystemBatch]":
        """Each system as a batch of its own, in new tensors, as if it had been collated alone."""
        counts = torch.bincount(self.system_idx, minlength=self.n_systems)
        edge_counts = torch.bincount(self.system_idx[self.receivers], minlength=self.n_systems)
        atom = edge = 0
        for s, (n_atoms, n_edges) in enumerate(zip(counts.tolist(), edge_counts.tolist(), strict=True)):
            atoms, edges = slice(atom, atom + n_atoms), slice(edge, edge + n_edges)
            yield SystemBatch(
                atomic_numbers=self.atomic_numbers[atoms].clone(),
                positions=self.positions[atoms].clone(),
                cell=self.cell[s : s + 1].clone(),
                pbc=self.pbc[s : s + 1].clone(),
                system_idx=torch.zeros_like(self.system_idx[atoms]),
                level_idx=self.level_idx[s : s + 1].clone(),
                charge=self.charge[s : s + 1].clone(),
                spin_multiplicity=self.spin_multiplicity[s : s + 1].clone(),
                senders=self.senders[edges] - atom,
                receivers=self.receivers[edges] - atom,
                cell_shifts=self.cell_shifts[edges].clone(),
            )
            atom, edge = atom + n_atoms, edge + n_edges


def build_graph(system: System, cutoff: float) -> Graph:
    """A system with all edges shorter than the cutoff (Å); see `neighbors.neighbor_list`."""
    return build_graphs([system], cutoff)[0]


def build_graphs(systems: Sequence[System], cutoff: float) -> list[Graph]:
    """Systems with all edges shorter than the cutoff (Å), in one call."""
    lists = neighbor_lists(((s.positions, s.cell, s.pbc) for s in systems), cutoff)
    return [Graph(system, *edges) for system, edges in zip(systems, lists, strict=True)]


def collate(
    graphs: Sequence[Graph], *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> SystemBatch:
    """Joins graphs into one batch, in their order.

    Args:
        graphs: at least one; a graph without edges is fine.
        dtype: of positions, cells and shifts. Below float64, positions are taken relative to each system's
            centre first: only differences matter, and float32 holds 1e-3 Å at 10,000 Å from the origin.
        device: where the tensors end up.

    Raises:
        ValueError: no graphs.
    """
    if not graphs:
        raise ValueError("collate: no graphs; give at least one")
    systems = [graph.system for graph in graphs]
    n_atoms = np.array([graph.n_atoms for graph in graphs])
    n_edges = np.array([graph.n_edges for graph in graphs])
    offsets = np.repeat(np.cumsum(n_atoms) - n_atoms, n_edges)
    centred = dtype != torch.float64

    def integers(values: Sequence[NDArray[np.int64]] | NDArray[np.int64]) -> Tensor:
        array = values if isinstance(values, np.ndarray) else np.concatenate(values)
        return torch.from_numpy(array).to(device=device)

    def floats(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    return SystemBatch(
        atomic_numbers=integers([s.atomic_numbers for s in systems]),
        positions=floats(
            np.concatenate([s.positions - s.positions.mean(0) if centred else s.positions for s in systems])
        ),
        cell=floats(np.stack([s.cell for s in systems])),
        pbc=torch.from_numpy(np.stack([s.pbc for s in systems])).to(device=device),
        system_idx=integers(np.repeat(np.arange(len(graphs)), n_atoms)),
        level_idx=integers(np.array([s.level_of_theory for s in systems], dtype=np.int64)),
        charge=integers(np.array([s.charge for s in systems], dtype=np.int64)),
        spin_multiplicity=integers(np.array([s.spin_multiplicity for s in systems], dtype=np.int64)),
        senders=integers(np.concatenate([g.senders for g in graphs]) + offsets),
        receivers=integers(np.concatenate([g.receivers for g in graphs]) + offsets),
        cell_shifts=floats(np.concatenate([g.cell_shifts for g in graphs])),
    )
