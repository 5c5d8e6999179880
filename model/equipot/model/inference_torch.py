"""Energies and their gradients without autograd, in pure torch: the EGNN forward and, by hand, back to edges.

With x a layer's input, i an edge's receiver and j its sender (see `messages` and `egnn`):

    h = norm(x)    P = W_a h + b_1    Q = W_b h    z_ij = P_i + Q_j + W_r ρ_ij    y_ij = W_2 silu(z_ij) + b_2
    S_i = Σ_j e_ij silu(y_ij)    u = W_c h + b + W_g S / √n    x' = [x +] W_d silu(u) + b'

An energy depends on positions through ρ and e alone, and these on one distance: so the way back ends in one
number per edge. It needs no gradient by weights and none by the embedding, which is a constant. What autograd
would keep of an edge are six rows of the width; here it is z and y, or nothing beyond a block of edges.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipot.model.batch import SystemBatch
from equipot.model.blocks import Block, BlockedEdges, block_edges
from equipot.model.egnn import EGNN, EGNNLayer
from equipot.model.potential import Potential
from equipot.model.radial import bessel_basis, bessel_slope, envelope, envelope_slope

_silu_backward: Any = torch.ops.aten.silu_backward.default
_layer_norm_backward: Any = torch.ops.aten.native_layer_norm_backward.default


@dataclass(frozen=True, slots=True, eq=False)
class _Geometry:
    """What all layers read of the edges, in the weights' dtype."""

    edges: BlockedEdges
    radial: Tensor
    envelope: Tensor
    n_atoms: int
    keep: bool


@dataclass(slots=True, eq=False)
class _Trace:
    """What one layer's way back reads again."""

    stream: Tensor
    at_receiver: Tensor
    at_sender: Tensor
    rows: Tensor | None
    """(N,) which row of the two above an atom has; None: its own."""
    update: Tensor
    z: Tensor | None = None
    y: Tensor | None = None


def edge_gradients(potential: Potential, batch: SystemBatch, *, keep: bool) -> tuple[Tensor, Tensor]:
    """Atomic energies (N, levels) of the network in units of the scale, and pulls on edges (E, 3).

    A pull is the derivative of the total energy, scaled to eV, by the edge's vector, in eV/Å.

    Args:
        potential: an EGNN; nothing of it is changed.
        batch: its structures.
        keep: whether z and y of all edges may be held; otherwise they are computed twice.
    """
    backbone = potential.backbone
    assert isinstance(backbone, EGNN)
    config, dtype = potential.config, potential.embedding.element.weight.dtype
    vectors = batch.edge_vectors()
    lengths = torch.linalg.vector_norm(vectors, dim=-1)
    geometry = _Geometry(
        block_edges(batch.senders, batch.receivers, batch.n_atoms),
        bessel_basis(lengths, config.cutoff, config.radial).to(dtype),
        envelope(lengths, config.cutoff).to(dtype).unsqueeze(-1),
        batch.n_atoms,
        keep,
    )
    element_idx = potential.embedding.elements(batch.atomic_numbers)
    x = potential.embedding(batch, element_idx)
    same = potential.embedding.charge is None and potential.embedding.spin is None
    table = potential.embedding.element.weight if same and len(x) >= len(config.elements) else None
    traces = []
    for index, layer in enumerate(backbone.layers):
        first = (table, element_idx) if index == 0 and table is not None else None
        x, trace = _forward(layer, x, geometry, first)
        traces.append(trace)
    energies, g = _head(potential, backbone.norm, batch, x)
    g_radial, g_envelope = torch.zeros_like(geometry.radial), torch.zeros_like(geometry.envelope)
    for index in reversed(range(len(traces))):
        trace = traces.pop()
        g = _back(backbone.layers[index], trace, g, geometry, g_radial, g_envelope, last=index == 0)
    along = (g_radial * bessel_slope(lengths, config.cutoff, config.radial).to(dtype)).sum(-1)
    along += g_envelope.squeeze(-1) * envelope_slope(lengths, config.cutoff).to(dtype)
    return energies, vectors * (along.to(lengths.dtype) / lengths).unsqueeze(-1)


def _forward(
    layer: nn.Module, x: Tensor, geometry: _Geometry, first: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, _Trace]:
    assert isinstance(layer, EGNNLayer)
    rows = None if first is None else first[1]
    h = layer.norm(x if first is None else first[0])
    up = layer.messages.up
    trace = _Trace(
        x, up.receiver(h), up.sender(h), rows, layer.own(h) if rows is None else layer.own(h)[rows]
    )
    if geometry.keep:
        trace.z, trace.y = (h.new_empty(len(geometry.radial), h.shape[-1]) for _ in range(2))
    sums = h.new_zeros(geometry.n_atoms, h.shape[-1])
    for block, room in _blocks(geometry, h, 3):
        _, y = _edge_values(layer, trace, geometry, block, room)
        message = functional.silu(y) if trace.y is not None else functional.silu(y, inplace=True)
        sums.index_add_(0, geometry.edges.receivers[block], message.mul_(geometry.envelope[block]))
    trace.update.addmm_(sums.mul_(layer.message_scale), layer.gathered.weight.t())
    out: Tensor = layer.down(functional.silu(trace.update))
    return (out.add_(x) if layer.residual.adds else out), trace


