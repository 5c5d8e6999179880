"""Errors of predictions on labelled structures, by level of theory, beside those of no network at all.

Used during training on the validation split and at export on the test split, so that both mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from equipot.model.batch import SystemBatch
from equipot.model.config import ModelConfig
from equipot.model.potential import Prediction
from equipot.model.references import References
from equipot.train.columns import Column
from equipot.train.dataset import Batch, Dataset
from equipot.train.divide import divide
from equipot.train.loss import Counts, Residuals, penalty, residuals
from equipot.train.recipe import LossSection
from equipot.train.world import World

_SUMS = ("count", "absolute", "square", "penalty")
_LABELS = ("energy", "forces", "stress")
# Edges and atoms of a batch, and numbers at most in a tensor of so many by the model's width: bounds the
# memory of an evaluation whatever the structures' sizes and the model's.
_COSTLIEST_BATCH = 20_000
_MOST_NUMBERS = 20_000 * 512


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors over some structures; None where there is no label."""

    structures: int
    energy_mae: float | None
    """meV/atom"""
    energy_rmse: float | None
    """meV/atom"""
    forces_mae: float | None
    """eV/Å, per component"""
    forces_rmse: float | None
    """eV/Å, per component"""
    stress_mae: float | None
    """eV/Å³, per component"""
    stress_rmse: float | None
    """eV/Å³, per component"""

    def in_words(self) -> str:
        """The mean absolute errors on one line."""
        parts = []
        if self.energy_mae is not None:
            parts.append(f"energy {self.energy_mae:.2f} meV/atom")
        if self.forces_mae is not None:
            parts.append(f"forces {self.forces_mae:.4f} eV/Å")
        if self.stress_mae is not None:
            parts.append(f"stress {self.stress_mae:.5f} eV/Å³")
        return ", ".join(parts)

    def to_json(self) -> dict[str, float | int | None]:
        """With units in the names."""
        return {
            "structures": self.structures,
            "energy_mae_mev_per_atom": self.energy_mae,
            "energy_rmse_mev_per_atom": self.energy_rmse,
            "forces_mae_ev_per_angstrom": self.forces_mae,
            "forces_rmse_ev_per_angstrom": self.forces_rmse,
            "stress_mae_ev_per_cubic_angstrom": self.stress_mae,
            "stress_rmse_ev_per_cubic_angstrom": self.stress_rmse,
        }


class Tally:
    """Sums of errors by level of theory, which ranks can add up."""

    def __init__(self, n_levels: int, loss: LossSection) -> None:
        self._loss = loss
        self._sums = np.zeros((n_levels, len(_LABELS), len(_SUMS)))
        self._structures = np.zeros(n_levels)

    def add(self, found: Residuals, systems: SystemBatch) -> None:
        """Take in one batch."""
        level_S = systems.level_idx
        level_N = level_S[systems.system_idx]
        columns = (
            (found.energy, found.has_energy, level_S),
            (found.forces, found.has_forces, level_N),
            (found.stress, found.has_stress, level_S),
        )
        np.add.at(self._structures, level_S.cpu().numpy(), 1)
        for label, (residual, present, levels) in enumerate(columns):
            # float64: a long sum of small squares
            residual = torch.where(present, residual, 0).double()
            values = (present.double(), residual.abs(), residual.square(), penalty(residual, self._loss))
            rows = torch.stack([value.reshape(len(levels), -1).sum(1) for value in values], dim=1)
            np.add.at(self._sums[:, label], levels.cpu().numpy(), rows.cpu().numpy())

    def merge(self, world: World) -> None:
        """Add up all ranks' sums, on every rank."""
        flat = np.concatenate([self._sums.ravel(), self._structures])
        total = np.array(world.sum(flat.tolist()))
        self._sums = total[: self._sums.size].reshape(self._sums.shape)
        self._structures = total[self._sums.size :]

    def include(self, other: Tally) -> None:
        """Add the sums of other structures, with the same levels and loss."""
        self._sums += other._sums
        self._structures += other._structures

    def errors(self, level: int | None = None) -> Errors:
        """Errors of one level of theory, or of all structures together."""
        chosen = slice(None) if level is None else slice(level, level + 1)
        sums = self._sums[chosen].sum(0)

        def mean(label: int, column: int, unit: float) -> float | None:
            count = sums[label, 0]
            return float(sums[label, column] / count * unit) if count else None

        def root(label: int, unit: float) -> float | None:
            square = mean(label, 2, 1.0)
            return None if square is None else float(np.sqrt(square) * unit)

        return Errors(
            structures=int(self._structures[chosen].sum()),
            energy_mae=mean(0, 1, 1000.0),
            energy_rmse=root(0, 1000.0),
            forces_mae=mean(1, 1, 1.0),
            forces_rmse=root(1, 1.0),
            stress_mae=mean(2, 1, 1.0),
            stress_rmse=root(2, 1.0),
        )

    def loss(self) -> float:
        """The training loss over all structures."""
        sums = self._sums.sum(0)
        counts = Counts(*sums[:, 0])
        weights = (self._loss.energy, self._loss.forces, self._loss.stress)
        per_label = zip(weights, sums[:, 3], (counts.energy, counts.forces, counts.stress), strict=True)
        return float(sum(weight * total / max(count, 1.0) for weight, total, count in per_label))


