"""One pass over training structures: what they hold, their reference energies and scale. Bounded memory."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from equipot.model.references import References
from equipot.train.chemistry import Chemistry
from equipot.train.errors import DataError
from equipot.train.reference_fit import NormalEquations
from equipot.train.store import N_ELEMENTS, Store


class Survey:
    """What training structures hold, and the sums of each level of theory."""

    def __init__(self) -> None:
        self.atoms_of_element = np.zeros(N_ELEMENTS, dtype=np.int64)
        self._charges: set[int] = set()
        self._spins: set[int] = set()
        self._levels: dict[str, NormalEquations] = {}

    def add(
        self, store: Store, indices: NDArray[np.int64], with_forces: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Takes structures of a store into account.

        Args:
            store: of one level of theory.
            indices: of structures.
            with_forces: those of them whose forces count for the scale.

        Returns:
            (119,) how many atoms of each atomic number they have.
        """
        level = self._levels.setdefault(store.manifest.level_of_theory, NormalEquations())
        counts = store.element_counts(indices)
        level.add(counts, store.values("energy", indices))
        for forces in store.force_blocks(with_forces):
            level.add_forces(forces)
        self._charges.update(np.unique(store.values("charge", indices)).tolist())
        self._spins.update(np.unique(store.values("spin_multiplicity", indices)).tolist())
        atoms: NDArray[np.int64] = counts.sum(axis=0).astype(np.int64)
        self.atoms_of_element += atoms
        return atoms

    @property
    def chemistry(self) -> Chemistry:
        """What occurred."""
        elements = tuple(np.flatnonzero(self.atoms_of_element).tolist())
        return Chemistry(elements, tuple(sorted(self._charges)), tuple(sorted(self._spins)))

    def references(
        self, levels: Sequence[str], again: Iterable[tuple[Store, NDArray[np.int64]]] = ()
    ) -> References:
        """Reference energies per level of theory and element that occurred, and the scale of the rest.

        Args:
            levels: levels of theory of the rows.
            again: the structures once more, in parts, for levels without forces; looked at only if needed.

        Returns:
            energy (n_levels, n_elements) in eV per atom, an element that a level lacks at the level's mean;
            scale (n_levels,) in eV: RMS of the force components (per Å), or without forces the standard
            deviation of the energy per atom that the references leave.

        Raises:
            DataError: a level without structures that have an energy.
        """
        elements = np.flatnonzero(self.atoms_of_element)
        energy = np.zeros((len(levels), len(elements)))
        for row, level in enumerate(levels):
            sums = self._levels.get(level)
            if sums is None or not sums.structures:
                raise DataError(
                    f"level of theory {level!r}: no structure with an energy in the training split"
                )
            energy[row] = sums.solve(elements)
        scale = np.array([self._levels[level].force_scale for level in levels])
        if not scale.all():
            lacking = {level for level, known in zip(levels, scale, strict=True) if not known}
            parts = (part for part in again if part[0].manifest.level_of_theory in lacking)
            spreads = _spreads(levels, elements, energy, parts)
            scale = np.where(scale > 0, scale, spreads)
        return References(energy=energy, scale=np.where(scale > 0, scale, 1.0))


def _spreads(
    levels: Sequence[str],
    elements: NDArray[np.int64],
    energy: NDArray[np.float64],
    parts: Iterable[tuple[Store, NDArray[np.int64]]],
) -> NDArray[np.float64]:
    """(n_levels,) standard deviation in eV per atom of what the references leave."""
    sums = np.zeros((len(levels), 3))
    for store, indices in parts:
        row = list(levels).index(store.manifest.level_of_theory)
        counts = store.element_counts(indices)[:, elements]
        left = (store.values("energy", indices) - counts @ energy[row]) / counts.sum(axis=1)
        left = left[np.isfinite(left)]
        sums[row] += (len(left), left.sum(), np.square(left).sum())
    count = np.maximum(sums[:, 0], 1)
    variance = sums[:, 2] / count - np.square(sums[:, 1] / count)
    spread: NDArray[np.float64] = np.sqrt(np.maximum(variance, 0))
    return spread
