"""Requests that a server answers by a stream, bit by bit, and that outlive a connection. Opens none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc

from equipot.client.attempts import Tries
from equipot.client.errors import ClientError, ModelChanged, ModelNotFound, ServerError
from equipot.client.retry import RetryPolicy

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
OutcomeT = TypeVar("OutcomeT")
RequestT_co = TypeVar("RequestT_co", covariant=True)
ReplyT_contra = TypeVar("ReplyT_contra", contravariant=True)
OutcomeT_co = TypeVar("OutcomeT_co", covariant=True)


class Errand(Protocol[RequestT_co, ReplyT_contra, OutcomeT_co]):
    """What is still to be asked for, and what answers mean."""

    @property
    def waits_for(self) -> int:
        """How many structures have no result yet."""

    @property
    def headway(self) -> int:
        """How often it got further than it ever was: what came a second time is none."""

    @property
    def begun(self) -> str:
        """The bundle that it began with; empty: it may be answered by any."""

    def refused(self) -> Iterable[OutcomeT_co]:
        """What is known before anything is asked: structures that are not sent."""

    def request(self) -> RequestT_co:
        """What to ask for now: all that has no result yet."""

    def take(self, reply: ReplyT_contra) -> Iterable[OutcomeT_co]:
        """What a reply to the last request means."""


@dataclass(frozen=True, slots=True)
class Way(Generic[RequestT, ReplyT]):
    """How requests travel.

    Attributes:
        ask: sends one and reads its answers.
        understand: gRPC's error in our words.
        retry: when to ask again after the server was unavailable; counts tries in a row without headway.
    """

    ask: Callable[[RequestT], Generator[ReplyT, None, None]]
    understand: Callable[[grpc.RpcError], ClientError]
    retry: RetryPolicy


@dataclass(frozen=True, slots=True)
class AsyncWay(Generic[RequestT, ReplyT]):
    """As `Way`, for asyncio."""

    ask: Callable[[RequestT], AsyncGenerator[ReplyT, None]]
    understand: Callable[[grpc.RpcError], Awaitable[ClientError]]
    retry: RetryPolicy


def run(errand: Errand[RequestT, ReplyT, OutcomeT], way: Way[RequestT, ReplyT]) -> Iterator[OutcomeT]:
    """All that the errand comes to, asking again for the rest whenever the connection is lost.

    Raises:
        ModelChanged: the bundle that it began with is gone.
        ClientError: the request as a whole failed.
    """
    yield from errand.refused()
    tries = _Headway(errand, way.retry)
    while errand.waits_for:
        try:
            with closing(way.ask(errand.request())) as replies:
                for reply in replies:
                    yield from errand.take(reply)
            _complete(errand)
            return
        except grpc.RpcError as error:
            delay = tries.delay(way.understand(error), error)
        time.sleep(delay)


async def run_async(
    errand: Errand[RequestT, ReplyT, OutcomeT], way: AsyncWay[RequestT, ReplyT]
) -> AsyncIterator[OutcomeT]:
    """As `run`."""
    for outcome in errand.refused():
        yield outcome
    tries = _Headway(errand, way.retry)
    while errand.waits_for:
        try:
            async with aclosing(way.ask(errand.request())) as replies:
                async for reply in replies:
                    for outcome in errand.take(reply):
                        yield outcome
            _complete(errand)
            return
        except grpc.RpcError as error:
            delay = tries.delay(await way.understand(error), error)
        await asyncio.sleep(delay)


class _Headway:
    """Counts an errand's tries by how far it has got."""

    def __init__(self, errand: Errand[Any, Any, Any], retry: RetryPolicy) -> None:
        self._errand, self._tries, self._stood = errand, Tries(retry), 0

    def delay(self, problem: ClientError, cause: grpc.RpcError) -> float:
        """As `Tries.delay`."""
        before, self._stood = self._stood, self._errand.headway
        return self._tries.delay(_in_its_words(self._errand, problem), cause, got_on=self._stood > before)


def _complete(errand: Errand[Any, Any, Any]) -> None:
    if errand.waits_for:
        raise ServerError(f"the answer ended with {errand.waits_for} structures unanswered")


def _in_its_words(errand: Errand[Any, Any, Any], problem: ClientError) -> ClientError:
    if errand.begun and isinstance(problem, ModelNotFound):
        return ModelChanged(f"{errand.begun}, which it began with, is gone: {problem}")
    return problem
