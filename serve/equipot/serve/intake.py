"""Reads requests into memory, a bounded number of bytes at once. Knows neither services nor models.

gRPC reads a message whole before it calls a handler, and of how many calls does not matter to it: a hundred
callers with the largest message each would take a hundred times its memory before anything is refused. Here a
call has room for the largest message before it is read, and keeps what it took until it is answered. HTTP/2
holds back what nobody reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from equipot.serve.errors import CallError, InvalidRequest, QueueFull
from equipot.serve.operation import unheard
from equipot.serve.status import Context, bare, refuse

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

LARGEST_AT_ONCE = 8
"""So many messages of the largest size are in memory at once; of smaller ones as many as fit."""

ARRIVES_SECONDS = 60.0
"""In which a message arrives that there is room for: who sends headers alone must not hold it for longer."""

STRANGERS_SECONDS = 1.0
"""The same for methods that are open to all, as those that ask for health: their messages are small."""

MOMENT = 0.05
"""Seconds in which a message that is small arrives once it is asked for: it came with the call's headers."""

TRIED_AT_ONCE = 4
"""So many calls for which there is no room are given that moment at once; that bounds what they bring."""

RETRY_FULL = 1.0
"""Seconds after which some of the messages may have been answered."""


class Room:
    """Bytes of requests that are in memory.

    Args:
        largest: bytes of one message at most.
        at_once: messages of that size for which there is room.

    Attributes:
        held: by calls that read, wait for their answer, or have not read it.
        trying: those that are read without room for them.
    """

    def __init__(self, largest: int, *, at_once: int = LARGEST_AT_ONCE) -> None:
        self.largest = largest
        self.at_once = at_once
        self.held = 0
        self.trying = asyncio.Semaphore(TRIED_AT_ONCE)

    @property
    def limit(self) -> int:
        """Beyond it nothing is read that may be large."""
        return self.at_once * self.largest

    def has(self, n_bytes: int) -> bool:
        """Whether so many bytes more may be taken."""
        return self.held + n_bytes <= self.limit

    def full(self) -> QueueFull:
        """The refusal of what finds no room."""
        return QueueFull(
            f"requests of {self.held} bytes are read or wait for their answers; the limit is {self.limit}",
            retry_after=RETRY_FULL,
            facts={"request_bytes": str(self.held), "max_request_bytes": str(self.limit)},
        )


class Intake(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # at run time it takes none
    """Lets a call's one message be read when there is room for it; streams of requests go by it.

    Args:
        largest: bytes of one message at most.
        open_to_all: how the full names of methods begin that strangers may call; they share a room.
        on_refusal: told the outcome of each call that finds no room.
    """

    def __init__(
        self,
        largest: int,
        *,
        open_to_all: Sequence[str],
        on_refusal: Callable[[str], None],
    ) -> None:
        self._room = Room(largest)
        self._strangers = Room(largest, at_once=1)
        self._open_to_all = tuple(open_to_all)
        self._on_refusal = on_refusal
        self._reading: dict[str, Handler] = {}

    @property
    def held(self) -> int:
        """Bytes of requests that are in memory."""
        return self._room.held + self._strangers.held

    async def intercept_service(  # type: ignore[override]  # there may be no handler, too
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of a call, of the kind that reads its message itself."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        reading = self._reading.get(details.method)
        if reading is None:
            is_open = details.method.startswith(self._open_to_all)
            reading = self._reading[details.method] = (
                self._reads_itself(handler, self._strangers, STRANGERS_SECONDS)
                if is_open
                else self._reads_itself(handler, self._room, ARRIVES_SECONDS)
            )
        return reading

    def _reads_itself(self, handler: Handler, room: Room, arrives: float) -> Handler:
        # grpc's types are those of servers with threads; under asyncio a behaviour is a coroutine.
        inner: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        parse = handler.request_deserializer

        async def answer(requests: object, context: Context) -> Any:  # noqa: ANN401  # as gRPC has it
            taken = _Taken(room, arrives)
            # An answer is about as large, and gRPC has it until it is read or the connection ends.
            context.add_done_callback(taken.leave)  # type: ignore[arg-type]  # declared as a class
            # No name for the message: whoever has decoded it lets go of it.
            return await inner(await self._read(taken, parse, context), context)

        async def stream(requests: object, context: Context) -> AsyncIterator[Any]:
            taken = _Taken(room, arrives)
            try:
                async with aclosing(inner(await self._read(taken, parse, context), context)) as replies:
                    async for reply in replies:
                        yield reply
            finally:
                taken.change(0)

        if handler.response_streaming:
            behaviour: Any = stream
            return grpc.stream_stream_rpc_method_handler(behaviour, None, handler.response_serializer)
        behaviour = answer
        return grpc.stream_unary_rpc_method_handler(behaviour, None, handler.response_serializer)

    async def _read(self, taken: _Taken, parse: Callable[[bytes], Any] | None, context: Context) -> Any:  # noqa: ANN401  # as gRPC has it
        failure: CallError
        raw = b""
        try:
            raw = await _received(taken, context)
            return raw if parse is None else parse(raw)
        except QueueFull as full:
            self._on_refusal(full.reason.lower())
            failure = bare(full)
        except DecodeError as error:
            failure = InvalidRequest(f"the request is no message of this method: {error}")
        except InvalidRequest as invalid:
            failure = bare(invalid)
        # What refuses keeps this frame, in a circle, until the garbage collector comes.
        raw = b""
        await refuse(context, failure)


class _Taken:
    """What one call has of the room."""

    __slots__ = ("_bytes", "arrives", "room")

    def __init__(self, room: Room, arrives: float) -> None:
        self.room, self.arrives, self._bytes = room, arrives, 0

    def change(self, n_bytes: int) -> None:
        self.room.held += n_bytes - self._bytes
        self._bytes = n_bytes

    def leave(self, context: Context) -> None:
        """When the call is over."""
        self.change(0)


async def _received(taken: _Taken, context: Context) -> bytes:
    room = taken.room
    if room.has(room.largest):
        taken.change(room.largest)
        raw = await _within(taken.arrives, context)
        if raw is None:
            raise InvalidRequest(
                f"the call's message did not come within {taken.arrives:g} s: send less at once"
            )
    else:
        # Who sends little must not wait for those who send much, and nobody can tell before it is read:
        # what has not come within a moment is much.
        async with room.trying:
            raw = await _within(MOMENT, context)
        if raw is None:
            raise room.full()
    if not isinstance(raw, bytes):
        raise InvalidRequest("the call ended without a request")
    taken.change(0)
    # What is small has the room of one more message for itself, so that large ones never shut it out.
    is_small = len(raw) <= room.largest // LARGEST_AT_ONCE
    if not room.has(len(raw) - (room.largest if is_small else 0)):
        raise room.full()
    taken.change(len(raw))
    return raw


async def _within(seconds: float, context: Context) -> object:
    """What is read, or None; whoever leaves before lets the reading come to its end."""
    reading = asyncio.ensure_future(context.read())
    reading.add_done_callback(unheard)
    await asyncio.wait({reading}, timeout=seconds)
    return reading.result() if reading.done() else None
