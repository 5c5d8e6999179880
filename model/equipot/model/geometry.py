"""From positions to what a network reads of an edge. Knows nothing of elements, features or parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equipot.model.blocks import BlockedEdges, block_edges
from equipot.model.radial import bessel_basis, envelope


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """Everything invariant about E edges among N atoms, in the network's dtype."""

    senders: Tensor
    """(E,) int64"""
    receivers: Tensor
    """(E,) int64, ascending"""
    radial: Tensor
    """(E, R) radial basis"""
    envelope: Tensor
    """(E, 1) smooth cutoff"""
    n_atoms: int
    blocked: BlockedEdges | None
    """the same senders and receivers in blocks, for the forms of the messages that work by blocks"""


def edge_lengths(vectors: Tensor) -> Tensor:
    """Lengths (E,) of edge vectors (E, 3), in their unit."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return lengths


def make_edges(
    distances: Tensor,
    senders: Tensor,
    receivers: Tensor,
    *,
    n_atoms: int,
    cutoff: float,
    radial: int,
    dtype: torch.dtype,
    blocked: bool,
) -> Edges:
    """Expands distances (E,) in Å; computed in their dtype, then rounded once to the network's."""
    return Edges(
        senders=senders,
        receivers=receivers,
        radial=bessel_basis(distances, cutoff, radial).to(dtype),
        envelope=envelope(distances, cutoff).to(dtype).unsqueeze(-1),
        n_atoms=n_atoms,
        blocked=block_edges(senders, receivers, n_atoms) if blocked else None,
    )


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums rows (n, …) that share an index (n,) into (size, …), in float32 or wider.

    index_add is the fastest of torch's segment sums on a CPU; bfloat16 would lose small terms of long sums.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.new_zeros((size, *wide.shape[1:])).index_add(0, index, wide)
