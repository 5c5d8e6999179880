"""Remembers fingerprints of structures in a file that is mapped, not in memory. Knows no structures."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY = 2**16
_ENTRY = np.dtype([("fingerprint", "<u8"), ("place", "<i8")])


class Seen:
    """fingerprint → place of its first structure: open addressing with linear probing, at most half full."""

    def __init__(self, folder: Path) -> None:
        """Makes an empty table in an unnamed file in `folder`; it goes away with the process."""
        self._folder = folder
        self._use(self._new(_FIRST_CAPACITY))

    def _new(self, capacity: int) -> NDArray[Any]:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.truncate(capacity * _ENTRY.itemsize)
            return np.memmap(file, dtype=_ENTRY, mode="r+", shape=(capacity,))

    def _use(self, table: NDArray[Any]) -> None:
        self._fingerprints, self._places = table["fingerprint"], table["place"]
        self._count = 0

    def add(self, fingerprint: int, place: int) -> int | None:
        """Remembers a place; returns the one that was there before with the same fingerprint, if any."""
        if 2 * self._count >= len(self._fingerprints):
            self._grow()
        mask = len(self._fingerprints) - 1
        key = fingerprint or 1  # 0 is an empty slot
        slot = key & mask
        while (there := int(self._fingerprints[slot])) != 0:
            if there == key:
                return int(self._places[slot])
            slot = (slot + 1) & mask
        self._fingerprints[slot] = key
        self._places[slot] = place
        self._count += 1
        return None

    def _grow(self) -> None:
        fingerprints, places = self._fingerprints, self._places
        self._use(self._new(2 * len(fingerprints)))
        for slot in np.flatnonzero(fingerprints):
            self.add(int(fingerprints[slot]), int(places[slot]))
