"""Reference energies per element and level of theory, and the scale of the rest."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from equipot.model.references import References
from equipot.train.errors import DataError
from equipot.train.store import N_ELEMENTS, Store

RIDGE = 1e-9
"""Relative to each element's weight: bends a well-determined energy by 1e-9 of its distance from the mean."""
_BLOCK = 65536


def fit_references(
    stores: Sequence[Store],
    train_indices: NDArray[np.int64],
    elements: Sequence[int],
    levels: Sequence[str],
) -> References:
    """Ridge least squares of total energies on element counts, one fit per level of theory.

    The ridge draws towards the mean energy per atom, so a set that does not determine every element (one
    composition, say) still gets finite values, and an element a level never saw gets that mean.

    Args:
        stores: what the indices refer to; each is of one level of theory.
        train_indices: (k, 2) store and structure index; nothing else is looked at.
        elements: atomic numbers of the columns.
        levels: levels of theory of the rows.

    Returns:
        energy (n_levels, n_elements) in eV per atom; scale (n_levels,) in eV: RMS of the force components
        (per Å), or without forces the standard deviation of the energy per atom that the references leave.

    Raises:
        DataError: a level without training structures with an energy, or an element that is not listed.
    """
    energy = np.zeros((len(levels), len(elements)))
    scale = np.ones(len(levels))
    for row, level in enumerate(levels):
        of_level = [
            (store, train_indices[train_indices[:, 0] == k, 1])
            for k, store in enumerate(stores)
            if store.manifest.level_of_theory == level
        ]
        energy[row], spread = _fit(of_level, elements, level)
        rms = _rms_force(of_level)
        scale[row] = rms or spread or 1.0
    return References(energy=energy, scale=scale)


_Part = tuple[Store, NDArray[np.int64]]


def _blocks(parts: Sequence[_Part], elements: Sequence[int]) -> list[tuple[Store, NDArray[np.int64]]]:
    known = set(elements)
    blocks = []
    for store, indices in parts:
        missing = set(store.manifest.atomic_numbers) - known
        with_energy = indices[np.isfinite(store.energies[indices])]
        for at in range(0, len(with_energy), _BLOCK):
            block = with_energy[at : at + _BLOCK]
            if missing and store.element_counts(block)[:, sorted(missing)].any():
                raise DataError(
                    f"{store.path}: holds atomic numbers {sorted(missing)}, the model lists {sorted(known)}"
                )
            blocks.append((store, block))
    return blocks


def _fit(parts: Sequence[_Part], elements: Sequence[int], level: str) -> tuple[NDArray[np.float64], float]:
    """Energies per element, and the standard deviation per atom of what they leave."""
    blocks = _blocks(parts, elements)
    columns = np.asarray(elements, dtype=np.int64)
    if not blocks or columns.max(initial=0) >= N_ELEMENTS:
        raise DataError(f"level of theory {level!r}: no structure with an energy in the training split")
    n_atoms = sum(float(store.n_atoms[block].sum()) for store, block in blocks)
    mean = sum(float(store.energies[block].sum()) for store, block in blocks) / n_atoms

    normal = np.zeros((len(columns), len(columns)))
    right = np.zeros(len(columns))
    for store, block in blocks:
        counts = store.element_counts(block)[:, columns]
        normal += counts.T @ counts
        right += counts.T @ (store.energies[block] - mean * store.n_atoms[block])
    # columns scaled to one: a rare element is bent no more than a common one
    weight = np.sqrt(np.where(normal.diagonal() > 0, normal.diagonal(), 1.0))
    values, vectors = np.linalg.eigh(normal / np.outer(weight, weight))
    energies = mean + (vectors @ ((vectors.T @ (right / weight)) / (np.maximum(values, 0) + RIDGE))) / weight

    left = np.concatenate(
        [
            (store.energies[block] - store.element_counts(block)[:, columns] @ energies)
            / store.n_atoms[block]
            for store, block in blocks
        ]
    )
    return energies, float(left.std())


def _rms_force(parts: Sequence[_Part]) -> float:
    """RMS of all force components in eV/Å that are there; 0 if none is."""
    square, count = 0.0, 0
    for store, indices in parts:
        for forces in store.force_blocks(indices):
            there = forces[np.isfinite(forces)]
            square += float(np.square(there).sum())
            count += there.size
    return float(np.sqrt(square / count)) if count else 0.0
