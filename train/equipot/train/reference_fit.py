"""Reference energies per element of one level of theory, and the scale of the rest, from sums alone.

The sums are those of the normal equations: 119 × 119 numbers, whatever the number of structures, so one pass
over the data is enough.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from equipot.train.store import N_ELEMENTS

RIDGE = 1e-9
"""Relative to each element's weight: bends a well-determined energy by 1e-9 of its distance from the mean."""


@dataclass(slots=True, eq=False)
class NormalEquations:
    """Sums over structures of one level of theory with an energy; `add` brings more, in any order.

    Attributes:
        structures: how many were added.
        normal: (119, 119) Σ cᵀc over the structures' counts of elements c.
        right: (119,) Σ c·E in eV.
        energy: Σ E in eV.
        atoms: of all of them.
        force_square, force_count: Σ F² in (eV/Å)², and number of force components.
    """

    structures: int = 0
    normal: NDArray[np.float64] = field(default_factory=lambda: np.zeros((N_ELEMENTS, N_ELEMENTS)))
    right: NDArray[np.float64] = field(default_factory=lambda: np.zeros(N_ELEMENTS))
    energy: float = 0.0
    atoms: int = 0
    force_square: float = 0.0
    force_count: int = 0

    def add(self, counts: NDArray[np.float64], energies: NDArray[np.float64]) -> None:
        """Adds structures: (n, 119) atoms of each atomic number, (n,) total energies in eV, NaN if absent."""
        there = np.isfinite(energies)
        if not there.all():
            counts, energies = counts[there], energies[there]
        present = np.flatnonzero(counts.any(axis=0))
        inner = counts[:, present]
        self.normal[np.ix_(present, present)] += inner.T @ inner
        self.right[present] += inner.T @ energies
        self.energy += float(energies.sum())
        self.atoms += int(inner.sum())
        self.structures += len(energies)

    def add_forces(self, forces: NDArray[np.float64]) -> None:
        """Adds force components in eV/Å to the scale; NaN where absent."""
        there = forces[np.isfinite(forces)]
        self.force_square += float(np.square(there).sum())
        self.force_count += there.size

    @property
    def elements(self) -> NDArray[np.int64]:
        """Atomic numbers that occur, ascending."""
        return np.flatnonzero(self.normal.diagonal())

    def solve(self, elements: NDArray[np.int64]) -> NDArray[np.float64]:
        """(len(elements),) energies in eV per atom: ridge least squares of total energies on element counts.

        The ridge draws towards the mean energy per atom, so a set that does not determine every element (one
        composition, say) still gets finite values of ordinary size, and an element it lacks gets that mean.

        Args:
            elements: atomic numbers of the result; every one that occurs is among them.
        """
        normal = self.normal[np.ix_(elements, elements)]
        mean = self.energy / self.atoms if self.atoms else 0.0
        right = self.right[elements] - mean * normal.sum(axis=1)
        # columns scaled to one: a rare element is bent no more than a common one
        weight = np.sqrt(np.where(normal.diagonal() > 0, normal.diagonal(), 1.0))
        values, vectors = np.linalg.eigh(normal / np.outer(weight, weight))
        scaled = (vectors.T @ (right / weight)) / (np.maximum(values, 0) + RIDGE)
        energies: NDArray[np.float64] = mean + (vectors @ scaled) / weight
        return energies

    @property
    def force_scale(self) -> float:
        """RMS of the force components in eV/Å; 0 if there is none."""
        return float(np.sqrt(self.force_square / self.force_count)) if self.force_count else 0.0
