"""The message function and its derivatives, block by block of edges. Knows nothing of autograd or modules.

With P = W_a h + b1 and Q = W_b h on atoms, i an edge's receiver, j its sender, ρ its radial basis, e its
envelope:

    z = P_i + Q_j + W_r ρ      a = silu(z)      y = W_2 a + b_2      m = e · silu(y)      S_i = Σ_j m

Four sweeps, each over all blocks: `forward` (S), `reverse` (gradients of ⟨G, S⟩), `push` (the derivative of
S along a direction t of its inputs), and `reverse_push` (gradients of ⟨G', S⟩ + ⟨G, push⟩, at once).
Conservative forces need the last two: the gradient of a gradient's ⟨t, ∇⟨G, S⟩⟩ is that of ⟨G, push⟩. A sweep
holds a few blocks of (edges, width) numbers and nothing of all edges × width, unless asked to keep some.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from equipot.model.block_work import (
    Gradients,
    Inputs,
    Room,
    Sums,
    Wanted,
    add_rows,
    first_of,
    multiply,
    per_edge,
    rows_of,
    silu_and_slope,
    slope_and_curve,
    wide_dtype,
    wide_rows,
    wide_zeros,
    widened,
)
from equipot.model.blocks import Block, BlockedEdges


class Direction(NamedTuple):
    """A direction in the space of (P, Q, ρ, e), shaped like them; None is zero."""

    at_receiver: Tensor | None
    at_sender: Tensor | None
    radial: Tensor | None
    envelope: Tensor | None


def forward(x: Inputs, edges: BlockedEdges, *, keep: bool = False) -> tuple[Tensor, Tensor | None]:
    """S (N, H) in float32 or wider, and y (E, H) when it is to be kept."""
    out = wide_zeros(x.at_receiver)
    kept = per_edge(x) if keep else None
    x = widened(x)
    room = Room(x, edges)
    for block in edges.blocks:
        hidden, message, y = room.cut(block, 3)
        functional.silu(first_of(x, edges, block, hidden), inplace=True)
        y = multiply(hidden, x.w_down.t(), y, bias=x.b_down, kept=_rows(kept, block))
        torch.sigmoid(y, out=message).mul_(y).mul_(rows_of(x.envelope, block))
        add_rows(out, rows_of(edges.receivers, block), message)
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
    """Gradients of ⟨G, S⟩, and the gradient by a (E, H) when it is to be kept.

    Args:
        x: the function's inputs.
        edges: its edges.
        g_out: G (N, H).
        wanted: the gradients to compute.
        y_kept: y (E, H), if `forward` kept it.
        keep: whether to keep the gradient by a, which `reverse_push` would compute again.
    """
    grads = Sums(x, wanted)
    kept = per_edge(x) if keep else None
    narrow, x = x, widened(x)
    g_out = g_out.to(x.at_receiver.dtype)
    room = Room(x, edges)
    for block in edges.blocks:
        hidden, slope_z, y, slope_y, g = room.cut(block, 5)
        silu_and_slope(first_of(x, edges, block, hidden), hidden, slope_z)
        value = y
        if y_kept is None:
            y = multiply(hidden, x.w_down.t(), y, bias=x.b_down)
        else:
            y = wide_rows(y_kept, block, y)
        silu_and_slope(y, value, slope_y)
        torch.index_select(g_out, 0, rows_of(edges.receivers, block), out=g)
        g_y = slope_y.mul_(g).mul_(rows_of(x.envelope, block))
        grads.add_envelope(block, value.mul_(g))
        g_y_narrow = g_y.to(x.w_down.dtype)
        grads.add_down(g_y_narrow, hidden, bias_rows=g_y)
        g_hidden = multiply(g_y_narrow, x.w_down, g, kept=_rows(kept, block))
        grads.add_first(x, edges, block, torch.mul(g_hidden, slope_z, out=value))
    return grads.result(narrow), kept


def push(
    x: Inputs,
    edges: BlockedEdges,
    t: Direction,
    *,
    y_kept: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The derivative (N, H) of S along t, and the derivative of y (E, H) when it is to be kept."""
    out = wide_zeros(x.at_receiver)
    kept = per_edge(x) if keep else None
    x, t = widened(x), _widened_direction(t)
    room = Room(x, edges)
    for block in edges.blocks:
        tall, tall_y = room.pair(block, 0), room.pair(block, 1)
        hidden, t_hidden = tall.chunk(2)
        y, t_y = tall_y.chunk(2)
        value, slope_y = room.cut(block, 2)
        _push_first(x, edges, block, t, hidden, t_hidden, slope_y)
        if y_kept is None:
            y, t_y = multiply(tall, x.w_down.t(), tall_y).chunk(2)
            y.add_(x.b_down)
            if kept is not None:
                rows_of(kept, block).copy_(t_y)
        else:
            y = wide_rows(y_kept, block, y)
            t_y = multiply(t_hidden, x.w_down.t(), t_y, kept=_rows(kept, block))
        silu_and_slope(y, value, slope_y)
        message = slope_y.mul_(t_y).mul_(rows_of(x.envelope, block))
        if t.envelope is not None:
            message.addcmul_(value, rows_of(t.envelope, block))
        add_rows(out, rows_of(edges.receivers, block), message)
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
    """Gradients of ⟨G', S⟩ + ⟨G, push along t⟩, with t held fixed.

    Args:
        x: the function's inputs.
        edges: its edges.
        g_out: G' (N, H); None is zero.
        g_push: G (N, H).
        t: the direction.
        wanted: the gradients to compute.
        y_kept: y (E, H), if `forward` kept it.
        t_y_kept: the derivative of y along t (E, H), if `push` kept it.
        g_hidden_kept: the gradient of ⟨G, S⟩ by a (E, H), if `reverse` kept it.
    """
    grads = Sums(x, wanted)
    narrow, x, t = x, widened(x), _widened_direction(t)
    g_push = g_push.to(x.at_receiver.dtype)
    g_out = None if g_out is None else g_out.to(x.at_receiver.dtype)
    room = Room(x, edges)
    for block in edges.blocks:
        receivers, envelope = rows_of(edges.receivers, block), rows_of(x.envelope, block)
        tall, tall_g, tall_y = (room.pair(block, k) for k in range(3))
        hidden, t_hidden = tall.chunk(2)
        y, t_y = tall_y.chunk(2)
        g_y, g_t_y = tall_g.chunk(2)
        t_z, slope_z, curve_z, work = room.cut(block, 4)
        torch.sigmoid(first_of(x, edges, block, hidden), out=work)
        hidden.mul_(work)
        slope_and_curve(hidden, work, slope_z, curve_z)
        torch.mul(_first_direction(x, edges, block, t, t_z, work), slope_z, out=t_hidden)
        # Only one of the two may be kept: then the other's product is half as tall.
        tall_narrow = tall.to(x.w_down.dtype)
        hidden_narrow, t_hidden_narrow = tall_narrow.chunk(2)
        if y_kept is None and t_y_kept is None:
            y, t_y = multiply(tall_narrow, x.w_down.t(), tall_y).chunk(2)
            y.add_(x.b_down)
        elif y_kept is None:
            y = multiply(hidden_narrow, x.w_down.t(), y, bias=x.b_down)
        elif t_y_kept is None:
            t_y = multiply(t_hidden_narrow, x.w_down.t(), t_y)
        y = y if y_kept is None else wide_rows(y_kept, block, y)
        t_y = t_y if t_y_kept is None else wide_rows(t_y_kept, block, t_y)

        value, slope_y, curve_y, g = room.cut(block, 4, first=4)
        torch.sigmoid(y, out=work)
        torch.mul(y, work, out=value)
        slope_and_curve(value, work, slope_y, curve_y)
        torch.index_select(g_push, 0, receivers, out=g)
        torch.mul(g, slope_y, out=g_t_y)
        by_envelope = torch.mul(g_t_y, t_y, out=work)
        g_t_y.mul_(envelope)
        curve_y.mul_(t_y).mul_(g).mul_(envelope)
        if t.envelope is None:
            g_y.zero_()
        else:
            torch.mul(g, rows_of(t.envelope, block), out=g_y)
        if g_out is not None:
            torch.index_select(g_out, 0, receivers, out=g)
            by_envelope.addcmul_(g, value)
            g_y.addcmul_(g, envelope)
        g_y.mul_(slope_y).add_(curve_y)
        grads.add_envelope(block, by_envelope)
        tall_g_narrow = tall_g.to(x.w_down.dtype)
        grads.add_down(tall_g_narrow, tall_narrow, bias_rows=g_y)

        if g_hidden_kept is None:
            g_hidden, g_t_hidden = multiply(tall_g_narrow, x.w_down, tall).chunk(2)
        else:
            g_hidden = multiply(tall_g_narrow.chunk(2)[0], x.w_down, hidden)
            g_t_hidden = wide_rows(g_hidden_kept, block, t_hidden)
        g_z = g_hidden.mul_(slope_z).addcmul_(curve_z.mul_(t_z), g_t_hidden)
        grads.add_first(x, edges, block, g_z)
        if t.radial is not None:
            grads.add_radial_weight(torch.mul(g_t_hidden, slope_z, out=work), rows_of(t.radial, block))
    return grads.result(narrow)


