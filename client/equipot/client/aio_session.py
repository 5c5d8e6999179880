"""Sessions for asyncio: as `session`, with the same answers and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
import numpy.typing as npt

from equipot.client.errors import ClientError, DeadlineExceeded, from_rpc_error
from equipot.client.results import ModelReference, Predictions
from equipot.client.retry import Deadline, RetryPolicy
from equipot.client.session import Course, Ended
from equipot.wire.v1 import potential_pb2 as pb

_BROKEN = "Internal error from Core"


class AsyncSession:
    """`equipot.client.Session` for asyncio, made by `AsyncClient.session`. One step at a time.

    Use it as an asynchronous context manager, or call `close`.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        course: Course,
        *,
        address: str,
        retry: RetryPolicy,
        timeout: float,
    ) -> None:
        self._connect = connect
        self._course = course
        self._address = address
        self._retry = retry
        self._timeout = timeout
        self._stream: Any = None
        self._closed = False

    async def __aenter__(self) -> Self:
        """The session itself; it opens at the first step."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the session."""
        self.close()

    @property
    def model(self) -> ModelReference | None:
        """The bundle that answers; None before the first answer."""
        return self._course.model

    def close(self) -> None:
        """Ends the session; the server forgets it."""
        self._closed = True
        self._drop()

    async def predict(
        self,
        positions: npt.ArrayLike,
        cell: npt.ArrayLike | None = None,
        *,
        forces: bool | None = None,
        stress: bool | None = None,
        timeout: float | None = None,
    ) -> Predictions:
        """As `Session.predict`."""
        if self._closed:
            raise ClientError(f"the session with {self._address} is closed: make another one")
        seconds = self._timeout if timeout is None else timeout
        deadline = Deadline(seconds)
        wish, step = self._course.step(positions, cell, forces=forces, stress=stress, timeout=seconds)
        attempt = 1
        while True:
            try:
                step.timeout_seconds = deadline.require()
                async with asyncio.timeout(step.timeout_seconds):
                    return self._course.answer(wish, step, await self._ask(step))
            except TimeoutError as error:
                self._drop()
                raise DeadlineExceeded(f"no answer from {self._address} within {seconds:g} s") from error
            except grpc.RpcError as error:
                problem, cause = self._course.understand(from_rpc_error(error, self._address)), error
            except BaseException:
                # A reply that comes later would be taken for that of the next step.
                self._drop()
                raise
            self._drop()
            delay = self._retry.delay(problem, attempt, deadline.remaining)
            if delay is None:
                raise problem from cause
            await asyncio.sleep(delay)
            attempt += 1

    async def _ask(self, step: pb.SessionStep) -> pb.SessionReply:
        if self._stream is None:
            self._stream = self._connect()
            await self._write(self._course.opening())
        await self._write(pb.SessionRequest(step=step))
        reply = await self._stream.read()
        # Else gRPC's mark of the end.
        if not isinstance(reply, pb.SessionReply):
            raise Ended
        return reply

    async def _write(self, request: pb.SessionRequest) -> None:
        try:
            await self._stream.write(request)
        except asyncio.InvalidStateError:
            # The server has ended the stream; reading says why.
            await self._stream.read()
            raise Ended from None
        except grpc.RpcError as error:
            # What gRPC makes of a connection that breaks at this very moment.
            if _BROKEN in str(error):
                raise Ended from error
            raise

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()
