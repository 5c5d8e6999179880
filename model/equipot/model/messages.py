"""The messages between atoms: the hot spot of the model, in two orders of evaluation.

With h the atoms' features, i an edge's receiver and j its sender:

    z_ij = W_a h_i + W_b h_j + W_r rbf(d_ij) + b1
    m_ij = envelope(d_ij) · silu(W_2 silu(z_ij) + b2)

"plain" joins [h_i, h_j, rbf] on every edge and multiplies once by [W_a W_b W_r]: the form of the EGNN paper
(Satorras, Hoogeboom, Welling, "E(n) equivariant graph neural networks", 2021) and the reference for tests.
"split" multiplies on every atom, then gathers and adds: the same numbers for a fraction of the work, as a
structure has tens of edges per atom. A faster evaluation replaces the functions here and nothing else.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipot.model.geometry import Edges, sum_by_index


class PairLinear(nn.Module):
    """One affine map of (h_i, h_j, rbf_ij), kept as three weights.

    Slicing one joint weight instead would make a gradient buffer of the joint size for each slice.
    """

    def __init__(self, width: int, radial: int, *, form: Literal["split", "plain"]) -> None:
        super().__init__()
        self.receiver = nn.Linear(width, width)
        self.sender = nn.Linear(width, width, bias=False)
        self.radial = nn.Linear(radial, width, bias=False)
        self.form = form

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """Pre-activations (E, H) from the atoms' features (N, H)."""
        return self._plain(h, edges) if self.form == "plain" else self._split(h, edges)

    def _plain(self, h: Tensor, edges: Edges) -> Tensor:
        inputs = torch.cat([h[edges.receivers], h[edges.senders], edges.radial], dim=-1)
        weight = torch.cat([self.receiver.weight, self.sender.weight, self.radial.weight], dim=-1)
        return functional.linear(inputs, weight, self.receiver.bias)

    def _split(self, h: Tensor, edges: Edges) -> Tensor:
        at_receiver = self.receiver(h).index_select(0, edges.receivers)
        at_sender = self.sender(h).index_select(0, edges.senders)
        z: Tensor = self.radial(edges.radial) + at_receiver + at_sender
        return z


class MessageSum(nn.Module):
    """Σ_j m_ij for every atom i."""

    def __init__(self, width: int, radial: int, *, form: Literal["split", "plain"]) -> None:
        super().__init__()
        self.up = PairLinear(width, radial, form=form)
        self.down = nn.Linear(width, width)

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """Sums (N, H), in float32 or wider, from the atoms' features (N, H)."""
        hidden = functional.silu(self.up(h, edges))
        messages = functional.silu(self.down(hidden)) * edges.envelope
        return sum_by_index(messages, edges.receivers, edges.n_atoms)
