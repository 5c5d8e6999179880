"""Splits structures into training, validation and test by group. Knows nothing of what a group stands for."""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.store import Store

NAMES = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """Three disjoint lists of (store index, structure index), each (k, 2) int64 and sorted.

    Attributes:
        train, validation, test: the lists.
        seed: what the groups were shuffled by.
        fractions: what was asked for, in the order of the lists.
        digests: of the stores, in the order of the store indices.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    seed: int
    fractions: tuple[float, float, float]
    digests: tuple[str, ...]

    def part(self, name: str) -> NDArray[np.int64]:
        """The list of that name.

        Raises:
            DataError: there is no such split.
        """
        if name not in NAMES:
            raise DataError(f"no split {name!r}; one of {', '.join(NAMES)}")
        indices: NDArray[np.int64] = getattr(self, name)
        return indices

    def save(self, path: Path) -> None:
        """Writes an .npz aside and renames it."""
        aside = path.with_name(f"{path.name}.{os.getpid()}.part")
        with aside.open("wb") as file:
            np.savez(
                file,
                train=self.train,
                validation=self.validation,
                test=self.test,
                seed=np.int64(self.seed),
                fractions=np.array(self.fractions),
                digests=np.array(self.digests, dtype=np.str_),
            )
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Splits":
        """Reads what `save` wrote; never unpickles.

        Raises:
            DataError: missing, or not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as body:
                train, validation, test = (body[name].astype(np.int64) for name in NAMES)
                a, b, c = (float(x) for x in body["fractions"])
                digests = tuple(str(d) for d in body["digests"])
                return cls(train, validation, test, int(body["seed"]), (a, b, c), digests)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: is not a file of splits ({error})") from None

    def check_stores(self, stores: Sequence[Store]) -> None:
        """Raises DataError unless these are the stores, in the order, that were split."""
        if len(stores) != len(self.digests):
            raise DataError(f"the splits are of {len(self.digests)} store(s), {len(stores)} given")
        for store, digest in zip(stores, self.digests, strict=True):
            if store.manifest.digest != digest:
                raise DataError(
                    f"{store.path}: is not the store that was split, or has grown since "
                    f"({store.manifest.digest[:15]}…, the splits are of {digest[:15]}…)"
                )


def split(stores: Sequence[Store], *, fractions: Sequence[float], seed: int) -> Splits:
    """Deals whole groups out, so that frames of one trajectory or molecule stay together.

    The groups are shuffled by the seed; validation and then test take every next group that brings them
    closer to their share of the structures, training has the rest. Groups of different stores differ.

    Args:
        stores: in an order that the indices will refer to.
        fractions: of the structures for training, validation, test; sum 1. A zero leaves that split empty.
        seed: the same seed and stores give the same splits, whatever machine or number of ranks.

    Raises:
        DataError: impossible fractions, or too few groups for every split to have one.
    """
    shares = _check_fractions(fractions)
    where, size_of_group, group_of = _groups(stores)
    n_groups, total = len(size_of_group), len(group_of)
    wanted = sum(share > 0 for share in shares)
    if n_groups < wanted:
        raise DataError(
            f"{n_groups} group(s) of structures cannot fill {wanted} splits; import with a finer --group-by "
            "(block:10, frame), or give the fraction 0 to a split you do not need"
        )
    free = np.random.default_rng(seed).permutation(n_groups)
    owner = np.zeros(n_groups, dtype=np.int64)
    for k in (1, 2):
        if shares[k] == 0:
            continue
        later = sum(share > 0 for share in (shares[0], *shares[k + 1 :]))  # each needs a group too
        taken = _take(size_of_group[free], shares[k] * total, limit=len(free) - later)
        owner[free[taken]] = k
        free = free[~taken]
    if shares[0] == 0 and len(free):
        owner[free] = 1 if shares[1] else 2
    parts = [where[owner[group_of] == k] for k in range(3)]
    digests = tuple(store.manifest.digest for store in stores)
    return Splits(parts[0], parts[1], parts[2], seed, shares, digests)


def _check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    if len(fractions) != 3 or any(not 0 <= f <= 1 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        given = ",".join(f"{f:g}" for f in fractions)
        raise DataError(f"fractions {given}: give three between 0 and 1 that sum to 1, as 0.8,0.1,0.1")
    a, b, c = (float(f) for f in fractions)
    return a, b, c


def _groups(stores: Sequence[Store]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """((n, 2) store and structure, size of each group, (n,) group of each structure)."""
    where = [np.stack([np.full(len(s), k), np.arange(len(s))], axis=1) for k, s in enumerate(stores)]
    groups, sizes, first = [], [], 0
    for store in stores:
        names, group, size = np.unique(store.groups, return_inverse=True, return_counts=True)
        groups.append(group.ravel() + first)
        sizes.append(size)
        first += len(names)
    if not first:
        raise DataError("there is nothing to split: no structure in the stores")
    return np.concatenate(where).astype(np.int64), np.concatenate(sizes), np.concatenate(groups)


def _take(sizes: NDArray[np.int64], target: float, limit: int) -> NDArray[np.bool_]:
    """Which groups, in order, bring the sum closer to the target; at least one, at most `limit`."""
    taken = np.zeros(len(sizes), dtype=np.bool_)
    have, count = 0, 0
    for k, size in enumerate(sizes):
        if count >= limit or have >= target:
            break
        if abs(have + size - target) < abs(have - target):
            taken[k] = True
            have += int(size)
            count += 1
    if not count:
        taken[int(sizes.argmin())] = True
    return taken
