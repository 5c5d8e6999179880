"""Force errors by element, force cosine and a sample for parity plots, taken while an evaluation goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from numpy.typing import NDArray
from torch.nn import functional

from equipot.model.potential import Prediction
from equipot.train.dataset import Batch
from equipot.train.store import N_ELEMENTS

LEAST_FORCE = 1e-3
"""eV/Å: a label below it has no direction that its calculation would vouch for, and no part in a cosine."""

_ABSOLUTE, _LABEL, _ATOMS, _COSINE, _WITH_COSINE = range(5)


@dataclass(frozen=True, slots=True, eq=False)
class Parity:
    """Some labels and what was predicted of them, for a plot."""

    energy: NDArray[np.float64]
    """(n, 2) eV/atom, label and prediction, less the reference energies"""
    forces: NDArray[np.float64]
    """(m, 2) eV/Å, label and prediction of force components"""


class Details:
    """Sums over the atoms of the batches that it observes; the forces' cosine is a mean over atoms.

    The cosine of an atom is F·F̂ / |F||F̂|; where the label is shorter than `LEAST_FORCE` there is none, and
    where the prediction is zero it is 0.
    """

    def __init__(self) -> None:
        self._sums = np.zeros((5, N_ELEMENTS))

    def __call__(self, batch: Batch, prediction: Prediction) -> None:
        """Take in one batch."""
        if prediction.forces is None:
            return
        labels, forces = batch.targets.forces.double(), prediction.forces.double()
        there = torch.isfinite(labels).all(-1)
        labels, forces = labels[there], forces[there]
        numbers = batch.systems.atomic_numbers[there].cpu().numpy()
        cosine = functional.cosine_similarity(labels, forces, dim=-1, eps=1e-12)
        directed = labels.norm(dim=-1) >= LEAST_FORCE
        columns = (
            (forces - labels).abs().sum(-1),
            labels.abs().sum(-1),
            torch.ones_like(cosine),
            torch.where(directed, cosine, 0),
            directed.double(),
        )
        for row, values in enumerate(columns):
            self._sums[row] += np.bincount(numbers, values.cpu().numpy(), minlength=N_ELEMENTS)

    def include(self, other: Details) -> None:
        """Add another's sums."""
        self._sums += other._sums

    @property
    def force_cosine(self) -> float | None:
        """Mean over the atoms whose label has a direction."""
        return _ratio(self._sums[_COSINE].sum(), self._sums[_WITH_COSINE].sum())

    @property
    def without_direction(self) -> int:
        """Atoms with a label too short for a cosine."""
        return int((self._sums[_ATOMS] - self._sums[_WITH_COSINE]).sum())

    def by_element(self) -> dict[str, dict[str, Any]]:
        """Errors in eV/Å per component, of the prediction and of zero, of each element with labels."""
        found = {}
        for z in np.flatnonzero(self._sums[_ATOMS]).tolist():
            absolute, label, atoms, cosine, directed = self._sums[:, z]
            found[chemical_symbols[z]] = {
                "force_mae": _ratio(absolute, 3 * atoms),
                "zero_forces_mae": _ratio(label, 3 * atoms),
                "force_cosine": _ratio(cosine, directed),
                "n_atoms": int(atoms),
            }
        return found


class ParitySample:
    """A uniform sample of the structures and force components that it observes, within a bound, by seed."""

    def __init__(self, most: int, references: NDArray[np.float64], elements: tuple[int, ...]) -> None:
        """Args:
        most: structures, and force components, to keep.
        references: (n_levels, n_elements) eV per atom, taken off energies.
        elements: atomic numbers of the columns.
        """
        self._most = most
        self._random = np.random.default_rng(0)
        self._table = np.zeros((len(references), N_ELEMENTS))
        self._table[:, list(elements)] = references
        # the first column is a random key: those of the smallest keys are a uniform sample
        self._energy, self._forces = np.empty((0, 3)), np.empty((0, 3))

    def __call__(self, batch: Batch, prediction: Prediction) -> None:
        """Take in one batch."""
        systems = batch.systems
        owner = systems.system_idx.cpu().numpy()
        levels, numbers = systems.level_idx.cpu().numpy()[owner], systems.atomic_numbers.cpu().numpy()
        size = np.bincount(owner, minlength=systems.n_systems)
        known = np.bincount(owner, self._table[levels, numbers], minlength=systems.n_systems)
        pairs = [
            (tensor.cpu().numpy() - known) / size for tensor in (batch.targets.energy, prediction.energy)
        ]
        self._energy = self._keep(self._energy, *pairs)
        if prediction.forces is not None:
            forces = [tensor.cpu().numpy().ravel() for tensor in (batch.targets.forces, prediction.forces)]
            self._forces = self._keep(self._forces, *forces)

    def sample(self) -> Parity:
        """What is kept."""
        return Parity(self._energy[:, 1:], self._forces[:, 1:])

    def _keep(
        self, kept: NDArray[np.float64], labels: NDArray[Any], predicted: NDArray[Any]
    ) -> NDArray[np.float64]:
        rows = np.stack([self._random.random(len(labels)), labels, predicted], axis=1)
        rows = np.concatenate([kept, rows[np.isfinite(rows).all(axis=1)]])
        return rows[np.argsort(rows[:, 0])[: self._most]]


def _ratio(total: float, count: float) -> float | None:
    return float(total / count) if count else None
