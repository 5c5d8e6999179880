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
    """A layer's features (N, H), to stand in the place of `equipot.model.backbone.run_layer_directly`.

    The re-entrant form cannot be differentiated twice, which conservative forces need.
    """
    if has_tangent(edges.radial):
        return _recomputed_with_tangents(layer, h, edges)
    output: Tensor = checkpoint(layer, h, edges, use_reentrant=False)
    return output


def _recomputed_with_tangents(layer: nn.Module, h: Tensor, edges: Edges) -> Tensor:
    # Dual numbers end with their level, before the backward pass begins: what is computed again starts from
    # values and tangents apart, at a level of its own.
    def run(*parts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        duals = [
            None if value is None else dual(value, tangent)
            for value, tangent in zip(parts[::2], parts[1::2], strict=True)
        ]
        stream, radial, envelope, directions = duals
        assert stream is not None
        assert radial is not None
        assert envelope is not None
        inner = replace(edges, radial=radial, envelope=envelope, directions=directions)
        return parts_of(layer(stream, inner))

    read = (h, edges.radial, edges.envelope, edges.directions)
    pairs = [part for tensor in read for part in ((None, None) if tensor is None else parts_of(tensor))]
    outputs = checkpoint(
        run,
        *pairs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), forward_ad.dual_level()),
    )
    return dual(*outputs)
