"""Which structures make which step, and which rank computes them. Knows no structures, only their costs.

A global batch depends on seed and step alone. How it is divided among ranks and micro-batches evens out the
cost and changes nothing in the gradient, because losses are normalised by counts over the whole global
batch.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipot.train.places import Keys
from equipot.train.recipe import RecipeError


@dataclass(frozen=True, slots=True)
class Position:
    """Where a step lies: `epoch` from 0, `offset` steps into it."""

    epoch: int
    offset: int


class Sampler:
    """Shuffled global batches, epoch by epoch; what fills no batch at an epoch's end is left out of it.

    Args:
        indices: what an epoch draws from the training split; one structure may be drawn more than once.
        costs: (k,) relative cost of each structure, such as its number of edges.
        structures: per global batch.
        seed: of the order.
    """

    def __init__(self, indices: Keys, costs: NDArray[np.int64], *, structures: int, seed: int) -> None:
        if structures > len(indices):
            raise RecipeError(
                f"batch.structures = {structures} is more than the {len(indices)} structures of the training "
                f"split; set batch.structures ≤ {len(indices)}"
            )
        self._indices = indices
        self._costs = costs
        self._structures = structures
        self._seed = seed
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self._indices) // self._structures

    def position(self, step: int) -> Position:
        """Epoch and offset of the step with that number, from 0."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        return Position(epoch, offset)

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """Rows of `indices` that step `step` trains on, (structures,)."""
        position = self.position(step)
        if self._order is None or self._order[0] != position.epoch:
            order = np.random.default_rng([self._seed, position.epoch]).permutation(len(self._indices))
            self._order = (position.epoch, order)
        start = position.offset * self._structures
        return self._order[1][start : start + self._structures]

    def micro_batches(
        self, step: int, *, rank: int, ranks: int, accumulation: int
    ) -> list[NDArray[np.int64]]:
        """What one rank computes in a step: per micro-batch an array (n, 2) of store and structure index."""
        rows = self.global_batch(step)
        parts = divide(self._costs[rows], ranks * accumulation)
        mine = parts[rank * accumulation : (rank + 1) * accumulation]
        return [self._indices[rows[part]] for part in mine]


def divide(costs: NDArray[np.int64], parts: int) -> list[NDArray[np.int64]]:
    """Positions 0…n−1 in `parts` lists of nearly equal cost, none empty if there are enough positions.

    Longest first, each to the part with the least so far (Graham 1969: at most 4/3 of the best possible).
    """
    loads = [(0, 0, part) for part in range(parts)]  # cost, structures, part
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for position in np.argsort(-costs, kind="stable"):
        cost, count, part = heapq.heappop(loads)
        chosen[part].append(int(position))
        heapq.heappush(loads, (cost + int(costs[position]), count + 1, part))
    return [np.array(sorted(part), dtype=np.int64) for part in chosen]
