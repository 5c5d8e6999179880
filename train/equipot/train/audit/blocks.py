"""A store in blocks of bounded size, and samples of it that bring together what belongs together."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from equipot.train.store import N_ELEMENTS, Store

_ROWS = ("energy", "cell", "pbc", "stress", "charge", "spin_multiplicity", "group")
_ATOMS = ("atomic_numbers", "positions", "forces")


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive structures of one store.

    Attributes:
        first: index in the store of the first of them.
        starts: (n,) first atom of each in the arrays of atoms.
        n_atoms: (n,) atoms of each.
        energy, cell, pbc, stress, charge, spin_multiplicity, group: (n, …) as in the store.
        atomic_numbers, positions, forces: (atoms, …) as in the store.
    """

    first: int
    starts: NDArray[np.int64]
    n_atoms: NDArray[np.int64]
    energy: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    stress: NDArray[np.float64]
    charge: NDArray[np.int64]
    spin_multiplicity: NDArray[np.int64]
    group: NDArray[np.int64]
    atomic_numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    forces: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.n_atoms)

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """(n,) indices in the store."""
        return self.first + np.arange(len(self))

    @cached_property
    def owner(self) -> NDArray[np.int64]:
        """(atoms,) which structure of the block each atom is of."""
        return np.repeat(np.arange(len(self)), self.n_atoms)

    @cached_property
    def counts(self) -> NDArray[np.float64]:
        """(n, 119) atoms of each element."""
        flat = np.bincount(self.owner * N_ELEMENTS + self.atomic_numbers, minlength=len(self) * N_ELEMENTS)
        return flat.reshape(len(self), N_ELEMENTS).astype(np.float64)

    @cached_property
    def volume(self) -> NDArray[np.float64]:
        """(n,) Å³ of the cell, NaN unless it is periodic in all three directions."""
        volume = np.abs(np.linalg.det(self.cell))
        return np.where(self.pbc.all(axis=1) & (volume > 0), volume, np.nan)

    def sums(self, per_atom: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, …) sums over the atoms of each structure."""
        return np.asarray(np.add.reduceat(per_atom, self.starts, axis=0))

    def largest(self, per_atom: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, …) maxima over the atoms of each structure."""
        return np.asarray(np.maximum.reduceat(per_atom, self.starts, axis=0))


def read_blocks(store: Store) -> Iterator[Block]:
    """The whole store in order, some 32 MiB at a time, wherever it lies."""
    first = 0
    for _, n_atoms, arrays in store.chunks():
        of_atoms = {name: np.asarray(arrays[name]) for name in _ATOMS}
        of_atoms["atomic_numbers"] = of_atoms["atomic_numbers"].astype(np.int64)
        rows = {name: np.asarray(arrays[name]) for name in _ROWS}
        yield Block(first, np.cumsum(n_atoms) - n_atoms, n_atoms, **rows, **of_atoms)
        first += len(n_atoms)


def mix(values: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """64 well-mixed bits of each value (the finalizer of SplitMix64, Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


def kin_keys(block: Block) -> NDArray[np.int64]:
    """(n,) a number that near copies share: of the proportions of elements and of a coarse size.

    The size is the volume per atom where it is periodic, else the radius of gyration, in bins far wider than
    the tolerance for copies; a pair on a bin's edge is lost to the sample, nothing else.
    """
    common = np.gcd.reduce(block.counts.astype(np.int64), axis=1)
    primes = mix(np.arange(N_ELEMENTS), 0).astype(np.int64)
    with np.errstate(over="ignore"):
        formula = (block.counts.astype(np.int64) // common[:, None]) @ primes
    centre = block.sums(block.positions) / block.n_atoms[:, None]
    square = np.square(block.positions - centre[block.owner]).sum(axis=1)
    gyration = np.sqrt(block.sums(square) / block.n_atoms)
    per_atom = np.abs(np.linalg.det(block.cell)) / block.n_atoms
    size = np.where(block.pbc.any(axis=1), np.cbrt(per_atom), gyration)
    with np.errstate(over="ignore"):
        return np.asarray(formula * 31 + np.round(size / 0.1).astype(np.int64))


class KinSample:
    """At most `limit` places, taken by the lowest hashes of what makes them kin, so that kin come together.

    One pass, deterministic, and the same kin are taken in every store that is shown to it.
    """

    def __init__(self, limit: int, seed: int, per_kin: int = 0) -> None:
        """`per_kin`: take at most the first so many of one kin, 0: all."""
        self._limit, self._seed, self._per_kin = limit, seed, per_kin
        self._below = np.uint64(2**64 - 1)
        self._kept = np.empty((0, 3), np.uint64)
        self.complete = True

    def add(self, store: int, indices: NDArray[np.int64], kin: NDArray[np.int64]) -> None:
        """Shows it structures of one store."""
        hashes = mix(kin, self._seed)
        near = hashes <= self._below
        rows = np.stack(
            [hashes[near], np.full(near.sum(), store, np.uint64), indices[near].astype(np.uint64)], 1
        )
        self._kept = np.concatenate([self._kept, rows])
        self.complete &= bool(near.all())
        if len(self._kept) > 2 * self._limit:
            self._prune()

    def _prune(self) -> None:
        kept = self._kept[np.argsort(self._kept[:, 0], kind="stable")]
        if self._per_kin:
            _, first, inverse = np.unique(kept[:, 0], return_index=True, return_inverse=True)
            kept = kept[np.arange(len(kept)) - first[inverse.ravel()] < self._per_kin]
        if len(kept) > self._limit:
            self.complete = False
            self._below = kept[self._limit, 0]
            lower = kept[kept[:, 0] < self._below]
            kept = lower if len(lower) else kept[: self._limit]
        self._kept = kept

    def places(self) -> NDArray[np.int64]:
        """(k, 2) store and index, sorted."""
        self._prune()
        places = self._kept[:, 1:].astype(np.int64)
        return places[np.lexsort(places.T[::-1])]
