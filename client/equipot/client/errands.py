"""Requests that a server answers by a stream, bit by bit, and that outlive a connection. Opens none."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc

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
        retry: when to ask again after the server was unavailable.
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
    attempt = 1
    while errand.waits_for:
        try:
            with closing(way.ask(errand.request())) as replies:
                for reply in replies:
                    attempt = 1 if _gets_on(reply) else attempt
                    yield from errand.take(reply)
            _complete(errand)
            return
        except grpc.RpcError as error:
            problem, cause = _in_its_words(errand, way.understand(error)), error
        delay = way.retry.delay(problem, attempt, math.inf)
        if delay is None:
            raise problem from cause
        time.sleep(delay)
        attempt += 1


async def run_async(
    errand: Errand[RequestT, ReplyT, OutcomeT], way: AsyncWay[RequestT, ReplyT]
) -> AsyncIterator[OutcomeT]:
    """As `run`."""
    for outcome in errand.refused():
        yield outcome
    attempt = 1
    while errand.waits_for:
        try:
            async with aclosing(way.ask(errand.request())) as replies:
                async for reply in replies:
                    attempt = 1 if _gets_on(reply) else attempt
                    for outcome in errand.take(reply):
                        yield outcome
            _complete(errand)
            return
        except grpc.RpcError as error:
            problem, cause = _in_its_words(errand, await way.understand(error)), error
        delay = way.retry.delay(problem, attempt, math.inf)
        if delay is None:
            raise problem from cause
        await asyncio.sleep(delay)
        attempt += 1


def _gets_on(reply: Any) -> bool:  # noqa: ANN401  # protobuf's messages
    """Whether it tells of headway; that the request was let in is none."""
    return bool(reply.WhichOneof("kind") != "begun")


def _complete(errand: Errand[Any, Any, Any]) -> None:
    if errand.waits_for:
        raise ServerError(f"the answer ended with {errand.waits_for} structures unanswered")


def _in_its_words(errand: Errand[Any, Any, Any], problem: ClientError) -> ClientError:
    if errand.begun and isinstance(problem, ModelNotFound):
        return ModelChanged(f"{errand.begun}, which it began with, is gone: {problem}")
    return problem
