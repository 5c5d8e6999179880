"""How much memory sessions and motions keep together: what each claims, and whether there is room for it."""

from __future__ import annotations

import threading

LISTS_SHARE = 0.75
"""Of the room, that neighbour lists may take: the rest is for structures, so that others may still come."""


class Room:
    """The memory that all of a server have; may be used by any thread.

    Attributes:
        most: bytes.
        held: bytes of them that are claimed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._lock = threading.Lock()

    def take(self, n_bytes: int, most: float) -> bool:
        """Claims so many bytes unless there are more than `most` then; below zero gives them back."""
        with self._lock:
            if n_bytes > 0 and self.held + n_bytes > most:
                return False
            self.held += n_bytes
            return True


class Tenant:
    """What one session, or one request that moves structures, keeps there.

    Attributes:
        lists_fit: whether there was room for every neighbour list so far.
    """

    def __init__(self, room: Room) -> None:
        self.lists_fit = True
        self._room = room
        self._structures = 0
        self._lists = 0
        self._left = False
        self._lock = threading.Lock()

    def claim_structures(self, n_bytes: int) -> bool:
        """Whether there is room for so many bytes."""
        with self._lock:
            fits = not self._left and self._room.take(n_bytes, self._room.most)
            self._structures += n_bytes if fits else 0
            return fits

    def claim_list(self, n_bytes: int) -> bool:
        """Whether there is room for so many bytes more; below zero gives them back."""
        with self._lock:
            fits = not self._left and self._room.take(n_bytes, LISTS_SHARE * self._room.most)
            self._lists += n_bytes if fits else 0
            self.lists_fit = self.lists_fit and fits
            return fits

    def drop_lists(self) -> None:
        """Gives back what lists have."""
        with self._lock:
            self._room.take(-self._lists, 0)
            self._lists = 0

    def leave(self) -> None:
        """Gives everything back; what a step under way claims later is refused."""
        with self._lock:
            self._left = True
            self._room.take(-self._structures - self._lists, 0)
            self._structures = self._lists = 0
