"""What an ensemble said of labelled structures, beside what is true. Knows nothing of conformal scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equipot.model.batch import SystemBatch
from equipot.model.config import ModelConfig
from equipot.model.domain import Domain, Neighborhoods
from equipot.model.ensemble import Ensemble
from equipot.model.inference import FrozenPotential
from equipot.model.potential import Potential, Prediction
from equipot.train.columns import Column
from equipot.train.dataset import Batch, Dataset, Sizes
from equipot.train.evaluate import costliest_batch, evaluation_batches
from equipot.train.loss import residuals
from equipot.train.mix import Mix
from equipot.train.world import World

MOST_STRUCTURES = 20_000
"""Of one split; more would not make quantiles noticeably finer."""

Told = Callable[[str, float], None]


class Members:
    """The members of an ensemble as one potential, as evaluations want it."""

    def __init__(self, potentials: Sequence[Potential]) -> None:
        """At least one, all of one configuration."""
        self.config: ModelConfig = potentials[0].config
        self.ensemble = Ensemble([_frozen(one) for one in potentials])

    def eval(self) -> Members:
        """Itself."""
        return self

    def forward(self, batch: SystemBatch, *, forces: bool, stress: bool) -> Prediction:
        """The mean."""
        return self.ensemble(batch, forces=forces, stress=stress)[0]

    def __len__(self) -> int:
        return len(self.ensemble.members)


def _frozen(potential: Potential) -> FrozenPotential:
    try:
        # Nothing packed: that would take twice the memory of the weights on top of them.
        return FrozenPotential(potential, way="analytic")
    except ValueError:
        return FrozenPotential(potential)


@dataclass(frozen=True, slots=True, eq=False)
class Cases:
    """S structures with N atoms; errors are NaN where there is no label, spreads 0 of one member alone."""

    energy_error: NDArray[np.float64]
    """(S,) |ΔE| per atom, eV"""
    energy_spread: NDArray[np.float64]
    """(S,) per atom, eV"""
    level: NDArray[np.int64]
    """(S,) index of the level of theory"""
    group: NDArray[np.int64]
    """(S,)"""
    outside: NDArray[np.bool_]
    """(S,) by the domain that was given"""
    forces_error: NDArray[np.float64]
    """(N,) |ΔF|, eV/Å"""
    forces_spread: NDArray[np.float64]
    """(N,) eV/Å"""
    strangeness: NDArray[np.float64]
    """(N,) score by the domain that was given"""
    element_idx: NDArray[np.int64]
    """(N,)"""
    system_idx: NDArray[np.int64]
    """(N,) ascending"""

    def __len__(self) -> int:
        return len(self.level)


def look_at(members: Members, domain: Domain | None, mix: Mix, sizes: Sizes, split: str, told: Told) -> Cases:
    """Has every structure of a split computed, or evenly many of a large one.

    Raises:
        DataError: a structure cannot be read.
    """
    dataset = Dataset(mix.stores, members.config)
    groups = [store.groups for store in mix.stores]
    parts: list[Cases] = []
    for batch, keys in batches_of(dataset, mix.part(split), sizes, members.config, told, split):
        systems = batch.systems
        prediction, spread = members.ensemble(systems, forces=True)
        found = residuals(prediction, batch.targets, systems)
        n_atoms = torch.bincount(systems.system_idx, minlength=systems.n_systems)
        hood = Neighborhoods.of(systems, members.config.elements)
        forces_error = torch.linalg.vector_norm(found.forces, dim=-1).double()
        none = torch.zeros(1, dtype=torch.float64)
        energy_spread = none.expand(systems.n_systems) if spread is None else spread.energy / n_atoms
        forces_spread = none.expand(systems.n_atoms)
        if spread is not None and spread.forces is not None:
            forces_spread = spread.forces.double()
        verdicts = [] if domain is None else domain(hood)
        parts.append(
            Cases(
                energy_error=torch.where(found.has_energy, found.energy.abs(), torch.nan).numpy(),
                energy_spread=energy_spread.numpy(),
                level=systems.level_idx.numpy(),
                group=np.array([groups[store][index] for store, index in keys], dtype=np.int64),
                outside=np.array([one.outside for one in verdicts] or [False] * systems.n_systems),
                forces_error=torch.where(found.has_forces.all(-1), forces_error, torch.nan).numpy(),
                forces_spread=forces_spread.numpy(),
                strangeness=np.zeros(systems.n_atoms) if domain is None else domain.scores(hood),
                element_idx=hood.element_idx,
                system_idx=hood.system_idx,
            )
        )
    return _joined(parts)


def batches_of(
    dataset: Dataset, places: Column, sizes: Sizes, config: ModelConfig, told: Told, what: str
) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
    """Batches of bounded cost of at most so many structures of a split, and their keys."""
    chosen = np.unique(np.linspace(0, len(places) - 1, min(len(places), MOST_STRUCTURES)).astype(np.int64))
    keys = places[chosen].astype(np.int64)
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    plan = evaluation_batches(sizes.costs(keys), alone, costliest_batch(config.width))
    for number, mine in enumerate(plan):
        told(f"uncertainty: {what} split", number / len(plan))
        yield dataset.batch(keys[mine.rows]), keys[mine.rows]


def _joined(parts: Sequence[Cases]) -> Cases:
    starts = np.cumsum([0, *(len(part) for part in parts)])
    columns: dict[str, Any] = {}
    for field in fields(Cases):
        arrays = [getattr(part, field.name) for part in parts]
        if field.name == "system_idx":
            arrays = [array + start for array, start in zip(arrays, starts, strict=False)]
        columns[field.name] = np.concatenate(arrays) if arrays else np.empty(0)
    return Cases(**columns)
