"""Operations that are awaited to their end, whatever becomes of the call that wanted them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_its_end(operation: Coroutine[Any, Any, T]) -> T:
    """What the operation returns or raises; cancelled, it goes on without its caller.

    grpc.aio frees what an operation took of the core (its operations, the metadata that it sends) only after
    it was awaited to its end. gRPC cancels the handler of a call whose client has left or whose deadline has
    passed; cut short there, each such call would leave some hundred bytes for ever.
    """
    task = asyncio.ensure_future(operation)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        # `shield` no longer listens, and what fails unheard is written to the log with a traceback.
        task.add_done_callback(unheard)
        raise


def unheard(future: asyncio.Future[Any]) -> None:
    """Takes note of how it ended, since nobody is left to be told."""
    if not future.cancelled():
        future.exception()