def _rows(kept: Tensor | None, block: Block) -> Tensor | None:
    return None if kept is None else rows_of(kept, block)


def _widened_direction(t: Direction) -> Direction:
    return Direction(*(None if one is None else one.to(wide_dtype(one)) for one in t))


def _first_direction(
    x: Inputs, edges: BlockedEdges, block: Block, t: Direction, out: Tensor, scratch: Tensor
) -> Tensor:
    """The derivative of z along t for a block's edges, in ``out``."""
    if t.radial is not None:
        torch.mm(rows_of(t.radial, block), x.w_radial.t(), out=out)
    else:
        out.zero_()
    for at_atom, atoms in ((t.at_receiver, edges.receivers), (t.at_sender, edges.senders)):
        if at_atom is not None:
            out.add_(torch.index_select(at_atom, 0, rows_of(atoms, block), out=scratch))
    return out


def _push_first(
    x: Inputs,
    edges: BlockedEdges,
    block: Block,
    t: Direction,
    hidden: Tensor,
    t_hidden: Tensor,
    scratch: Tensor,
) -> None:
    """a and its derivative along t for a block's edges, in ``hidden`` and ``t_hidden``."""
    _first_direction(x, edges, block, t, t_hidden, scratch)
    silu_and_slope(first_of(x, edges, block, hidden), hidden, scratch)
    t_hidden.mul_(scratch)
