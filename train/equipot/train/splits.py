"""Deals groups of structures into training, validation and test. Knows nothing of what a group stands for.

A group is a number, the same in every store that holds it (see `grouping`), and everything about it is
decided by hashes of that number and the seed. So a group is on the same side in all stores, adding a store
leaves the others' splits as they are, and a store that grows keeps them but for groups at the border.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.places import BLOCK
from equipot.train.store import Store

NAMES = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
_MERGE = 2**21


@dataclass(frozen=True, slots=True, eq=False)
class Caps:
    """What is taken of a store, before it is split; None: no limit.

    Attributes:
        max_structures: of the store; whole groups, in an order drawn by the seed, the last one in part.
        max_per_group: of one group, evenly spread over it.
        max_atoms: structures with more are left out.
    """

    max_structures: int | None = None
    max_per_group: int | None = None
    max_atoms: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The groups of one store, by ascending number.

    Attributes:
        numbers: (g,) int64.
        sizes: (g,) structures of each that are not too large.
        quotas: (g,) how many of them are taken.
        owner: (g,) 0 training, 1 validation, 2 test.
        starts: (g,) where the group's structures begin in the list of their split.
        lengths: of the three lists.
    """

    numbers: NDArray[np.int64]
    sizes: NDArray[np.int64]
    quotas: NDArray[np.int64]
    owner: NDArray[np.int8]
    starts: NDArray[np.int64]
    lengths: tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Consecutive structures of a store: the first one's index, groups and numbers of atoms of all."""

    first: int
    groups: NDArray[np.int64]
    n_atoms: NDArray[np.int64]


def blocks_of(store: Store) -> Iterator[Block]:
    """All structures of a store, a bounded number at a time."""
    first = 0
    for groups, n_atoms in zip(store.blocks("group"), store.size_blocks(), strict=True):
        for at in range(0, len(groups), BLOCK):
            block = np.array(groups[at : at + BLOCK], dtype=np.int64)
            yield Block(first + at, block, n_atoms[at : at + BLOCK])
        first += len(groups)


class Dealer:
    """Deals the groups of one store after the other; remembers where a group went."""

    def __init__(self, fractions: Sequence[float], seed: int) -> None:
        """Takes shares for training, validation and test, sum 1; a zero leaves that split empty.

        Raises:
            DataError: impossible fractions.
        """
        self.fractions = check_fractions(fractions)
        self._seed = seed
        self._numbers = np.empty(0, dtype=np.int64)
        self._owners = np.empty(0, dtype=np.int8)
        self._totals = np.zeros(3, dtype=np.int64)

    def deal(self, store: Store, caps: Caps) -> Groups:
        """Settles which structures of a store are taken, and which split and place each group has."""
        numbers, sizes = _count(store, caps.max_atoms)
        order = np.argsort(hashes(numbers, self._seed, "order"), kind="stable")
        quotas = _quotas(sizes, order, caps)
        owner = self._owner(numbers, quotas)
        starts = np.zeros(len(numbers), dtype=np.int64)
        lengths = []
        for k in range(3):
            mine = order[owner[order] == k]
            ends = np.cumsum(quotas[mine])
            starts[mine] = ends - quotas[mine]
            lengths.append(int(ends[-1]) if len(ends) else 0)
        self._totals += lengths
        taken = quotas > 0
        self._remember(numbers[taken], owner[taken])
        return Groups(numbers, sizes, quotas, owner, starts, (lengths[0], lengths[1], lengths[2]))

    def check(self) -> None:
        """Raises DataError if a split that was asked for got nothing."""
        n_groups = len(self._numbers)
        if not n_groups:
            raise DataError("there is nothing to split: no structure in the stores")
        wanted = sum(share > 0 for share in self.fractions)
        if any(share > 0 and not total for share, total in zip(self.fractions, self._totals, strict=True)):
            raise DataError(
                f"{n_groups} group(s) of structures cannot fill {wanted} splits; import with a finer "
                "--group-by (block:10, frame), or give the fraction 0 to a split you do not need"
            )

    def _owner(self, numbers: NDArray[np.int64], quotas: NDArray[np.int64]) -> NDArray[np.int8]:
        """Validation takes from one end of an order drawn by the seed, test from the other, both until they
        are closest to their shares; what is left is training's."""
        owner = self._known(numbers)
        there = [int(quotas[owner == k].sum()) for k in range(3)]
        free = np.flatnonzero((owner < 0) & (quotas > 0))
        free = free[np.argsort(hashes(numbers[free], self._seed, "split"), kind="stable")]
        shares, total = self.fractions, int(quotas.sum())
        for k in (VALIDATION, TEST):
            if shares[k] == 0:
                continue
            others = (TRAIN, *range(k + 1, 3))  # those without a group need one of the free
            later = sum(shares[other] > 0 and not there[other] for other in others)
            side = free if k == VALIDATION else free[::-1]
            taken = _take(
                quotas[side], shares[k] * total - there[k], limit=len(free) - later, needs_one=not there[k]
            )
            owner[side[taken]] = k
            free = free[owner[free] < 0]
        owner[owner < 0] = TRAIN if shares[TRAIN] else (VALIDATION if shares[VALIDATION] else TEST)
        return owner

    def _known(self, numbers: NDArray[np.int64]) -> NDArray[np.int8]:
        owner = np.full(len(numbers), -1, dtype=np.int8)
        at = np.searchsorted(self._numbers, numbers)
        inside = at < len(self._numbers)
        same = np.zeros(len(numbers), dtype=np.bool_)
        same[inside] = self._numbers[at[inside]] == numbers[inside]
        owner[same] = self._owners[at[same]]
        return owner

    def _remember(self, numbers: NDArray[np.int64], owner: NDArray[np.int8]) -> None:
        merged, first = np.unique(np.concatenate([self._numbers, numbers]), return_index=True)
        self._owners = np.concatenate([self._owners, owner])[first]
        self._numbers = merged


