"""Ends calls whose callers read nothing: else each of them would hold what it is to read for ever.

gRPC lets a server write only as fast as its caller reads, however long that takes; that the caller's machine
still answers pings says nothing of the program that should read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from equipot.serve.errors import NotReady
from equipot.serve.status import Context, refuse


class Patience:
    """With callers who read slowly, which ends after so many seconds without a message read."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._telling: set[asyncio.Future[None]] = set()

    @contextmanager
    def waits(self, context: Context) -> Iterator[None]:
        """Around the `yield` of a reply in a call's handler: ends the call if it is not read in time."""
        task = asyncio.current_task()
        assert task is not None
        timer = asyncio.get_running_loop().call_later(self._seconds, self._end, task, context)
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, handler: asyncio.Task[object], context: Context) -> None:
        # The status waits behind the reply for as long as the connection lasts; the handler need not.
        telling = asyncio.ensure_future(self._tell(context))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)
        # Once the status is on its way: whose handler is cancelled before gets none.
        asyncio.get_running_loop().call_soon(handler.cancel)

    async def _tell(self, context: Context) -> None:
        error = NotReady(
            f"nothing was read for {self._seconds:g} s, so the call was ended: ask again for the rest",
            retry_after=0.0,
        )
        # So gRPC says that the call is over, and what it makes of a caller who has left.
        with contextlib.suppress(Exception):
            await refuse(context, error)
