"""Graphs to and from torch_geometric's `Data`, for users of its datasets and loaders. No hot path comes here.

In torch_geometric's convention ``edge_index`` is (2, n_edges) with the source, our sender, in row 0.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_geometric.data import Data

from equipot.model.batch import Graph, System
from equipot.model.errors import StructureError


def to_data(graph: Graph) -> Data:
    """A `Data` that torch_geometric can batch: per-structure values have a leading dimension of 1.

    Keys: ``z`` (n,), ``pos`` (n, 3) float64 Å, ``edge_index`` (2, e), ``cell_shifts`` (e, 3), ``cell``
    (1, 3, 3) Å, ``pbc`` (1, 3), ``charge``, ``spin_multiplicity``, ``level_of_theory`` (1,).
    """
    system = graph.system
    return Data(
        z=torch.tensor(system.atomic_numbers),
        pos=torch.tensor(system.positions),
        edge_index=torch.tensor(np.stack([graph.senders, graph.receivers])),
        cell_shifts=torch.tensor(graph.cell_shifts),
        cell=torch.tensor(system.cell).unsqueeze(0),
        pbc=torch.tensor(system.pbc).unsqueeze(0),
        charge=torch.tensor([system.charge]),
        spin_multiplicity=torch.tensor([system.spin_multiplicity]),
        level_of_theory=torch.tensor([system.level_of_theory]),
        num_nodes=system.n_atoms,
    )


def from_data(data: Data) -> System:
    """The structure in a `Data` of one graph; its edges are left behind: they depend on a model's cutoff.

    Atomic numbers are read from ``z`` or ``atomic_numbers``, positions from ``pos`` or ``positions``, in Å. A
    structure without ``cell`` is isolated; one with a cell and without ``pbc`` is periodic in all directions,
    as in the datasets of the field.

    Raises:
        StructureError: atomic numbers or positions are missing, or cell or pbc have the wrong shape.
    """
    cell = _optional(data, "cell")
    cell = np.zeros((3, 3)) if cell is None else cell
    if cell.size != 9:
        raise StructureError(
            field="cell",
            message=f"has shape {cell.shape}, expected (3, 3)",
            remedy="give one graph at a time",
        )
    pbc = _optional(data, "pbc")
    if pbc is not None and pbc.size not in (1, 3):
        raise StructureError(
            field="pbc", message=f"has shape {pbc.shape}, expected (3,)", remedy="give one graph at a time"
        )
    return System(
        atomic_numbers=np.asarray(_required(data, "z", "atomic_numbers"), dtype=np.int64),
        positions=_required(data, "pos", "positions"),
        cell=cell.reshape(3, 3),
        pbc=np.full(3, bool(cell.any())) if pbc is None else np.broadcast_to(pbc.reshape(-1), (3,)),
        charge=_integer(data, "charge"),
        spin_multiplicity=_integer(data, "spin_multiplicity"),
        level_of_theory=_integer(data, "level_of_theory"),
    )


def _optional(data: Data, key: str) -> NDArray[Any] | None:
    value = data.get(key)
    return None if value is None else np.asarray(value)


def _required(data: Data, *keys: str) -> NDArray[Any]:
    for key in keys:
        value = _optional(data, key)
        if value is not None:
            return value
    raise StructureError(
        field=keys[0], message=f"the Data object has neither {' nor '.join(keys)}", remedy="set one of them"
    )


def _integer(data: Data, key: str) -> int:
    value = _optional(data, key)
    return 0 if value is None else int(value.reshape(-1)[0])
