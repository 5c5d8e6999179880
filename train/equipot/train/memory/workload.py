"""What a rank has to compute in a step: its largest micro-batches, taken from the recipe's own data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from equipot.model.batch import SystemBatch
from equipot.model.config import ModelConfig
from equipot.train.dataset import Batch, Dataset, Sizes, Targets
from equipot.train.mix import Mix
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard
from equipot.train.sampler import Sampler

_STEPS = 200
"""Steps whose micro-batches are looked at for the largest; sizes are known, nothing is read for it."""


@dataclass(frozen=True, slots=True)
class Load:
    """One micro-batch by its sizes."""

    systems: int
    atoms: int
    edges: int

    @staticmethod
    def of(batch: Batch) -> Load:
        """The sizes of a batch."""
        return Load(batch.systems.n_systems, batch.systems.n_atoms, batch.systems.n_edges)

    def shapes(self) -> tuple[SystemBatch, Targets]:
        """A batch of these sizes, without numbers."""

        def integers(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int64, device="meta")

        def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        systems = SystemBatch(
            atomic_numbers=integers(self.atoms),
            positions=floats(self.atoms, 3),
            cell=floats(self.systems, 3, 3),
            pbc=torch.empty((self.systems, 3), dtype=torch.bool, device="meta"),
            system_idx=integers(self.atoms),
            level_idx=integers(self.systems),
            charge=integers(self.systems),
            spin_multiplicity=integers(self.systems),
            senders=integers(self.edges),
            receivers=integers(self.edges),
            cell_shifts=floats(self.edges, 3),
        )
        targets = Targets(
            energy=floats(self.systems, dtype=torch.float64),
            forces=floats(self.atoms, 3),
            stress=floats(self.systems, 3, 3),
        )
        return systems, targets


@dataclass(frozen=True, slots=True)
class Workload:
    """A rank's work in a step."""

    largest: Load
    """the micro-batch that takes most memory, of all ranks and of many steps"""
    mean: Load
    """an average one, for the time a step takes"""
    micro_batches: float
    """of a rank in a step, on average"""


class Data:
    """The recipe's training split, and how its batches fall among ranks."""

    def __init__(self, recipe: Recipe, card: RunCard, mix: Mix) -> None:
        self.config: ModelConfig = card.config
        self.card = card
        self._seed = recipe.seed
        self._sizes = Sizes.of(mix.stores, recipe.model.cutoff, progress=False)
        self._dataset = Dataset(mix.stores, card.config)
        _, self._draws = mix.training(recipe.data.subset)
        self._costs = self._sizes.cost_column(self._draws)

    def card_for(self, recipe: Recipe) -> RunCard:
        """The card of a run of another recipe on the same data: its model is that recipe's."""
        return replace(self.card, recipe=recipe, config=replace(self.config, **recipe.model.model_dump()))

    def workload(self, recipe: Recipe, ranks: int, steps: int = _STEPS) -> Workload:
        """What the recipe gives each of so many ranks to do.

        Raises:
            RecipeError: a batch is larger than the training split.
        """
        sampler = Sampler(
            self._draws,
            self._costs,
            structures=recipe.batch.structures,
            seed=self._seed,
            limit=recipe.batch.max_edges,
        )
        parts, costs = [], []
        steps = max(1, min(steps, sampler.steps_per_epoch))
        for step in range(steps):
            for rank in range(ranks):
                for part in sampler.micro_batches(
                    step, rank=rank, ranks=ranks, accumulation=recipe.batch.accumulation
                ):
                    parts.append(part.keys)
                    costs.append(int(self._sizes.costs(part.keys).sum()))
        largest = Load.of(self._dataset.batch(parts[int(np.argmax(costs))]))
        scale = float(np.mean(costs)) / max(costs)
        mean = Load(
            max(1, round(largest.systems * scale)),
            max(1, round(largest.atoms * scale)),
            round(largest.edges * scale),
        )
        return Workload(largest, mean, len(parts) / (steps * ranks))
