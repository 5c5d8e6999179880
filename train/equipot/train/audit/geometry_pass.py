"""Distances and descriptions of sampled structures of one store: the part of an audit that costs."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from equipot.train.audit.duplicates import Sample, SplitOf
from equipot.train.audit.geometry import describe
from equipot.train.audit.sketch import Extremes, Sketch
from equipot.train.store import N_ELEMENTS, Store

_EXAMPLES = 20


@dataclass(slots=True)
class Unlabelled:
    """Structures with all-zero forces although nothing forbids forces: how many, the first few."""

    count: int = 0
    first: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class GeometryStatistics:
    """Over the structures of one store that were looked at one by one.

    Attributes:
        examined: how many.
        nearest: (z, z') → nearest distance of that pair in each structure, Å, where within 6 Å.
        closest: nearest distance over the sum of covalent radii, noble gases apart. closest_few: smallest.
        outward: cosine between all forces of a structure and the repulsion of its close neighbours.
        zero_unsymmetric: all-zero forces that are not so by symmetry.
        counts, energy, periodic: (k, 119), (k,) eV, (k,) of at most 3,000 of them.
    """

    examined: int = 0
    nearest: dict[tuple[int, int], Sketch] = field(default_factory=dict)
    closest: Sketch = field(default_factory=Sketch)
    closest_few: Extremes = field(default_factory=Extremes)
    outward: Sketch = field(default_factory=Sketch)
    zero_unsymmetric: Unlabelled = field(default_factory=Unlabelled)
    counts: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, N_ELEMENTS)))
    energy: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    periodic: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))


_NOBLE = (2, 10, 18, 36, 54, 86)
_COLUMNS = 3000


def examine(
    store: Store,
    number: int,
    own: NDArray[np.int64],
    shared: NDArray[np.int64],
    groups: dict[int, int],
    split_of: SplitOf,
    sample: Sample,
    check: Callable[[], None],
) -> GeometryStatistics:
    """Describes structures one by one.

    Args:
        store: the store; `number` is its place among those audited.
        own: sorted indices whose distances speak for the store.
        shared: sorted indices that are looked at for near copies; they enter `sample`.
        groups: index → group, of those in `shared`.
        split_of: split of each.
        sample: what `shared` is put into.
        check: called after each structure.
    """
    found = GeometryStatistics()
    counts: list[NDArray[np.int64]] = []
    energies: list[float] = []
    periodic: list[bool] = []
    speaks = set(own.tolist())
    splits = dict(zip(shared.tolist(), split_of(number, shared).tolist(), strict=True))
    for index in np.union1d(own, shared).tolist():
        check()
        system, labels = store.system(index), store.labels(index)
        geometry = describe(system)
        if index in splits:
            sample.add((number, index), geometry, system.charge, groups[index], splits[index])
        if index not in speaks:
            continue
        found.examined += 1
        for pair, distance in geometry.nearest.items():
            found.nearest.setdefault(pair, Sketch()).add(np.array([distance]))
        if not set(geometry.closest_pair) & set(_NOBLE):
            found.closest.add(np.array([geometry.closest]))
            found.closest_few.add(np.array([-geometry.closest]), np.array([index]))
        if system.n_atoms > 1 and not geometry.symmetric:
            with np.errstate(invalid="ignore"):
                sizes = np.linalg.norm(labels.forces) * np.linalg.norm(geometry.repulsion)
                found.outward.add(np.array([np.vdot(labels.forces, geometry.repulsion) / sizes]))
        zero = system.n_atoms > 1 and np.isfinite(labels.forces).all() and not labels.forces.any()
        if zero and not geometry.symmetric:
            found.zero_unsymmetric.count += 1
            if len(found.zero_unsymmetric.first) < _EXAMPLES:
                found.zero_unsymmetric.first.append(index)
        if np.isfinite(labels.energy) and len(energies) < _COLUMNS:
            counts.append(np.bincount(system.atomic_numbers, minlength=N_ELEMENTS))
            energies.append(labels.energy)
            periodic.append(bool(system.pbc.any()))
    if energies:
        found.counts = np.array(counts, dtype=np.float64)
        found.energy, found.periodic = np.array(energies), np.array(periodic)
    return found
