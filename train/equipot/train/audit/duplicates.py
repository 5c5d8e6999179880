"""The same structure twice: to the bit by fingerprint, and nearly by geometry, within and across stores."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from equipot.train.audit.geometry import Geometry, describe, difference
from equipot.train.store import Store

TOLERANCE = 0.02
"""Å that a distance may differ in near copies. Thermal motion changes distances by 0.1 and more."""
SAME = 0.002
"""Å that a distance may differ in copies whose labels should agree."""
_LABEL_TOLERANCE = 0.005  # eV per atom; settings of one level of theory agree to a few meV
_EXACT_PASS = 2**22  # fingerprints sorted at once
_NEAREST = 4
_EXAMPLES = 20
NO_SPLIT = -1

Place = tuple[int, int]
"""Store and index."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two places with the same structure; delta: largest difference of a distance in Å."""

    one: Place
    two: Place
    delta: float
    detail: str = ""


@dataclass(slots=True)
class Pairs:
    """How many, and the first few."""

    count: int = 0
    examples: list[Pair] = field(default_factory=list)

    def add(self, pair: Pair) -> None:
        """One more."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(pair)


@dataclass(frozen=True, slots=True)
class Kind:
    """What two copies have to do with each other.

    Attributes:
        relation: "splits", "stores", "groups" or "group": the strongest that separates them.
        stores: of the one and the other, sorted.
        splits: likewise, in that order.
    """

    relation: str
    stores: tuple[int, int]
    splits: tuple[int, int]


@dataclass(slots=True)
class Copies:
    """Pairs by kind, and those of them whose labels do not fit together."""

    pairs: dict[Kind, Pairs] = field(default_factory=lambda: defaultdict(Pairs))
    conflicts: dict[tuple[int, int], Pairs] = field(default_factory=lambda: defaultdict(Pairs))
    offsets: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    """Differences of energy per atom between two stores of one level, over all near copies, at most 1,000."""
    compared: int = 0


SplitOf = Callable[[int, NDArray[np.int64]], NDArray[np.int64]]
"""(store, indices) → split of each, NO_SPLIT where it is in none."""


def exact_copies(
    stores: Sequence[Store], split_of: SplitOf, check: Callable[[], None], at_once: int = _EXACT_PASS
) -> dict[Kind, Pairs]:
    """Structures with the same bits, labels included; each is paired with the first of its kind.

    Fingerprints are looked at in as many passes as keep those of one pass in memory.
    """
    found: dict[Kind, Pairs] = defaultdict(Pairs)
    have = [k for k, store in enumerate(stores) if "fingerprint" in store.manifest.columns]
    passes = -(-sum(len(stores[k]) for k in have) // at_once)
    for part in range(passes):
        prints, places = [np.empty(0, np.uint64)], [np.empty((0, 2), np.int64)]
        for k in have:
            first = 0
            for block in stores[k].blocks("fingerprint"):
                check()
                mine = np.flatnonzero(np.asarray(block % np.uint64(passes) == part))
                prints.append(np.asarray(block[mine]))
                places.append(np.stack([np.full(len(mine), k), first + mine], axis=1))
                first += len(block)
        values, where = np.concatenate(prints), np.concatenate(places)
        order = np.argsort(values, kind="stable")
        values, where = values[order], where[order]
        leader = np.maximum.accumulate(
            np.where(np.concatenate([[True], values[1:] != values[:-1]]), np.arange(len(values)), 0)
        )
        for at in np.flatnonzero(leader != np.arange(len(values))).tolist():
            a, b = (
                (int(where[leader[at], 0]), int(where[leader[at], 1])),
                (int(where[at, 0]), int(where[at, 1])),
            )
            found[_kind(stores, split_of, a, b)].add(Pair(a, b, 0.0))
    return found


def _kind(stores: Sequence[Store], split_of: SplitOf, a: Place, b: Place) -> Kind:
    splits = [int(split_of(k, np.array([i]))[0]) for k, i in (a, b)]
    groups = [(k, int(stores[k].values("group", [i])[0])) for k, i in (a, b)]
    return _relate(a[0], b[0], splits[0], splits[1], groups[0] == groups[1])


def _relate(store_a: int, store_b: int, split_a: int, split_b: int, same_group: bool) -> Kind:
    (store_a, split_a), (store_b, split_b) = sorted([(store_a, split_a), (store_b, split_b)])
    if split_a != split_b and NO_SPLIT not in (split_a, split_b):
        relation = "splits"
    elif store_a != store_b:
        relation = "stores"
    else:
        relation = "group" if same_group else "groups"
    return Kind(relation, (store_a, store_b), (split_a, split_b))


class Sample:
    """Descriptions of sampled structures: sixteen numbers each, and what they are."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._keys: list[int] = []
        self._features: list[NDArray[np.float32]] = []
        self._groups: list[int] = []
        self._splits: list[int] = []

    def add(self, place: Place, geometry: Geometry, charge: int, group: int, split: int) -> None:
        """Takes one in."""
        key = (tuple(geometry.elements.tolist()), tuple(geometry.proportions.tolist()), charge)
        self._places.append(place)
        self._keys.append(hash(key))
        self._features.append(geometry.features.astype(np.float32))
        self._groups.append(group)
        self._splits.append(split)

    def near(self, tolerance: float) -> Iterator[tuple[Place, Place, Kind]]:
        """Candidates: of one composition, with features that are close; the nearest few of each.

        A structure's nearest are looked for among those of each other store and split on their own, so that
        its own trajectory does not hide a copy elsewhere.
        """
        if not self._places:
            return
        places, features = np.array(self._places), np.array(self._features)
        groups, splits, keys = np.array(self._groups), np.array(self._splits), np.array(self._keys)
        realm = places[:, 0] * 8 + splits + 1
        order = np.argsort(keys, kind="stable")
        for kin in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            if len(kin) < 2:
                continue
            trees = {r: kin[realm[kin] == r] for r in np.unique(realm[kin]).tolist()}
            seen: set[tuple[int, int]] = set()
            for members in trees.values():
                tree = cKDTree(features[members])
                for others in trees.values():
                    for a, b in _neighbors(tree, features, members, others, tolerance):
                        if a == b or (min(a, b), max(a, b)) in seen:
                            continue
                        seen.add((min(a, b), max(a, b)))
                        one, two = sorted([a, b], key=lambda i: (places[i, 0], places[i, 1]))
                        kind = _relate(
                            int(places[a, 0]),
                            int(places[b, 0]),
                            int(splits[a]),
                            int(splits[b]),
                            bool(groups[a] == groups[b] and places[a, 0] == places[b, 0]),
                        )
                        yield self._places[one], self._places[two], kind


