"""What does not change when a structure is moved, turned, mirrored, renumbered or repeated.

Each atom is described by its sorted distances to the nearest atoms of every element: the pointwise distance
distribution of Widdowson and Kurlin (NeurIPS 2022), cut off, and resolved by elements. Distances that change
by δ change no number here by more than δ, which is why structures can be compared to a tolerance.
"""

from dataclasses import dataclass

import numpy as np
from ase.data import covalent_radii
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from equipot.model.batch import System
from equipot.model.neighbors import neighbor_list

CUTOFF = 6.0
"""Å. What is farther away counts as this far; in isolated structures of few atoms nothing is cut off."""
FEATURES = 16
_WHOLE = 64  # atoms up to which an isolated structure is described by all its distances
_STEEPNESS = 8
_NEIGHBORS = 64  # of an atom, over all elements


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """One structure, described.

    Attributes:
        elements: (n_elements,) atomic numbers, sorted. proportions: (n_elements,) smallest whole numbers.
        numbers: (n,) atomic number of each row.
        rows: (n, n_elements × k) sorted distances in Å of each atom to the k nearest of each element.
        features: (16,) averages over atoms; they move by no more than a distance does.
        nearest: {(z, z'): Å} of the pairs that are within the cutoff.
        closest: smallest distance over sum of covalent radii, NaN without neighbours. closest_pair: whose.
        repulsion: (n, 3) which way the closest neighbours would push each atom, in no unit.
        symmetric: no atom can feel a force, by the symmetry of its surroundings.
    """

    elements: NDArray[np.int64]
    proportions: NDArray[np.int64]
    numbers: NDArray[np.int64]
    rows: NDArray[np.float64]
    features: NDArray[np.float64]
    nearest: dict[tuple[int, int], float]
    closest: float
    closest_pair: tuple[int, int]
    repulsion: NDArray[np.float64]
    symmetric: bool


def describe(system: System) -> Geometry:
    """Distances, and what is made of them."""
    numbers = system.atomic_numbers
    elements, column, count = np.unique(numbers, return_inverse=True, return_counts=True)
    isolated = not system.pbc.any() and len(numbers) <= _WHOLE
    senders, receivers, vectors = _edges(system, isolated)
    lengths = np.linalg.norm(vectors, axis=1)
    rows = _rows(len(numbers), column[senders], receivers, lengths, len(elements))
    nearest, closest, pair = _nearest(numbers, senders, receivers, lengths)
    return Geometry(
        elements=elements,
        proportions=count // np.gcd.reduce(count),
        numbers=numbers,
        rows=rows,
        features=_features(rows, column, len(elements)),
        nearest=nearest,
        closest=closest,
        closest_pair=pair,
        repulsion=_repulsion(numbers, senders, receivers, vectors, lengths),
        symmetric=_symmetric(numbers, senders, receivers, vectors, lengths),
    )


def difference(one: Geometry, two: Geometry) -> float:
    """Largest difference of a distance in Å between two structures of the same proportions.

    Each atom is compared with the atom of the other structure that it resembles most, both ways.
    """
    worst = 0.0
    for z in one.elements.tolist():
        between = cdist(one.rows[one.numbers == z], two.rows[two.numbers == z], "chebyshev")
        worst = max(worst, float(between.min(axis=0).max()), float(between.min(axis=1).max()))
    return worst


def _edges(
    system: System, isolated: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    if isolated:
        n = system.n_atoms
        receivers, senders = np.nonzero(~np.eye(n, dtype=bool))
        return senders, receivers, system.positions[senders] - system.positions[receivers]
    senders, receivers, shifts = neighbor_list(system.positions, system.cell, system.pbc, CUTOFF)
    vectors = system.positions[senders] + shifts @ system.cell - system.positions[receivers]
    return senders, receivers, vectors


def _rows(
    n: int,
    kind: NDArray[np.int64],
    receivers: NDArray[np.int64],
    lengths: NDArray[np.float64],
    n_elements: int,
) -> NDArray[np.float64]:
    width = max(_NEIGHBORS // n_elements, 4)
    rows = np.full((n * n_elements, width), CUTOFF)
    slot = receivers * n_elements + kind
    order = np.lexsort((lengths, slot))
    slot = slot[order]
    first = np.searchsorted(slot, np.arange(n * n_elements))
    rank = np.arange(len(slot)) - first[slot]
    near = rank < width
    rows[slot[near], rank[near]] = lengths[order][near]
    return rows.reshape(n, n_elements * width)


def _features(rows: NDArray[np.float64], column: NDArray[np.int64], n_elements: int) -> NDArray[np.float64]:
    means = np.zeros((n_elements, rows.shape[1]))
    np.add.at(means, column, rows)
    means /= np.bincount(column, minlength=n_elements)[:, None]
    weights = np.random.default_rng(means.size).normal(size=(means.size, FEATURES))
    return np.asarray(means.ravel() @ (weights / np.abs(weights).sum(axis=0)))


def _nearest(
    numbers: NDArray[np.int64],
    senders: NDArray[np.int64],
    receivers: NDArray[np.int64],
    lengths: NDArray[np.float64],
) -> tuple[dict[tuple[int, int], float], float, tuple[int, int]]:
    if not len(lengths):
        return {}, np.nan, (0, 0)
    a, b = numbers[senders], numbers[receivers]
    low, high = np.minimum(a, b), np.maximum(a, b)
    key = low * 128 + high
    order = np.lexsort((lengths, key))
    pairs, first = np.unique(key[order], return_index=True)
    nearest = {
        (int(pair // 128), int(pair % 128)): float(lengths[order[at]])
        for pair, at in zip(pairs, first, strict=True)
    }
    ratios = lengths / (covalent_radii[low] + covalent_radii[high])
    k = int(ratios.argmin())
    return nearest, float(ratios[k]), (int(low[k]), int(high[k]))


def _repulsion(
    numbers: NDArray[np.int64],
    senders: NDArray[np.int64],
    receivers: NDArray[np.int64],
    vectors: NDArray[np.float64],
    lengths: NDArray[np.float64],
) -> NDArray[np.float64]:
    near = (lengths < CUTOFF) & (lengths > 0)
    a, b, r = senders[near], receivers[near], lengths[near]
    steep = ((covalent_radii[numbers[a]] + covalent_radii[numbers[b]]) / r) ** _STEEPNESS
    pushes = np.zeros((len(numbers), 3))
    np.add.at(pushes, b, -(steep / r)[:, None] * vectors[near])
    return pushes


def _symmetric(
    numbers: NDArray[np.int64],
    senders: NDArray[np.int64],
    receivers: NDArray[np.int64],
    vectors: NDArray[np.float64],
    lengths: NDArray[np.float64],
) -> bool:
    near = (lengths < CUTOFF) & (lengths > 0)
    weight = numbers[senders] * np.square(np.maximum(1 - lengths / CUTOFF, 0)) * np.exp(-lengths)
    pulls = np.zeros((len(numbers), 3))
    total = np.zeros(len(numbers))
    np.add.at(pulls, receivers[near], (weight[near] / lengths[near])[:, None] * vectors[near])
    np.add.at(total, receivers[near], weight[near])
    return bool((np.linalg.norm(pulls, axis=1) <= 2e-3 * total).all())
