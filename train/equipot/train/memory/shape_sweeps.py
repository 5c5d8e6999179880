"""The sweeps over messages on tensors without numbers: what they return, hold meanwhile, and compute.

They stand in for the compiled sweeps of `equipot.model.message_kernels` while a step is followed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipot.model.block_work import Gradients, Inputs, Sums, Wanted, per_edge, wide_zeros
from equipot.model.blocks import BLOCK_EDGES, BlockedEdges
from equipot.model.message_sweeps import Direction
from equipot.train.memory.trace import Tracker

_PANEL = 64
"""Columns that the compiled sweeps work on at once; widths are padded to it."""


class ShapeSweeps:
    """`equipot.model.kernels.Sweeps` that tell a tracker of their work."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def forward(self, x: Inputs, edges: BlockedEdges, *, keep: bool = False) -> tuple[Tensor, Tensor | None]:
        """See `message_sweeps.forward`."""
        room = self._room(x, weights=1, blocks=1, atoms=2)
        out, kept = wide_zeros(x.at_receiver), per_edge(x) if keep else None
        self._work(x, products=1, passes=6)
        del room
        return out, kept

    def reverse(
        self,
        x: Inputs,
        edges: BlockedEdges,
        g_out: Tensor,
        wanted: Wanted,
        *,
        y_kept: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Gradients, Tensor | None]:
        """See `message_sweeps.reverse`."""
        room = self._room(x, weights=1 if y_kept is not None else 2, blocks=3, atoms=3)
        grads, kept = Sums(x, wanted).result(x), per_edge(x) if keep else None
        self._work(x, products=1 + (y_kept is None) + wanted.down, passes=12)
        del room
        return grads, kept

    def push(
        self,
        x: Inputs,
        edges: BlockedEdges,
        t: Direction,
        *,
        y_kept: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `message_sweeps.push`."""
        room = self._room(x, weights=1, blocks=2, atoms=4)
        out, kept = wide_zeros(x.at_receiver), per_edge(x) if keep else None
        self._work(x, products=1 + (y_kept is None), passes=12)
        del room
        return out, kept

    def reverse_push(
        self,
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
        again_y = y_kept is None or t_y_kept is None
        room = self._room(x, weights=1 + again_y, blocks=6, atoms=6)
        grads = Sums(x, wanted).result(x)
        again = sum(kept is None for kept in (y_kept, t_y_kept, g_hidden_kept))
        self._work(x, products=1 + again + 2 * wanted.down, passes=24)
        del room
        return grads

    def _room(self, x: Inputs, *, weights: int, blocks: int, atoms: int) -> Tensor:
        """Room for packed weights, blocks of edges, and tensors of atoms in whole panels of columns."""
        atoms_, width = x.at_receiver.shape
        padded = -(-width // _PANEL) * _PANEL
        copies = atoms if padded != width else 1
        numbers = weights * padded * padded + blocks * BLOCK_EDGES * padded + copies * atoms_ * padded
        return torch.empty(numbers, dtype=x.at_receiver.dtype, device="meta")

    def _work(self, x: Inputs, *, products: int, passes: int) -> None:
        n_edges, width = x.radial.shape[0], x.at_receiver.shape[1]
        radial = 2.0 * n_edges * width * x.radial.shape[1] * (1 + passes // 12)
        flops = 2.0 * n_edges * width * width * products + radial
        self._tracker.add_work(flops, float(passes) * n_edges * width * x.at_receiver.element_size())
