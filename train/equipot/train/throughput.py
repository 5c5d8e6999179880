"""How much of the machine a step uses: what is computed in a second, and the memory it takes."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

from equipot.model.config import ModelConfig
from equipot.train.dataset import Batch
from equipot.train.flops import step_flops
from equipot.train.peak import matrix_product_rate
from equipot.train.recipe import Recipe
from equipot.train.world import World

_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Speed:
    """What all ranks together computed in a second of a step."""

    structures: float
    atoms: float
    edges: float
    utilisation: float
    """Operations the model needs over those that the ranks' matrix products could have made meanwhile."""
    peak_memory: float
    """GiB: the most that any rank has held so far; of the device, or without one resident in memory."""


class Throughput:
    """Measures the machine once, then makes figures of sums that ranks exchange anyway; collective to make.

    Args:
        config: of the model.
        recipe: of the run.
        world: the ranks.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, world: World) -> None:
        self._world = world
        self._structures = recipe.batch.structures
        self._flops = step_flops(recipe, config)
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        rate = matrix_product_rate(dtype, world.device, torch.get_num_threads())
        self._peak = world.sum([rate])[0]

    def counts(self, batches: list[Batch]) -> list[float]:
        """This rank's part of a step, to be added up over ranks for :meth:`speed`."""
        systems = [batch.systems for batch in batches if batch.counts]
        memory = [0.0] * self._world.size
        memory[self._world.rank] = self._peak_memory()
        return [
            float(sum(each.n_atoms for each in systems)),
            float(sum(each.n_edges for each in systems)),
            *memory,
        ]

    def speed(self, sums: list[float], seconds: float) -> Speed:
        """Figures of a step from the sums over ranks of :meth:`counts`."""
        atoms, edges, *memory = sums
        return Speed(
            structures=self._structures / seconds,
            atoms=atoms / seconds,
            edges=edges / seconds,
            utilisation=self._flops.of(atoms, edges) / seconds / self._peak,
            peak_memory=max(memory) / _GIB,
        )

    def _peak_memory(self) -> float:
        if self._world.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._world.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
