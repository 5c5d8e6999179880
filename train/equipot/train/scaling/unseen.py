"""A potential on a source that it was not trained on: what of it can be computed, against which energies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.train.chemistry import Chemistry, supported_of_store
from equipot.train.dataset import Dataset
from equipot.train.inherit import SAMPLE, network_sums
from equipot.train.places import Places, Segment
from equipot.train.reference_fit import NormalEquations
from equipot.train.store import Store

Restore = Callable[[References], Potential]
"""The potential with other reference energies."""


@dataclass(frozen=True, slots=True, eq=False)
class Unseen:
    """What of a store is evaluated, and how.

    A source of another level of theory has total energies of its own. They are compared after a shift by
    element, fitted (ridge least squares) to some of its structures, which are then not evaluated; its
    references, for the baseline, are fitted to the labels of the same structures. Output and force scale are
    those of the trained level of theory whose reference energies are nearest.
    """

    config: ModelConfig
    """The model's, in which the source's level of theory has taken the place of the nearest."""
    potential: Potential
    references: References
    """For the baseline."""
    places: Places
    structures: int
    """Of the store."""
    unsupported: int
    """Structures with elements, charges or spins that the model does not know."""
    level_used: str
    shifted_by: int
    """Structures that the shift was fitted to; 0: the level of theory is one of the model's own."""

    def to_json(self) -> dict[str, object]:
        """What was left out, and what energies were compared with."""
        return {
            "structures_in_store": self.structures,
            "unsupported": self.unsupported,
            "level_of_theory_used": self.level_used,
            "energies_shifted_by": self.shifted_by,
        }


def prepare_unseen(
    store: Store, config: ModelConfig, references: References, restore: Restore, most: int
) -> Unseen | None:
    """Settle what of a store can be evaluated; None if nothing.

    Args:
        store: of one source.
        config: of the model.
        references: of the model.
        restore: makes the model with other references.
        most: structures to evaluate at most, evenly spaced among those that can be.
    """
    known = Chemistry(config.elements, config.charges, config.spin_multiplicities)
    everything = np.arange(len(store))
    fine = everything[supported_of_store(known, store, everything)]
    level = store.manifest.level_of_theory
    native = level in config.levels_of_theory
    fitted, kept = np.empty(0, np.int64), fine
    if not native:
        fitted, kept = _halves(fine, store.groups)
        fitted = fitted[_spaced(len(fitted), SAMPLE)]
    kept = kept[_spaced(len(kept), most)]
    if not len(kept) or not (native or len(fitted)):
        return None
    if native:
        row, own, potential = config.levels_of_theory.index(level), references, restore(references)
    else:
        labels = NormalEquations()
        labels.add(store.element_counts(fitted), store.values("energy", fitted))
        energies = labels.solve(np.array(config.elements))
        row = int(_distances(energies, labels.elements, references, config).argmin())
        own = _with_row(references, row, energies)
        config = _renamed(config, row, level)
        bare = restore(replace(references, energy=np.zeros_like(references.energy))).eval()
        sums = network_sums(bare, Dataset([store], config), Places([Segment(0, fitted)]))
        potential = restore(_with_row(own, row, energies - sums.solve(np.array(config.elements))))
    return Unseen(
        config=config,
        potential=potential,
        references=own,
        places=Places([Segment(0, kept)]),
        structures=len(store),
        unsupported=len(everything) - len(fine),
        level_used=potential.config.levels_of_theory[row],
        shifted_by=len(fitted),
    )


def _halves(
    indices: NDArray[np.int64], groups: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every second group; of a source that is one group, every second structure."""
    _, number = np.unique(groups[indices], return_inverse=True)
    if len(number) and number.max() == 0:
        number = np.arange(len(indices))
    return indices[number % 2 == 1], indices[number % 2 == 0]


def _spaced(count: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


def _distances(
    energies: NDArray[np.float64], present: NDArray[np.int64], references: References, config: ModelConfig
) -> NDArray[np.float64]:
    columns = np.isin(config.elements, present)
    distances: NDArray[np.float64] = np.square(references.energy[:, columns] - energies[columns]).sum(axis=1)
    return distances


def _with_row(references: References, row: int, energies: NDArray[np.float64]) -> References:
    table = references.energy.copy()
    table[row] = energies
    return References(energy=table, scale=references.scale)


def _renamed(config: ModelConfig, row: int, level: str) -> ModelConfig:
    names = list(config.levels_of_theory)
    names[row] = level
    return replace(config, levels_of_theory=tuple(names))