Observer = Callable[[Batch, Prediction], None]
"""Sees every batch that counts, with what was predicted of it."""


class EvaluationStopped(Exception):
    """An evaluation was given up because some rank was asked to end."""


class Evaluated(Protocol):
    """What is evaluated: a potential, or several as one."""

    @property
    def config(self) -> ModelConfig:
        """Of the model."""

    def eval(self) -> object:
        """Ends its training."""

    def forward(self, batch: SystemBatch, *, forces: bool, stress: bool) -> Prediction:
        """What it predicts."""


def evaluate(
    potential: Evaluated,
    dataset: Dataset,
    keys: Column,
    costs: NDArray[np.int64],
    world: World,
    loss: LossSection,
    *,
    stress: bool,
    stopped: Callable[[], bool] | None = None,
    observe: Observer | None = None,
) -> Tally:
    """Errors of a potential over structures, computed by all ranks together.

    Collective, and in step: under ZeRO-3 every forward pass is, so all ranks compute equally many batches.
    `observe` sees this rank's batches alone.

    Raises:
        EvaluationStopped: on all ranks, when `stopped` is true on one.
    """
    tally = Tally(len(potential.config.levels_of_theory), loss)
    potential.eval()
    for mine in evaluation_batches(costs, world, costliest_batch(potential.config.width)):
        if stopped is not None and world.any(stopped()):
            raise EvaluationStopped
        batch = dataset.batch(keys[mine.rows].astype(np.int64), device=world.device)
        prediction = potential.forward(batch.systems, forces=True, stress=stress)
        if mine.counts:
            tally.add(residuals(prediction, batch.targets, batch.systems), batch.systems)
            if observe is not None:
                observe(batch, prediction)
    tally.merge(world)
    return tally


def evaluate_references(
    references: References,
    elements: Sequence[int],
    dataset: Dataset,
    keys: Column,
    loss: LossSection,
) -> Tally:
    """Errors of reference energies and zero forces: what is known before any network."""
    tally = Tally(len(references.scale), loss)
    columns = np.full(119, -1)
    columns[list(elements)] = np.arange(len(elements))
    table = torch.tensor(references.energy)
    for rows in np.array_split(np.arange(len(keys)), max(1, -(-len(keys) // 256))):
        if not len(rows):
            continue
        batch: Batch = dataset.batch(keys[rows].astype(np.int64))
        systems = batch.systems
        numbers = torch.from_numpy(columns)[systems.atomic_numbers]
        atomic = table[systems.level_idx[systems.system_idx], numbers]
        energy = torch.zeros(systems.n_systems, dtype=torch.float64).index_add(0, systems.system_idx, atomic)
        guess = Prediction(
            energy=energy,
            forces=torch.zeros_like(batch.targets.forces),
            stress=torch.zeros_like(batch.targets.stress),
        )
        tally.add(residuals(guess, batch.targets, systems), systems)
    return tally


def costliest_batch(width: int) -> int:
    """Edges and atoms of a batch that is evaluated with a model of this width."""
    return min(_COSTLIEST_BATCH, max(1, _MOST_NUMBERS // width))


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationBatch:
    """Rows that one rank computes together; not counted where they only keep the rank in step."""

    rows: NDArray[np.int64]
    counts: bool


def evaluation_batches(
    costs: NDArray[np.int64], world: World, costliest: int = _COSTLIEST_BATCH
) -> list[EvaluationBatch]:
    """This rank's share of all rows, in batches of bounded cost; equally many on every rank."""
    if not len(costs):
        return []
    parts = divide(costs, world.size)
    plans = [_cut(part, costs, costliest) for part in parts]
    longest = max(len(plan) for plan in plans)
    mine = [EvaluationBatch(rows, counts=True) for rows in plans[world.rank]]
    cheapest = np.array([int(costs.argmin())])
    return mine + [EvaluationBatch(cheapest, counts=False)] * (longest - len(mine))


def _cut(part: NDArray[np.int64], costs: NDArray[np.int64], costliest: int) -> list[NDArray[np.int64]]:
    batches: list[list[int]] = []
    room = 0
    for row in part:
        cost = int(costs[row])
        if cost > room or not batches:
            batches.append([])
            room = costliest
        batches[-1].append(int(row))
        room -= cost
    return [np.array(rows, dtype=np.int64) for rows in batches]
