"""Reference energies per level of theory from sums that grow with the elements, not with the data."""

import numpy as np
from numpy.typing import NDArray

from equipot.train.reference_fit import RIDGE
from equipot.train.store import N_ELEMENTS


class ReferenceSums:
    """Normal equations of total energies on element counts, structure by structure."""

    def __init__(self) -> None:
        self._normal = np.zeros((N_ELEMENTS, N_ELEMENTS))
        self._right = np.zeros(N_ELEMENTS)
        self._energy = self._atoms = 0.0

    def add(self, counts: NDArray[np.float64], energies: NDArray[np.float64]) -> None:
        """Takes structures in: counts (n, 119), total energies (n,) in eV; NaN is left out."""
        there = np.isfinite(energies)
        counts, energies = counts[there], energies[there]
        present = np.flatnonzero(counts.any(axis=0))
        few = counts[:, present]
        self._normal[np.ix_(present, present)] += few.T @ few
        self._right[present] += few.T @ energies
        self._energy += float(energies.sum())
        self._atoms += float(counts.sum())

    def solve(self) -> NDArray[np.float64]:
        """(119,) eV per atom, drawn by a ridge to the mean energy per atom as in training's references."""
        if not self._atoms:
            return np.zeros(N_ELEMENTS)
        mean = self._energy / self._atoms
        weight = np.sqrt(np.where(self._normal.diagonal() > 0, self._normal.diagonal(), 1.0))
        values, vectors = np.linalg.eigh(self._normal / np.outer(weight, weight))
        right = (self._right - mean * self._normal.sum(axis=1)) / weight
        return np.asarray(mean + (vectors @ ((vectors.T @ right) / (np.maximum(values, 0) + RIDGE))) / weight)
