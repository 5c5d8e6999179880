"""The same client for asyncio: answers bit for bit those of the blocking one."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, cast

import grpc
import grpc.aio

from equipot.client.aio_jobs import AsyncJobs, AsyncLine
from equipot.client.aio_motions import AsyncMotions
from equipot.client.aio_session import AsyncSession
from equipot.client.batches import Part, Priority, Wish, cut, gone_meanwhile
from equipot.client.channel import HEALTH_METHOD, Health, channel_options, decode_health
from equipot.client.credentials import Credentials, FileState, Tls, TokenSource
from equipot.client.errors import ClientError, LimitExceeded, ModelNotFound, from_rpc_error
from equipot.client.explanation import Explanation, explained, together
from equipot.client.results import Limits, ModelInfo, Prediction, Predictions, numbered, same_model
from equipot.client.retry import Deadline, RetryPolicy
from equipot.client.session import Course
from equipot.client.settings import (
    DEFAULT_ATOMS_PER_REQUEST,
    DEFAULT_IN_FLIGHT,
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TIMEOUT,
    Asked,
    Settings,
)
from equipot.client.structures import StructuresLike, as_structure, each_structure
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

if TYPE_CHECKING:
    from equipot.wire.v1.potential_pb2_grpc import PotentialServiceAsyncStub

_Reply = TypeVar("_Reply")


class AsyncClient(AsyncMotions):
    """`equipot.client.Client` for asyncio: the same arguments, methods, results and errors.

    Use it as an asynchronous context manager, or await `close`. It belongs to the loop of its first call.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        timeout: float = DEFAULT_TIMEOUT,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        atoms_per_request: int = DEFAULT_ATOMS_PER_REQUEST,
        in_flight: int = DEFAULT_IN_FLIGHT,
        tls: Tls | None = None,
        token: str = "",
        token_file: str | os.PathLike[str] | None = None,
        allow_plaintext_token: bool = False,
        priority: Priority = "normal",
    ) -> None:
        self._settings = Settings(
            address=address,
            model=model,
            timeout=timeout,
            retry=retry or RetryPolicy(),
            max_message_bytes=max_message_bytes,
            atoms_per_request=atoms_per_request,
            in_flight=in_flight,
            credentials=Credentials(
                tls=tls,
                token=token,
                token_file=token_file,
                allow_plaintext_token=allow_plaintext_token,
            ),
            priority=priority,
        )
        self._token = TokenSource(self._settings.credentials)
        self._channel: grpc.aio.Channel | None = None
        # One that drops out, two renewals later, closes itself.
        self._retired: deque[grpc.aio.Channel] = deque(maxlen=2)
        self._files: FileState = ()
        self._stub: PotentialServiceAsyncStub | None = None
        self._closed = False
        self._limits: dict[str, Limits] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.address!r}, model={self._settings.model!r})"

    async def __aenter__(self) -> Self:
        """The client itself; it connects at the first call."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the connection."""
        await self.close()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self._settings.address

    async def close(self) -> None:
        """Closes the connection; requests under way are cancelled."""
        self._closed = True
        if self._channel is not None:
            for channel in (*self._retired, self._channel):
                await channel.close(None)
        self._retired.clear()
        self._channel = self._stub = None

    async def predict(
        self,
        structures: StructuresLike,
        *,
        timeout: float | None = None,
        **asked: Unpack[Asked],
    ) -> Predictions:
        """As `Client.predict`."""
        wish = self._settings.wish(asked)
        parts = [part async for part in self._parts(structures, wish, self._settings.seconds(timeout))]
        return Predictions.concatenate(parts, forces=wish.forces, stress=wish.stress)

    async def predict_iter(
        self,
        structures: StructuresLike,
        *,
        timeout: float | None = None,
        **asked: Unpack[Asked],
    ) -> AsyncGenerator[Prediction, None]:
        """As `Client.predict_iter`."""
        wish = self._settings.wish(asked)
        known, start = None, 0
        async for part in self._parts(structures, wish, self._settings.seconds(timeout)):
            known = same_model(known, part.model)
            for prediction in numbered(part, start):
                yield prediction
            start += len(part)

    async def explain(
        self,
        structures: StructuresLike,
        *,
        timeout: float | None = None,
        **asked: Unpack[Asked],
    ) -> Explanation:
        """As `Client.explain`."""
        stub = self._connected()
        wish = self._settings.wish(asked)
        seconds = self._settings.seconds(timeout)
        parts: list[Explanation] = []
        for part in await self._cut(structures, wish, seconds):
            if not part.structures:
                parts.append(explained(part, None, 0.0))
                continue
            request, begun = wish.request(part.structures), time.perf_counter()
            response = await self._persist(partial(_explain, stub, self._token, request), seconds)
            parts.append(explained(part, response, time.perf_counter() - begun))
        return together(parts)

    def session(
        self,
        structures: StructuresLike,
        *,
        skin: float = 0.0,
        timeout: float | None = None,
        **asked: Unpack[Asked],
    ) -> AsyncSession:
        """As `Client.session`; it opens at its first step."""
        wish = self._settings.wish(asked)
        course = Course([as_structure(item) for item in each_structure(structures)], wish, skin)
        return AsyncSession(
            # Without requests to iterate over, they are written one by one.
            lambda: self._connected().Session(cast("Any", None), metadata=self._token.headers()),
            course,
            address=self.address,
            retry=self._settings.retry,
            timeout=self._settings.seconds(timeout),
        )

    @property
    def jobs(self) -> AsyncJobs:
        """As `Client.jobs`."""
        return AsyncJobs(
            AsyncLine(self._settings, self._open_channel, self._token, self.model, self._understand)
        )

    async def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """As `Client.models`."""
        stub = self._connected()
        reply = await self._persist(
            lambda seconds: stub.ListModels(
                pb.ListModelsRequest(), timeout=seconds, metadata=self._token.headers()
            ),
            self._settings.seconds(timeout),
        )
        return tuple(ModelInfo.from_wire(model) for model in reply.models)

    async def model(self, name: str | None = None, *, timeout: float | None = None) -> ModelInfo:
        """As `Client.model`."""
        stub = self._connected()
        wanted = self._settings.model if name is None else name
        request = pb.GetModelRequest(model=wanted, session=self._settings.session)
        reply = await self._persist(
            lambda seconds: stub.GetModel(request, timeout=seconds, metadata=self._token.headers()),
            self._settings.seconds(timeout),
        )
        info = ModelInfo.from_wire(reply)
        self._limits[wanted] = info.limits
        return info

    async def health(self, *, timeout: float | None = None) -> Health:
        """As `Client.health`."""
        self._connected()
        assert self._channel is not None
        check = self._channel.unary_unary(HEALTH_METHOD, None, None)
        try:
            return decode_health(await check(b"", timeout=self._settings.seconds(timeout)))
        except grpc.RpcError as error:
            raise await self._understand(error) from error

    async def _understand(self, error: grpc.RpcError) -> ClientError:
        # Which may ask again why a handshake failed.
        return await asyncio.to_thread(self._settings.explained, from_rpc_error(error, self.address))

    async def _parts(
        self, structures: StructuresLike, wish: Wish, timeout: float
    ) -> AsyncIterator[Predictions]:
        parts = await self._cut(structures, wish, timeout)
        queue: deque[asyncio.Task[Predictions]] = deque()
        begin = list(itertools.islice(parts, 2))
        if len(begin) == 2:
            # Its name may come to mean another version before the last part is sent.
            info = await self.model(wish.model, timeout=timeout)
            wish = wish.settle(info.name, info.digest)
        try:
            for part in itertools.chain(begin, parts):
                queue.append(asyncio.create_task(self._answer(wish, part, timeout)))
                if len(queue) == self._settings.in_flight:
                    yield await queue.popleft()
            while queue:
                yield await queue.popleft()
        finally:
            for task in queue:
                task.cancel()
            await asyncio.gather(*queue, return_exceptions=True)

    async def _cut(self, structures: StructuresLike, wish: Wish, timeout: float) -> Iterator[Part]:
        limits = self._limits.get(wish.model) or (await self.model(wish.model, timeout=timeout)).limits
        return cut(
            each_structure(structures),
            limits,
            atoms_per_request=self._settings.atoms_per_request,
            max_message_bytes=self._settings.max_message_bytes,
        )

    async def _answer(self, wish: Wish, part: Part, timeout: float) -> Predictions:
        if not part.structures:
            return part.merge(wish, None)
        stub = self._connected()
        request = wish.request(part.structures)
        try:
            response = await self._persist(
                lambda seconds: stub.Predict(request, timeout=seconds, metadata=self._token.headers()),
                timeout,
            )
        except LimitExceeded:
            # Another server with other limits may stand at the address by now.
            self._limits.clear()
            raise
        except ModelNotFound as error:
            raise gone_meanwhile(wish, error) from error
        return part.merge(wish, response)

    async def _persist(self, call: Callable[[float], Awaitable[_Reply]], timeout: float) -> _Reply:
        deadline, attempt = Deadline(timeout), 1
        while True:
            try:
                return await call(deadline.require())
            except grpc.RpcError as error:
                problem = await self._understand(error)
                delay = self._settings.retry.delay(problem, attempt, deadline.remaining)
                if delay is None:
                    raise problem from error
            await asyncio.sleep(delay)
            attempt += 1

    def _open_channel(self) -> grpc.aio.Channel:
        self._connected()
        assert self._channel is not None
        return self._channel

    def _connected(self) -> PotentialServiceAsyncStub:
        if self._closed:
            raise ClientError(f"the client of {self.address} is closed: make another one")
        credentials = self._settings.credentials
        if self._channel is not None and credentials.is_renewed(self._files):
            # Calls under way end on the connection they began on.
            self._retired.append(self._channel)
            self._channel = self._stub = None
        if self._stub is None:
            options = channel_options(self.address, self._settings.max_message_bytes)
            self._files = credentials.state()
            self._channel = credentials.open_aio(self.address, options)
            self._stub = cast("PotentialServiceAsyncStub", PotentialServiceStub(self._channel))
        return self._stub


def _explain(
    stub: PotentialServiceAsyncStub, token: TokenSource, request: pb.PredictRequest, seconds: float
) -> Awaitable[pb.ExplainResponse]:
    return stub.Explain(request, timeout=seconds, metadata=token.headers())
