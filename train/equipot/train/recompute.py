"""Activation checkpointing: a layer's inner values are forgotten and computed again in the backward pass."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from equipot.model.duals import dual, has_tangent, parts_of
from equipot.model.geometry import Edges

_MOVING = ("radial", "envelope", "directions", "angular")
"""What of edges depends on positions, and so has tangents."""


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
    names = [name for name in _MOVING if getattr(edges, name) is not None]

    def run(*parts: Tensor) -> tuple[Tensor, Tensor | None]:
        stream, *read = (dual(*pair) for pair in zip(parts[::2], parts[1::2], strict=True))
        inner: dict[str, Any] = dict(zip(names, read, strict=True))
        return parts_of(layer(stream, replace(edges, **inner)))

    read = [h, *(getattr(edges, name) for name in names)]
    pairs = [part for tensor in read for part in parts_of(tensor)]
    outputs = checkpoint(
        run,
        *pairs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), forward_ad.dual_level()),
    )
    return dual(*outputs)
