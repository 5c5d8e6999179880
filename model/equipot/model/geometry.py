"""From positions to what a network reads of an edge. Knows nothing of elements, features or parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equipot.model.blocks import BlockedEdges, block_edges
from equipot.model.radial import bessel_basis, bessel_slope, envelope, envelope_slope
from equipot.model.slots import Slots


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """What a network reads of E edges among N atoms, in its dtype."""

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
    directions: Tensor | None = None
    """(E, 3) unit vectors from receiver to sender, for backbones that read them"""
    angular: Tensor | None = None
    """(E, A) what a backbone has made of directions and envelope for all its layers"""
    slots: Slots | None = None
    """how edges lie if a backbone has put them in slots; it has put the atoms in their order then, too"""
    pulled_once: bool = False
    """whether gradients by what depends on positions are taken once, with create_graph, and never again"""

    @property
    def put_off(self) -> bool:
        """Whether work of second derivatives is to wait for that of first ones."""
        return self.pulled_once and self.blocked is not None


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
    directions: Tensor | None = None,
) -> Edges:
    """Expands distances (E,) in Å; all is computed in their dtype, then rounded once to the network's."""
    return Edges(
        senders=senders,
        receivers=receivers,
        radial=bessel_basis(distances, cutoff, radial).to(dtype),
        envelope=envelope(distances, cutoff).to(dtype).unsqueeze(-1),
        n_atoms=n_atoms,
        blocked=block_edges(senders, receivers, n_atoms) if blocked else None,
        directions=None if directions is None else directions.to(dtype),
    )


def pull_of_lengths(lengths: Tensor, cutoff: float, by_radial: Tensor, by_envelope: Tensor) -> Tensor:
    """∂E/∂d (E,) in the lengths' dtype, from gradients by the radial basis (E, R) and the envelope (E, 1).

    It is linear in the gradients, so a derivative of it reaches them and stops there: autograd would go on
    through second derivatives of the basis, to gradients by positions that nobody asked for.
    """
    by_radial, by_envelope = by_radial.to(lengths.dtype), by_envelope.to(lengths.dtype)
    slopes = bessel_slope(lengths, cutoff, by_radial.shape[-1])
    return (by_radial * slopes).sum(-1) + by_envelope.squeeze(-1) * envelope_slope(lengths, cutoff)


def pull_of_directions(directions: Tensor, lengths: Tensor, by_directions: Tensor) -> Tensor:
    """∂E/∂r (E, 3) by way of the unit vectors r/d (E, 3): what of their gradient is at right angles, over d.

    As in `pull_of_lengths`, a derivative of it reaches the gradient and stops there.
    """
    across = by_directions.to(directions.dtype)
    across = across - directions * (directions * across).sum(-1, keepdim=True)
    return across / lengths.unsqueeze(-1)


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums rows (n, …) that share an index (n,) into (size, …), in float32 or wider.

    index_add is the fastest of torch's segment sums on a CPU; bfloat16 would lose small terms of long sums.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.new_zeros((size, *wide.shape[1:])).index_add(0, index, wide)