def _neighbors(
    tree: cKDTree,
    features: NDArray[np.float32],
    members: NDArray[np.int64],
    others: NDArray[np.int64],
    tolerance: float,
) -> Iterator[tuple[int, int]]:
    near, which = tree.query(
        features[others], k=_NEAREST + 1, p=np.inf, distance_upper_bound=tolerance + 1e-5
    )
    for row, column in zip(*np.nonzero(np.isfinite(near)), strict=True):
        yield int(others[row]), int(members[which[row, column]])


def near_copies(
    stores: Sequence[Store],
    sample: Sample,
    tolerance: float,
    check: Callable[[], None],
) -> Copies:
    """Near copies among the sampled: every candidate is compared distance by distance."""
    found = Copies()

    @lru_cache(maxsize=256)
    def geometry(place: Place) -> Geometry:
        return describe(stores[place[0]].system(place[1]))

    for one, two, kind in sample.near(tolerance):
        check()
        found.compared += 1
        delta = difference(geometry(one), geometry(two))
        if delta > tolerance or (delta == 0 and _identical(stores, one, two)):
            continue
        found.pairs[kind].add(Pair(one, two, delta))
        if stores[one[0]].manifest.level_of_theory != stores[two[0]].manifest.level_of_theory:
            continue
        conflict, apart = _labels_apart(stores, one, two, delta)
        if kind.stores[0] != kind.stores[1] and np.isfinite(apart):
            offsets = found.offsets[kind.stores]
            if len(offsets) < 1000:
                offsets.append(apart if one[0] == kind.stores[0] else -apart)
        if conflict and delta <= SAME:
            found.conflicts[kind.stores].add(Pair(one, two, delta, conflict))
    return found


def _identical(stores: Sequence[Store], one: Place, two: Place) -> bool:
    """Whether it is an exact copy, which is counted as such."""
    a, b = (stores[k].system(i) for k, i in (one, two))
    same = np.array_equal(a.positions, b.positions) and np.array_equal(a.cell, b.cell)
    return same and stores[one[0]].labels(one[1]).energy == stores[two[0]].labels(two[1]).energy


def _labels_apart(stores: Sequence[Store], one: Place, two: Place, delta: float) -> tuple[str, float]:
    """(what does not fit, "" if all does; energy of the second less that of the first, eV per atom)."""
    (a, b) = (stores[k].system(i) for k, i in (one, two))
    (la, lb) = (stores[k].labels(i) for k, i in (one, two))
    apart = lb.energy / b.n_atoms - la.energy / a.n_atoms
    spins = {a.spin_multiplicity, b.spin_multiplicity} - {0}
    if not np.isfinite(apart) or len(spins) > 1:
        return "", apart
    forces = [
        np.linalg.norm(each.forces, axis=1).max() for each in (la, lb) if np.isfinite(each.forces).all()
    ]
    allowed = _LABEL_TOLERANCE + 4 * delta * max(forces, default=0.0)
    if abs(apart) > allowed:
        energies = f"{la.energy / a.n_atoms:.6g} and {lb.energy / b.n_atoms:.6g} eV per atom"
        return f"{energies}, {abs(apart):.3g} apart", apart
    return "", apart
