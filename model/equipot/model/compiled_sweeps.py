"""The sweeps of `message_sweeps` in C++, with the same signatures, and those of `strengths_blocked`.

`kernels` builds and loads them.
"""

import torch
from torch import Tensor

from equipot.model.block_work import Gradients, Inputs, Wanted
from equipot.model.blocks import BlockedEdges
from equipot.model.message_sweeps import Direction


def forward(x: Inputs, edges: BlockedEdges, *, keep: bool = False) -> tuple[Tensor, Tensor | None]:
    """See `message_sweeps.forward`; what is kept lacks b_2, so only these sweeps can read it."""
    out, kept = torch.ops.equipot.forward(list(x), *_graph(edges), keep)
    return out, kept


def reverse(
    x: Inputs,
    edges: BlockedEdges,
    g_out: Tensor,
    wanted: Wanted,
    *,
    y_kept: Tensor | None = None,
    keep: bool = False,
) -> tuple[Gradients, Tensor | None]:
    """See `message_sweeps.reverse`."""
    *grads, kept = torch.ops.equipot.reverse(
        list(x), *_graph(edges), g_out, y_kept, [int(w) for w in wanted], keep
    )
    return Gradients(*grads), kept


def push(
    x: Inputs,
    edges: BlockedEdges,
    t: Direction,
    *,
    y_kept: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `message_sweeps.push`."""
    out, kept = torch.ops.equipot.push(list(x), *_graph(edges), list(t), y_kept, keep)
    return out, kept


def reverse_push(
    x: Inputs,
    edges: BlockedEdges,
    g_out: Tensor | None,
    g_push: Tensor,
    t: Direction,
    wanted: Wanted,
    *,
    y_kept: Tensor | None = None,
    t_y_kept: Tensor | None = None,
    g_hidden_kept: Tensor | None = None,
) -> Gradients:
    """See `message_sweeps.reverse_push`."""
    return Gradients(
        *torch.ops.equipot.reverse_push(
            list(x),
            *_graph(edges),
            g_out,
            g_push,
            list(t),
            y_kept,
            t_y_kept,
            g_hidden_kept,
            [int(w) for w in wanted],
        )
    )


def strengths(x: Inputs, edges: BlockedEdges) -> Tensor:
    """s (E, outputs), see `strengths_blocked`, from inputs with W (outputs, H) in the place of W_2."""
    out: Tensor = torch.ops.equipot.strengths(list(x), *_graph(edges))
    return out


def strengths_reverse(x: Inputs, edges: BlockedEdges, g_out: Tensor, wanted: Wanted) -> list[Tensor | None]:
    """Gradients of ⟨G, s⟩ by P, Q, ρ, W_r, where wanted, and W."""
    grads: list[Tensor | None] = torch.ops.equipot.strengths_reverse(
        list(x), *_graph(edges), g_out, [int(w) for w in wanted]
    )
    return grads


def _graph(edges: BlockedEdges) -> tuple[Tensor, Tensor]:
    # These sweeps cut edges as it suits them: they add to a receiver's sum whenever its edges come.
    return edges.senders, edges.receivers
