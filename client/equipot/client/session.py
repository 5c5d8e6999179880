"""Sessions: structures that are asked for again and again as their atoms move."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import numpy.typing as npt

from equipot.client.batches import PRIORITIES, Part, Wish
from equipot.client.errors import (
    ClientError,
    DeadlineExceeded,
    InvalidStructure,
    ModelChanged,
    ModelNotFound,
    ServerError,
    from_rpc_error,
)
from equipot.client.results import ModelReference, Predictions
from equipot.client.retry import Deadline, RetryPolicy
from equipot.client.structures import Structure, pack
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import FloatArray, encode_structures

LOOK_SECONDS = 0.2
"""How often a session looks whether its server is late; a thread woken by every step would cost more."""


class Course:
    """What a session is about, and how far it has come: messages there and back. Sends nothing itself."""

    def __init__(self, structures: Sequence[Structure], wish: Wish, skin: float) -> None:
        if not structures:
            raise InvalidStructure("structures", "a session of no structures", "give at least one")
        self._structures = encode_structures(pack(list(structures)))
        self._structures.positions = b""
        self._part = Part()
        for structure in structures:
            self._part.add(structure)
        self._n_atoms = self._part.size
        self._cell = np.stack([structure.cell for structure in structures])
        self._wish = wish
        self._skin = skin
        self._number = 0
        self.model: ModelReference | None = None

    def opening(self) -> pb.SessionRequest:
        """The first message of a stream: the bundle that answered, if one did, and the cell as it is."""
        if self._cell.any():
            self._structures.cell = self._cell.astype("<f8").tobytes()
        return pb.SessionRequest(
            open=pb.SessionOpen(
                model=self._wish.model if self.model is None else self.model.pinned,
                structures=self._structures,
                properties=self._wish.properties,
                level_of_theory=self._wish.level_of_theory,
                skin=self._skin,
                priority=PRIORITIES[self._wish.priority],
                session=self._wish.session,
                uncertainty=self._wish.options,
            )
        )

    def step(
        self,
        positions: npt.ArrayLike,
        cell: npt.ArrayLike | None,
        *,
        forces: bool | None,
        stress: bool | None,
        timeout: float,
    ) -> tuple[Wish, pb.SessionStep]:
        """The next step and what it asks for.

        Raises:
            InvalidStructure: positions or cell of another shape.
        """
        wish = self._wish.with_properties(forces=forces, stress=stress)
        self._number += 1
        step = pb.SessionStep(
            number=self._number,
            positions=_array("positions", positions, (self._n_atoms, 3)).tobytes(),
            properties=[] if wish == self._wish else wish.properties,
            timeout_seconds=timeout,
        )
        if cell is not None:
            new = _array("cell", cell, (len(self._cell), 3, 3))
            if not np.array_equal(new, self._cell):
                self._cell = new
                step.cell = new.tobytes()
        return wish, step

    def answer(self, wish: Wish, step: pb.SessionStep, reply: pb.SessionReply) -> Predictions:
        """The predictions in a reply.

        Raises:
            ServerError: it is not the reply to this step.
            ModelChanged: another bundle answers than before.
        """
        if reply.number != step.number:
            raise ServerError(f"step {step.number} of a session was answered as step {reply.number}")
        predictions = self._part.merge(wish, reply.answer)
        now = predictions.model
        if self.model is not None and now is not None and now.digest != self.model.digest:
            raise ModelChanged(f"{now.pinned} answers a session that began with {self.model.pinned}")
        self.model = self.model or now
        return predictions

    def understand(self, problem: ClientError) -> ClientError:
        """The error, in the words of a session that has a bundle already."""
        if self.model is None or not isinstance(problem, ModelNotFound):
            return problem
        return ModelChanged(f"{self.model.pinned}, which the session began with, is gone: {problem}")


class Session:
    """The same structures again and again as their atoms move; made by `Client.session`.

    Each step costs a third less than a `predict`: the server keeps what does not change, and the neighbour
    lists. A lost connection is opened again at the same step, with the same bundle or an error; no answer is
    ever that of another step. Use it as a context manager, or call `close`. One thread at a time.

    Attributes:
        model: the bundle that answers; None before the first answer.
    """

    def __init__(
        self,
        connect: Callable[[], Callable[..., Any]],
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
        self._stream: _Stream | None = None
        self._watch = _Watch()
        self._finalize = weakref.finalize(self, self._watch.close)

    def __enter__(self) -> Self:
        """The session itself; it opens at the first step."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the session."""
        self.close()

    @property
    def model(self) -> ModelReference | None:
        """The bundle that answers."""
        return self._course.model

    def close(self) -> None:
        """Ends the session; the server forgets it."""
        self._drop()
        self._finalize()

    def predict(
        self,
        positions: npt.ArrayLike,
        cell: npt.ArrayLike | None = None,
        *,
        forces: bool | None = None,
        stress: bool | None = None,
        timeout: float | None = None,
    ) -> Predictions:
        """Answers for the structures with these positions.

        Args:
            positions: (N, 3) in Å, structure after structure.
            cell: (S, 3, 3) in Å; None: as it was.
            forces: whether forces are wanted; None: as the session was made.
            stress: likewise.
            timeout: seconds for this step, all its attempts included; another than the session's.

        Raises:
            InvalidStructure: positions or cell of another shape than the session's structures have.
            ModelChanged: the bundle that the session began with is no longer served.
            ClientError: see `equipot.client.errors`; the session goes on with the next step.
        """
        if not self._finalize.alive:
            raise ClientError(f"the session with {self._address} is closed: make another one")
        seconds = self._timeout if timeout is None else timeout
        deadline = Deadline(seconds)
        wish, step = self._course.step(positions, cell, forces=forces, stress=stress, timeout=seconds)
        attempt = 1
        while True:
            try:
                step.timeout_seconds = deadline.require()
                return self._course.answer(wish, step, self._ask(step, deadline))
            except grpc.RpcError as error:
                problem, cause = self._course.understand(from_rpc_error(error, self._address)), error
            except BaseException:
                # A reply that comes later would be taken for that of the next step.
                self._drop()
                raise
            self._drop()
            if deadline.remaining <= 0:
                raise DeadlineExceeded(f"no answer from {self._address} within {seconds:g} s") from cause
            delay = self._retry.delay(problem, attempt, deadline.remaining)
            if delay is None:
                raise problem from cause
            time.sleep(delay)
            attempt += 1

    def _ask(self, step: pb.SessionStep, deadline: Deadline) -> pb.SessionReply:
        if self._stream is None:
            self._stream = _Stream(self._connect())
            self._stream.send(self._course.opening())
        self._watch.begin(self._stream, deadline)
        try:
            self._stream.send(pb.SessionRequest(step=step))
            return self._stream.receive()
        finally:
            self._watch.end()

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


