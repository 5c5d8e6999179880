"""Which elements, charges and spins structures hold, and whether a model of these knows others."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipot.train.manifest import Manifest
from equipot.train.store import N_ELEMENTS, Store


@dataclass(frozen=True, slots=True)
class Chemistry:
    """What occurs in some structures, each ascending."""

    elements: tuple[int, ...]
    charges: tuple[int, ...]
    spin_multiplicities: tuple[int, ...]

    def covers(self, manifest: Manifest) -> bool:
        """Whether a store holds nothing else, as far as its manifest tells."""
        return (
            set(manifest.atomic_numbers) <= set(self.elements)
            and {int(charge) for charge in manifest.charges} <= set(self.charges)
            and {int(spin) for spin in manifest.spin_multiplicities} <= set(self.spin_multiplicities)
        )


def supported(
    known: Chemistry,
    counts: NDArray[np.float64],
    charges: NDArray[np.integer],
    spins: NDArray[np.integer],
) -> NDArray[np.bool_]:
    """(n,) which structures hold only what a model of that chemistry knows.

    Args:
        known: of the model.
        counts: (n, 119) atoms of each atomic number.
        charges: (n,).
        spins: (n,) multiplicities; 0, not stated, is fine if the model knows one alone.
    """
    strange = np.setdiff1d(np.arange(N_ELEMENTS), known.elements)
    unstated_is_fine = (spins == 0) & (len(known.spin_multiplicities) == 1)
    plain: NDArray[np.bool_] = np.isin(charges, known.charges) & ~np.asarray(counts[:, strange]).any(axis=1)
    plain &= np.isin(spins, known.spin_multiplicities) | unstated_is_fine
    return plain


def supported_of_store(known: Chemistry, store: Store, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The same for structures of a store."""
    charges, spins = (store.values(name, indices) for name in ("charge", "spin_multiplicity"))
    return supported(known, store.element_counts(indices), charges, spins)
