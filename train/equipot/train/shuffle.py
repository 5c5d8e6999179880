"""Random permutations, computed where they are looked at and never held whole. Knows only numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 16  # with fewer, orders of less than ten are not all equally likely


class Shuffle:
    """A pseudo-random permutation of 0 … n−1, given by its seed.

    An alternating Feistel network over a × b ≥ n numbers, with cycle walking for the few that are n or more
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). 40 million structures need no memory
    and no time before the first of them; any place of any epoch is found at once.

    Args:
        n: how many numbers.
        seed: as of `numpy.random.default_rng`.
    """

    def __init__(self, n: int, seed: Sequence[int]) -> None:
        self._n = n
        self._a = np.uint64(max(1, math.isqrt(n)))
        self._b = np.uint64(-(-n // int(self._a)))
        self._keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)

    def __getitem__(self, places: NDArray[np.integer]) -> NDArray[np.int64]:
        """What stands at these places, each from 0 to n−1."""
        found = self._walk(np.asarray(places).astype(np.uint64))
        outside = np.flatnonzero(found >= self._n)
        while len(outside):
            found[outside] = self._walk(found[outside])
            outside = outside[found[outside] >= self._n]
        return found.astype(np.int64)

    def _walk(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers // self._b, numbers % self._b
        for number, key in enumerate(self._keys):
            if number % 2:
                right = (right + _mixed(left, key)) % self._b
            else:
                left = (left + _mixed(right, key)) % self._a
        return left * self._b + right


def _mixed(numbers: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A hash of each number: SplitMix64's finaliser (Steele, Lea and Flood 2014), with half its range."""
    x = numbers ^ key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)  # room for an addition
