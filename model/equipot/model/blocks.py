"""Cuts edges, sorted by receiver, into blocks small enough for a cache. Knows nothing of features."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Measured: with 256 rows a block's element-wise work stays in a core's second-level cache at widths up to
# 256, and a matrix product of 256 rows is within a few per cent of the best rate at every width.
BLOCK_EDGES = 256


class Block(NamedTuple):
    """Edges [start, stop), all edges of the receivers among atoms [first_atom, last_atom)."""

    start: int
    stop: int
    first_atom: int
    last_atom: int


@dataclass(frozen=True, slots=True, eq=False)
class BlockedEdges:
    """Who sends to whom, in blocks. A receiver is never split, so a block's sums are final."""

    senders: Tensor
    """(E,) int64"""
    receivers: Tensor
    """(E,) int64, ascending"""
    blocks: tuple[Block, ...]

    @property
    def bounds(self) -> list[int]:
        """Where blocks start, and the end of the last: blocks follow each other without a gap."""
        return [0, *(block.stop for block in self.blocks)]

    @property
    def longest(self) -> int:
        """Most edges in one block."""
        return max((block.stop - block.start for block in self.blocks), default=0)


def block_edges(senders: Tensor, receivers: Tensor, n_atoms: int, *, size: int = BLOCK_EDGES) -> BlockedEdges:
    """Cuts edges into blocks of at most ``size``; an atom with more neighbours is a block of its own.

    Args:
        senders: (E,) int64.
        receivers: (E,) int64, ascending.
        n_atoms: N; atoms without edges are in no block or inside one, it does not matter.
        size: most edges in a block.
    """
    if receivers.is_meta:
        return BlockedEdges(senders, receivers, ())  # there are no numbers to cut by
    ends = torch.bincount(receivers, minlength=n_atoms).cumsum(0).tolist() if len(receivers) else []
    blocks: list[Block] = []
    start = first_atom = 0
    while ends and start < ends[-1]:
        # The first atom that ends beyond the block, but at least the one whose edges come next.
        last_atom = max(bisect_right(ends, start + size), bisect_right(ends, start) + 1)
        blocks.append(Block(start, ends[last_atom - 1], first_atom, last_atom))
        start, first_atom = ends[last_atom - 1], last_atom
    return BlockedEdges(senders, receivers, tuple(blocks))
