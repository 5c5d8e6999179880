"""What the service is told of a caller that came by HTTP: the few words of gRPC's context that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from equipot.serve.status import Context


class _Caller:
    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._callbacks: list[Callable[[Context], None]] = []

    def peer(self) -> str:
        return self._peer

    def time_remaining(self) -> None:
        """It waits until it leaves, and then the call is cancelled."""

    def add_done_callback(self, callback: Callable[[Context], None]) -> None:
        self._callbacks.append(callback)

    def left(self, context: Context) -> None:
        for callback in self._callbacks:
            callback(context)


@contextmanager
def caller(peer: str) -> Iterator[Context]:
    """The context of one call, which is over at the end."""
    one = _Caller(peer)
    context = cast("Context", one)
    try:
        yield context
    finally:
        one.left(context)
