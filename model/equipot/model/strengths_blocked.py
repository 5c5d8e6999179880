"""One number per edge and output, s_ij = W silu(z_ij), without a tensor of edges × width. For direct forces.

z is the messages' first pre-activation, see `message_sweeps`. There are first derivatives alone: direct
forces are no gradient, so nobody differentiates them twice; autograd says so if somebody tries.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from equipot.model import compiled_sweeps
from equipot.model.block_work import (
    Inputs,
    Room,
    Sums,
    Wanted,
    add_product,
    first_of,
    rows_of,
    silu_and_slope,
    wide_zeros,
    widened,
    without_autocast,
)
from equipot.model.blocks import BlockedEdges
from equipot.model.kernels import compiled_for


def strengths_of_edges(
    at_receiver: Tensor,
    at_sender: Tensor,
    radial: Tensor,
    w_radial: Tensor,
    w_out: Tensor,
    edges: BlockedEdges,
) -> Tensor:
    """s (E, outputs) from P, Q (N, H), ρ (E, R), W_r (H, R) and W (outputs, H), all in one dtype."""
    out: Tensor = _Strengths.apply(edges, at_receiver, at_sender, radial, w_radial, w_out)  # type: ignore[no-untyped-call]
    return out


class _Context(FunctionCtx):
    edges: BlockedEdges
    compiled: bool
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Strengths(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, edges: BlockedEdges, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.edges = edges
        ctx.compiled = compiled_for(tensors[0])
        x, w_out = _inputs(*tensors), tensors[4]
        with without_autocast(w_out):
            return compiled_sweeps.strengths(x, edges) if ctx.compiled else _forward(x, w_out, edges)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, g_out: Tensor) -> tuple[Tensor | None, ...]:
        x, w_out = _inputs(*ctx.saved_tensors), ctx.saved_tensors[4]
        first_four = ctx.needs_input_grad[1:5]
        wanted = Wanted._make([*first_four[:3], False, first_four[3], False])
        with without_autocast(w_out):
            if ctx.compiled:
                return (None, *compiled_sweeps.strengths_reverse(x, ctx.edges, g_out, wanted))
            return (None, *_reverse(x, w_out, ctx.edges, g_out, wanted))


def _forward(x: Inputs, w_out: Tensor, edges: BlockedEdges) -> Tensor:
    out: Tensor = x.radial.new_empty(x.radial.shape[0], w_out.shape[0])
    x = widened(x)
    room = Room(x, edges)
    for block in edges.blocks:
        hidden, slope = room.cut(block, 2)
        silu_and_slope(first_of(x, edges, block, hidden), hidden, slope)
        torch.mm(hidden.to(w_out.dtype), w_out.t(), out=rows_of(out, block))
    return out


def _reverse(
    x: Inputs, w_out: Tensor, edges: BlockedEdges, g_out: Tensor, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    sums = Sums(x, wanted)
    g_w_out = wide_zeros(w_out)
    narrow, x = x, widened(x)
    w_wide, g_out = w_out.to(g_w_out.dtype), g_out.to(g_w_out.dtype)
    room = Room(x, edges)
    for block in edges.blocks:
        hidden, slope, g_z = room.cut(block, 3)
        silu_and_slope(first_of(x, edges, block, hidden), hidden, slope)
        g_rows = rows_of(g_out, block)
        add_product(g_w_out, g_rows, hidden)
        sums.add_first(x, edges, block, torch.mm(g_rows, w_wide, out=g_z).mul_(slope))
    grads = sums.result(narrow)
    return grads.at_receiver, grads.at_sender, grads.radial, grads.w_radial, g_w_out.to(w_out.dtype)


def _inputs(
    at_receiver: Tensor, at_sender: Tensor, radial: Tensor, w_radial: Tensor, w_out: Tensor
) -> Inputs:
    # Messages have an envelope and a second layer, strengths do not: what stands in here is never read.
    return Inputs(at_receiver, at_sender, radial, radial[:, :0], w_radial, w_out, w_out[0])
