"""The messages between atoms: the hot spot of the model, in five orders of evaluation.

With h the atoms' features, i an edge's receiver and j its sender:

    z_ij = W_a h_i + W_b h_j + W_r rbf(d_ij) + b1
    m_ij = envelope(d_ij) · silu(W_2 silu(z_ij) + b2)

"plain" joins [h_i, h_j, rbf] on every edge and multiplies once by [W_a W_b W_r]: the form of the EGNN paper
(Satorras, Hoogeboom, Welling, "E(n) equivariant graph neural networks", 2021) and the reference for tests.
"split" multiplies on every atom, then gathers and adds: the same numbers for a fraction of the work, as a
structure has tens of edges per atom. "lean" does so block by block of edges and forgets what it computed, to
compute it again for derivatives: memory no longer grows with edges × width. For first derivatives it
computes the products on atoms again, too. "fast" is lean, but keeps the one
to three tensors (E, H) whose recomputation costs a matrix product (one for first derivatives, three for
second ones), and where there is so little to do that going by blocks takes longer, it takes the split form.
"balanced" keeps one in any case. All have the same parameters.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipot.model.block_work import Inputs, without_autocast
from equipot.model.config import MessageForm
from equipot.model.geometry import Edges, sum_by_index
from equipot.model.kernels import compiled_for
from equipot.model.messages_blocked import sum_messages
from equipot.model.node_linear import NodeLinear
from equipot.model.recalled import Recipe, computed_again, recipe_of, stays
from equipot.model.strengths_blocked import strengths_of_edges

BLOCKED_FORMS = ("fast", "balanced", "lean")
EDGE_TENSORS: dict[MessageForm, Literal[0, 1, 3]] = {"lean": 0, "balanced": 1, "fast": 3}


@dataclass(slots=True)
class Least:
    """Numbers (edges × width) from which the fast form goes by blocks. Measured: below, split is as quick."""

    compiled: int = 2**15
    torch: int = 2**19


LEAST = Least()


class PairLinear(nn.Module):
    """One affine map of (h_i, h_j, rbf_ij), kept as three weights.

    Slicing one joint weight instead would make a gradient buffer of the joint size for each slice.
    """

    def __init__(self, width: int, radial: int, *, form: MessageForm) -> None:
        super().__init__()
        self.receiver = NodeLinear(width, width)
        self.sender = NodeLinear(width, width, bias=False)
        self.radial = nn.Linear(radial, width, bias=False)
        self.form = form

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """Pre-activations (E, H) from the atoms' features (N, H)."""
        return self._plain(h, edges) if self.form == "plain" else self._split(h, edges)

    def by_blocks(self, h: Tensor, edges: Edges) -> bool:
        """Whether what comes after these pre-activations is to be computed block by block, without them."""
        if self.form not in BLOCKED_FORMS or edges.blocked is None:
            return False
        if self.form != "fast":
            return True
        numbers = edges.radial.shape[0] * h.shape[1]
        # The first question for compiled code builds it: not for what is too little for it anyway.
        return numbers >= LEAST.compiled and (numbers >= LEAST.torch or compiled_for(h))

    def again(
        self, h: Tensor, edges: Edges, at_receiver: Tensor, at_sender: Tensor
    ) -> AbstractContextManager[None]:
        """Where the two products on atoms are used: lean forgets them, but for second derivatives."""
        if self.form != "lean" or edges.put_off or not (stays(self.receiver) and stays(self.sender)):
            return nullcontext()
        return computed_again(
            (at_receiver, _product_again(self.receiver, h, at_receiver.dtype)),
            (at_sender, _product_again(self.sender, h, at_sender.dtype)),
        )

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

    def __init__(self, width: int, radial: int, *, form: MessageForm) -> None:
        super().__init__()
        self.up = PairLinear(width, radial, form=form)
        self.down = nn.Linear(width, width)

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """Sums (N, H), in float32 or wider, from the atoms' features (N, H)."""
        if self.up.by_blocks(h, edges):
            assert edges.blocked is not None
            put_off = edges.put_off
            at_receiver, at_sender = self.up.receiver(h, put_off), self.up.sender(h, put_off)
            others = edges.radial, edges.envelope, self.up.radial.weight, self.down.weight, self.down.bias
            # Under autocast the linears above decide the dtype, and everything else has to follow.
            inputs = Inputs(at_receiver, at_sender, *(t.to(at_receiver.dtype) for t in others))
            keep = EDGE_TENSORS[self.up.form]
            with self.up.again(h, edges, at_receiver, at_sender):
                return sum_messages(inputs, edges.blocked, keep=keep, pulled_once=edges.pulled_once)
        hidden = functional.silu(self.up(h, edges))
        messages = functional.silu(self.down(hidden)) * edges.envelope
        return sum_by_index(messages, edges.receivers, edges.n_atoms)


def edge_strengths(up: PairLinear, down: nn.Linear, h: Tensor, edges: Edges) -> Tensor:
    """Numbers (E, outputs) φ_ij = W (envelope · silu(z_ij)), for direct forces, from features (N, H)."""
    if up.by_blocks(h, edges):
        assert edges.blocked is not None
        at_receiver, at_sender = up.receiver(h), up.sender(h)
        others = edges.radial, up.radial.weight, down.weight
        radial, w_radial, w_out = (tensor.to(at_receiver.dtype) for tensor in others)
        blocked = edges.blocked
        with up.again(h, edges, at_receiver, at_sender):
            strengths = strengths_of_edges(at_receiver, at_sender, radial, w_radial, w_out, blocked)
        return strengths * edges.envelope
    out: Tensor = down(functional.silu(up(h, edges)) * edges.envelope)
    return out


def _product_again(linear: nn.Linear, h: Tensor, dtype: torch.dtype) -> Recipe:
    rows, weight, bias = recipe_of(h), linear.weight, linear.bias

    def multiply() -> Tensor:
        # The dtype is that of the first time, whether autocast chose it or not.
        with without_autocast(weight):
            return functional.linear(
                rows().to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            )

    return multiply
