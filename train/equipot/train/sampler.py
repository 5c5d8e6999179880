"""Which structures make which step, and which rank computes them. Knows no structures, only their costs.

A global batch depends on seed and step alone. How it is divided among ranks and micro-batches evens out the
cost and changes nothing in the gradient, because losses are normalised by counts over the whole global
batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipot.train.columns import Column
from equipot.train.divide import divide
from equipot.train.recipe import RecipeError
from equipot.train.shuffle import Shuffle

_PAGE = 8192  # places of the order that are computed at once


@dataclass(frozen=True, slots=True)
class Position:
    """Where a step lies: `epoch` from 0, `offset` steps into it."""

    epoch: int
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """What one rank computes at once."""

    keys: NDArray[np.int64]
    """(n, 2) store and structure index"""
    counts: bool = True
    """False: computed only to stay in step with the other ranks, without labels."""


class Sampler:
    """Shuffled global batches, epoch by epoch; what fills no batch at an epoch's end is left out of it.

    Nothing of the size of the training split is copied or made: an order is computed where it is looked at.
    Safe to be asked by several threads.

    Args:
        indices: (k, 2) store and structure index of the training split, of any integer type.
        costs: (k,) relative cost of each structure: its edges, and its atoms.
        structures: per global batch.
        seed: of the order.
        limit: largest cost of a micro-batch; None: whatever it comes to. Dearer structures stand alone.
    """

    def __init__(
        self, indices: Column, costs: Column, *, structures: int, seed: int, limit: int | None = None
    ) -> None:
        if structures > len(indices):
            raise RecipeError(
                f"batch.structures = {structures} is more than the {len(indices)} structures of the training "
                f"split; set batch.structures ≤ {len(indices)}"
            )
        self._indices = indices
        self._costs = costs
        self._structures = structures
        self._seed = seed
        self._limit = limit
        self._steps_per_page = max(1, _PAGE // structures)
        self._page: tuple[int, NDArray[np.int64]] | None = None

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
        at = self.position(step)
        first = at.offset - at.offset % self._steps_per_page
        page = self._page
        if page is None or page[0] != step - at.offset + first:
            stop = min(first + self._steps_per_page, self.steps_per_epoch)
            places = np.arange(first * self._structures, stop * self._structures)
            order = Shuffle(len(self._indices), [self._seed, at.epoch])[places]
            self._page = page = (step - at.offset + first, order)
        start = (at.offset - first) * self._structures
        return page[1][start : start + self._structures]

    def micro_batches(self, step: int, *, rank: int, ranks: int, accumulation: int) -> list[MicroBatch]:
        """What one rank computes in a step: `accumulation` micro-batches, or more to stay below the limit.

        All ranks have equally many.
        """
        rows = np.sort(self.global_batch(step))  # in the order of the files: neighbours are read together
        keys = np.asarray(self._indices[rows]).astype(np.int64)
        costs = np.asarray(self._costs[rows]).astype(np.int64)
        parts = self._parts(costs, ranks, accumulation)
        filler = MicroBatch(keys[costs.argmin()][None], counts=False)
        return [MicroBatch(keys[part]) if len(part) else filler for part in _deal(parts, costs, rank, ranks)]

    def _parts(self, costs: NDArray[np.int64], ranks: int, accumulation: int) -> list[NDArray[np.int64]]:
        if self._limit is None:
            return divide(costs, ranks * accumulation)
        needed = -(-int(costs.sum()) // self._limit)
        each = max(accumulation, -(-needed // ranks))
        while True:
            parts = divide(costs, ranks * each)
            dearest = max(int(costs[part].sum()) for part in parts)
            if dearest <= self._limit or ranks * each >= len(costs):
                return parts
            each += 1


def _deal(
    parts: list[NDArray[np.int64]], costs: NDArray[np.int64], rank: int, ranks: int
) -> list[NDArray[np.int64]]:
    """One rank's parts: in turns there and back, so that the dearer ones do not gather on one rank."""
    if ranks == 1:
        return parts
    order = np.argsort([-int(costs[part].sum()) for part in parts], kind="stable").reshape(-1, ranks)
    return [parts[turn[rank if number % 2 == 0 else ranks - 1 - rank]] for number, turn in enumerate(order)]