class Ended(grpc.RpcError):
    """The server ended a stream without an error, as proxies do."""

    def code(self) -> grpc.StatusCode:
        """As of any server that went."""
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        """In words."""
        return "the session was ended"

    def trailing_metadata(self) -> tuple[Any, ...]:
        """None came."""
        return ()


class _Stream:
    """One call of `Session`: requests through a queue that gRPC's own thread empties."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._outbox: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        self._call = method(iter(self._outbox.get, None))

    def send(self, request: pb.SessionRequest) -> None:
        self._outbox.put(request)

    def receive(self) -> pb.SessionReply:
        try:
            reply: pb.SessionReply = next(self._call)
        except StopIteration:
            raise Ended from None
        return reply

    def cancel(self) -> None:
        self._call.cancel()

    def close(self) -> None:
        self._outbox.put(None)
        self._call.cancel()


class _Watch:
    """Cancels a step that its server does not answer in time: a stream has no deadlines of its own."""

    def __init__(self) -> None:
        self._current: tuple[_Stream, Deadline] | None = None
        self._stream: _Stream | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, stream: _Stream, deadline: Deadline) -> None:
        self._stream = stream
        self._current = stream, deadline
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="equipot-session", daemon=True)
            self._thread.start()

    def end(self) -> None:
        self._current = None

    def close(self) -> None:
        """Lets the thread go, and the stream of a session that nobody closed."""
        self._closed.set()
        if self._stream is not None:
            self._stream.close()

    def _look(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            current = self._current
            if current is not None and current[1].remaining <= 0:
                current[0].cancel()


def _array(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    array = np.asarray(values, dtype="<f8")
    if array.shape != shape:
        raise InvalidStructure(
            name,
            f"has shape {array.shape}, the session's structures have {shape}",
            "open another session for other structures",
        )
    return array