def _edge_values(
    layer: EGNNLayer, trace: _Trace, geometry: _Geometry, block: slice, room: Tensor
) -> tuple[Tensor, Tensor]:
    """z and y (edges of the block, H), in their kept places or in the first two of the room."""
    edges, up = geometry.edges, layer.messages.up
    z = room[0] if trace.z is None else trace.z[block]
    y = room[1] if trace.y is None else trace.y[block]
    receivers, senders = edges.receivers[block], edges.senders[block]
    if trace.rows is not None:
        receivers, senders = trace.rows[receivers], trace.rows[senders]
    torch.index_select(trace.at_receiver, 0, receivers, out=room[2])
    torch.index_select(trace.at_sender, 0, senders, out=z)
    z.add_(room[2]).addmm_(geometry.radial[block], up.radial.weight.t())
    down = layer.messages.down
    torch.addmm(down.bias, functional.silu(z), down.weight.t(), out=y)
    return z, y


def _head(potential: Potential, norm: nn.Module, batch: SystemBatch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Atomic energies, and the gradient of the total one by the last layer's output."""
    head = potential.energy_head
    t = head.up(norm(x))
    energies = head.down(functional.silu(t))
    level_N = batch.level_idx[batch.system_idx]
    _, scale = potential.references_on(x.device)
    g_t = _silu_backward(head.down.weight[level_N] * scale[level_N].to(x.dtype).unsqueeze(-1), t)
    return energies, _norm_backward(norm, g_t @ head.up.weight, x)


def _back(
    layer: nn.Module,
    trace: _Trace,
    g: Tensor,
    geometry: _Geometry,
    g_radial: Tensor,
    g_envelope: Tensor,
    *,
    last: bool,
) -> Tensor:
    """The gradient by the layer's input; those by radial basis and envelope are added in place."""
    assert isinstance(layer, EGNNLayer)
    g_update = _silu_backward(g @ layer.down.weight, trace.update)
    g_sums = (g_update @ layer.gathered.weight).mul_(layer.message_scale)
    g_receiver, g_sender = torch.zeros_like(g_sums), torch.zeros_like(g_sums)
    down, up = layer.messages.down, layer.messages.up
    for block, room in _blocks(geometry, g_sums, 4):
        receivers, senders = geometry.edges.receivers[block], geometry.edges.senders[block]
        if trace.z is None or trace.y is None:
            z, y = _edge_values(layer, trace, geometry, block, room)
        else:
            z, y = trace.z[block], trace.y[block]
        g_message = torch.index_select(g_sums, 0, receivers, out=room[2])
        value = torch.mul(functional.silu(y), g_message, out=room[3])
        g_envelope[block] += value.sum(-1, keepdim=True)
        g_y = _silu_backward(g_message.mul_(geometry.envelope[block]), y)
        g_z = _silu_backward(torch.mm(g_y, down.weight, out=room[3]), z)
        g_radial[block].addmm_(g_z, up.radial.weight)
        if not last:
            g_receiver.index_add_(0, receivers, g_z)
            g_sender.index_add_(0, senders, g_z)
    if last:
        return g
    g_h = g_update @ layer.own.weight
    g_h.addmm_(g_receiver, up.receiver.weight).addmm_(g_sender, up.sender.weight)
    through = _norm_backward(layer.norm, g_h, trace.stream)
    return through.add_(g) if layer.residual.adds else through


def _norm_backward(norm: nn.Module, g: Tensor, x: Tensor) -> Tensor:
    if not isinstance(norm, nn.LayerNorm):
        return g
    mean = x.mean(-1, keepdim=True)
    scale = (x.var(-1, keepdim=True, correction=0) + norm.eps).rsqrt()
    shape = list(norm.normalized_shape)
    grad: Tensor = _layer_norm_backward(
        g, x, shape, mean, scale, norm.weight, norm.bias, [True, False, False]
    )[0]
    return grad


def _blocks(geometry: _Geometry, like: Tensor, rooms: int) -> Iterator[tuple[slice, Tensor]]:
    """Edges of each block, and room for so many (edges, H) numbers, the same memory every time."""
    edges = geometry.edges
    room = like.new_empty(rooms, edges.longest, like.shape[-1])
    for block in edges.blocks:
        yield _edges(block), room[:, : block.stop - block.start]


def _edges(block: Block) -> slice:
    return slice(block.start, block.stop)