def place(
    block: Block, groups: Groups, seen: NDArray[np.int64], max_atoms: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int8], NDArray[np.int64]]:
    """(rows of the block that are taken, their split, their place in the split's list).

    Args:
        block: the next structures of the store.
        groups: of the store.
        seen: (g,) structures of each group before this block; brought up to date.
        max_atoms: as when the groups were counted.
    """
    rows = np.arange(len(block.groups))
    if max_atoms is not None:
        rows = rows[block.n_atoms <= max_atoms]
    group = np.searchsorted(groups.numbers, block.groups[rows])
    by_group = np.argsort(group, kind="stable")
    ordered = group[by_group]
    firsts = np.flatnonzero(np.diff(ordered, prepend=-1))
    lengths = np.diff(firsts, append=len(ordered))
    nth = np.empty(len(rows), dtype=np.int64)
    nth[by_group] = np.arange(len(rows)) - np.repeat(firsts, lengths)
    nth += seen[group]
    seen[ordered[firsts]] += lengths
    quota, size = groups.quotas[group], groups.sizes[group]
    within = nth * quota // size
    taken = (nth + 1) * quota // size > within  # evenly spread over the group
    return rows[taken], groups.owner[group[taken]], groups.starts[group[taken]] + within[taken]


def hashes(numbers: NDArray[np.int64], seed: int, purpose: str) -> NDArray[np.uint64]:
    """(n,) 64 well-mixed bits of each number, seed and purpose (Steele, Lea and Flood's SplitMix64)."""
    key = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    x = numbers.astype(np.uint64) ^ np.frombuffer(key[:8], dtype="<u8")[0]
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Three shares that sum to 1; DataError if they do not."""
    if len(fractions) != 3 or any(not 0 <= f <= 1 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        given = ",".join(f"{f:g}" for f in fractions)
        raise DataError(f"fractions {given}: give three between 0 and 1 that sum to 1, as 0.8,0.1,0.1")
    a, b, c = (float(f) for f in fractions)
    return a, b, c


def _count(store: Store, max_atoms: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the groups, ascending, and how many structures each has that are not too large."""
    numbers, sizes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    pending = 0
    for block in blocks_of(store):
        fitting = block.groups if max_atoms is None else block.groups[block.n_atoms <= max_atoms]
        found, counts = np.unique(fitting, return_counts=True)
        numbers.append(found)
        sizes.append(counts)
        pending += len(found)
        if pending > max(_MERGE, len(numbers[0])):
            merged = _merge(numbers, sizes)
            numbers, sizes, pending = [merged[0]], [merged[1]], 0
    return _merge(numbers, sizes)


def _merge(
    numbers: Sequence[NDArray[np.int64]], sizes: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    everything, counts = np.concatenate(numbers), np.concatenate(sizes)
    order = np.argsort(everything, kind="stable")
    everything = everything[order]
    firsts = np.flatnonzero(np.diff(everything, prepend=-1))  # numbers are not negative
    return everything[firsts], np.add.reduceat(counts[order], firsts) if len(firsts) else counts


def _quotas(sizes: NDArray[np.int64], order: NDArray[np.int64], caps: Caps) -> NDArray[np.int64]:
    quotas = sizes if caps.max_per_group is None else np.minimum(sizes, caps.max_per_group)
    if caps.max_structures is None:
        return quotas
    ordered = quotas[order]
    before = np.cumsum(ordered) - ordered
    capped = np.empty_like(quotas)
    capped[order] = np.clip(caps.max_structures - before, 0, ordered)
    return capped


def _take(sizes: NDArray[np.int64], target: float, limit: int, *, needs_one: bool) -> NDArray[np.bool_]:
    """Which groups, in order, bring the sum closer to the target; at most `limit`, one if need be."""
    taken = np.zeros(len(sizes), dtype=np.bool_)
    if limit <= 0:
        return taken
    have, count, smallest = 0, 0, int(sizes.min())
    for k, size in _numbered(sizes):
        if count >= limit or smallest >= 2 * (target - have):  # none brings it closer any more
            break
        if size < 2 * (target - have):
            taken[k] = True
            have += size
            count += 1
    if not count and needs_one:
        taken[int(sizes.argmin())] = True
    return taken


def _numbered(values: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    for at in range(0, len(values), BLOCK):
        yield from enumerate(values[at : at + BLOCK].tolist(), at)
