"""What a run has seen after so many steps: structures, atoms and edges, exactly, from its sampler's order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipot.train.dataset import Sizes
from equipot.train.mix import Mix
from equipot.train.recipe import Recipe
from equipot.train.sampler import Sampler


@dataclass(frozen=True, slots=True, eq=False)
class Exposure:
    """Sums over the steps of a run; index k is after k steps."""

    structures: NDArray[np.int64]
    atoms: NDArray[np.int64]
    edges: NDArray[np.int64]
    steps_per_epoch: int


def exposure(recipe: Recipe, mix: Mix, steps: int) -> Exposure:
    """What `steps` steps of a recipe see; a step that was skipped has been computed, and counts.

    Args:
        recipe: of the run.
        mix: that it trains on.
        steps: how many.
    """
    _, draws = mix.training(recipe.data.subset)
    sizes = Sizes.of(mix.stores, recipe.model.cutoff, progress=False)
    sampler = Sampler(draws, sizes.cost_column(draws), structures=recipe.batch.structures, seed=recipe.seed)
    seen = np.zeros((steps + 1, 2), dtype=np.int64)
    for step in range(steps):
        keys = draws[np.sort(sampler.global_batch(step))]
        seen[step + 1] = sizes.rows(keys).sum(axis=0)
    totals = seen.cumsum(axis=0)
    return Exposure(
        structures=np.arange(steps + 1) * recipe.batch.structures,
        atoms=totals[:, 0],
        edges=totals[:, 1],
        steps_per_epoch=sampler.steps_per_epoch,
    )
