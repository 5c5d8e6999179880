"""Streams that are open, so that they can be ended when their caller is let in no longer. Knows no gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from equipot.serve.call import Call
from equipot.serve.errors import Unauthenticated

PATIENCE_SECONDS = 2.0
"""For a caller that does not read what it was sent: then its stream ends without a word."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class OpenStream:
    """One of them, as the task that answers it.

    Attributes:
        call: that opened it.
        task: that answers it.
        ended: whether it is to end.
        answering: whether the task is where it can still say why.
    """

    call: Call
    task: asyncio.Task[object]
    ended: bool = False
    answering: bool = False

    def end(self) -> None:
        """Ends it as soon as its caller can be told."""
        self.ended = True
        if self.answering:
            self.task.cancel()

    def check(self) -> None:
        """Raises Unauthenticated if it is to end."""
        if self.ended:
            raise _withdrawn()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile the stream can be ended; raises Unauthenticated if it is."""
        self.answering = True
        try:
            yield
        except asyncio.CancelledError:
            if self.ended and self.task.uncancel() == 0:
                raise _withdrawn() from None
            raise
        finally:
            self.answering = False
        self.check()


class OpenStreams:
    """All of one server. Its methods are called in the event loop."""

    def __init__(self) -> None:
        self._open: set[OpenStream] = set()

    @contextmanager
    def opened(self, call: Call) -> Iterator[OpenStream]:
        """Knows this task's stream until it is done."""
        task = asyncio.current_task()
        assert task is not None
        stream = OpenStream(call, task)
        self._open.add(stream)
        try:
            yield stream
        finally:
            self._open.discard(stream)

    def end(self, unwanted: Callable[[Call], bool]) -> None:
        """Ends those whose calls are unwanted, with UNAUTHENTICATED."""
        ended = [stream for stream in self._open if not stream.ended and unwanted(stream.call)]
        for stream in ended:
            logger.info("%s of %s ends: its token was withdrawn", stream.call.method, stream.call.identity)
            stream.end()
        if ended:
            asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._insist)

    def _insist(self) -> None:
        for stream in self._open:
            if stream.ended:
                stream.task.cancel()


def _withdrawn() -> Unauthenticated:
    return Unauthenticated("the bearer token with which this stream was opened has been withdrawn")
