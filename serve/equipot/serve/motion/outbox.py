"""Messages that wait for a caller to read them, bounded in bytes and in time. Knows no gRPC."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from equipot.serve.errors import NotReady

UNREAD_BYTES = 8 * 2**20
"""That wait for one caller; then its structures wait, too, and nobody else's."""

MOST_UNREAD_BYTES = 64 * UNREAD_BYTES
"""That wait for all callers together; then nobody new is let in."""

MessageT = TypeVar("MessageT", bound=Message)


@dataclass(slots=True, kw_only=True)
class Unread:
    """What waits in all outboxes together.

    Attributes:
        each: bytes that may wait in one outbox.
        most: bytes in all of them, from which on no outbox had better be opened.
        bytes: that wait now.
    """

    each: int = UNREAD_BYTES
    most: int = MOST_UNREAD_BYTES
    bytes: int = 0

    @property
    def full(self) -> bool:
        """Whether so much waits that no outbox had better be opened."""
        return self.bytes >= self.most


class Outbox(Generic[MessageT]):
    """What one caller is to read. Whoever writes waits while it is full; a message alone fits always."""

    def __init__(self, unread: Unread, *, patience: float) -> None:
        """An empty one, counted in `unread`; a writer waits `patience` s for a reader."""
        self._unread = unread
        self._messages: deque[tuple[MessageT, int]] = deque()
        self._patience = patience
        self._bytes = self._taken = 0
        self._closed = self._left = False
        self._changed = asyncio.Condition()

    async def put(self, message: MessageT) -> None:
        """Adds a message, once there is room.

        Raises:
            NotReady: the reader took nothing for too long.
        """
        size = message.ByteSize()
        if self._messages and self._bytes + size > self._unread.each:
            await self._room_for(size)
        if self._left:
            return
        self._messages.append((message, size))
        self._bytes += size
        self._unread.bytes += size
        await self._tell()

    async def close(self) -> None:
        """Says that nothing more comes; what is there already is read before."""
        self._closed = True
        await self._tell()

    def leave(self) -> None:
        """Drops what is there and what still comes: the reader has gone."""
        self._left = True
        self._unread.bytes -= self._bytes
        self._bytes = 0
        self._messages.clear()

    async def get(self) -> MessageT | None:
        """The next message; None if no more come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._messages or self._closed)
        if not self._messages:
            return None
        message, size = self._messages.popleft()
        self._bytes -= size
        self._unread.bytes -= size
        self._taken += 1
        await self._tell()
        return message

    async def _room_for(self, size: int) -> None:
        while self._messages and self._bytes + size > self._unread.each:
            taken = self._taken
            try:
                async with asyncio.timeout(self._patience), self._changed:
                    while self._taken == taken:
                        await self._changed.wait()
            except TimeoutError:
                raise NotReady(
                    f"nothing was read for {self._patience:g} s, so the structures were let go:"
                    " ask again, from the last tokens",
                    retry_after=0.0,
                ) from None

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
