"""Activation checkpointing: a layer's inner values are forgotten and computed again in the backward pass."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from equipot.model.duals import dual, has_tangent, parts_of
from equipot.model.geometry import Edges


def recomputed(layer: nn.Module, h: Tensor, edges: Edges) -> Tensor:
    """A layer's features (N, H), to stand in the place of `equipot.model.egnn.run_layer_directly`.

    The re-entrant form cannot be differentiated twice, which conservative forces need.
    """
    if has_tangent(edges.radial):
        return _recomputed_with_tangents(layer, h, edges)
    output: Tensor = checkpoint(layer, h, edges, use_reentrant=False)
    return output


def _recomputed_with_tangents(layer: nn.Module, h: Tensor, edges: Edges) -> Tensor:
    # Dual numbers end with their level, before the backward pass begins: what is computed again starts from
    # values and tangents apart, at a level of its own.
    def run(
        h: Tensor, t_h: Tensor | None, r: Tensor, t_r: Tensor | None, e: Tensor, t_e: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        inner = replace(edges, radial=dual(r, t_r), envelope=dual(e, t_e))
        return parts_of(layer(dual(h, t_h), inner))

    pairs = [part for tensor in (h, edges.radial, edges.envelope) for part in parts_of(tensor)]
    outputs = checkpoint(
        run,
        *pairs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), forward_ad.dual_level()),
    )
    return dual(*outputs)
