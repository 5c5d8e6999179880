"""The blocking client: one channel, a few requests in flight, answers in order."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc

from equipot.client.attempts import persist
from equipot.client.batches import Part, Priority, Wish, cut, gone_meanwhile
from equipot.client.channel import HEALTH_METHOD, Health, channel_options, decode_health
from equipot.client.credentials import Credentials, FileState, Tls, TokenSource
from equipot.client.errors import ClientError, LimitExceeded, ModelNotFound, from_rpc_error
from equipot.client.explanation import Explanation, explained, together
from equipot.client.jobs import Jobs, Line
from equipot.client.motions import Motions
from equipot.client.results import Limits, ModelInfo, Prediction, Predictions, numbered, same_model
from equipot.client.retry import Deadline, RetryPolicy
from equipot.client.session import Course, Session
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

_Reply = TypeVar("_Reply")


class _Pending(Protocol):
    """gRPC's future of an answer."""

    def result(self) -> pb.PredictResponse: ...
    def cancel(self) -> bool: ...


@dataclass(frozen=True, slots=True, eq=False)
class _UnderWay:
    """A part of a batch; without `request` nothing of it is to be sent, without `pending` it is not yet."""

    part: Part
    request: pb.PredictRequest | None
    pending: _Pending | None
    deadline: Deadline


class Client(Motions):
    """Asks a server for energies (eV), forces (eV/Å) and stress (eV/Å³).

    Use it as a context manager, or call `close`. Threads may share one. It may be pickled and copied: the
    copy connects by itself. gRPC does not survive `fork`: start worker processes by "spawn".

    Args:
        address: HOST:PORT.
        model: name, or "name@sha256:…" for one bundle exactly; empty: the server's default.
        timeout: seconds for each request, all its attempts included; `math.inf` waits for years. A large
            batch makes many requests.
        retry: when to try again after the server was unavailable.
        max_message_bytes: no request is larger; the server's own limit holds too.
        atoms_per_request: a batch is cut into requests of about this many atoms.
        in_flight: how many requests are under way at once.
        tls: how to encrypt, and whom to trust; None: not encrypted.
        token: to show with each call.
        token_file: whose text is shown instead, read again when the file changes.
        allow_plaintext_token: whether a token may leave this machine unencrypted.
        priority: "low" lets others go first; "high" goes first where the server grants it to this caller.

    Raises:
        ClientError: every method raises its subclasses, see `equipot.client.errors`.
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
        self.__setstate__(
            Settings(
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
        )

    def __getstate__(self) -> Settings:
        return self._settings

    def __setstate__(self, settings: Settings) -> None:
        self._settings = settings
        self._token = TokenSource(settings.credentials)
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._retired: deque[grpc.Channel] = deque()
        self._files: FileState = ()
        self._stub: PotentialServiceStub | None = None
        self._process = 0
        self._closed = False
        self._limits: dict[str, Limits] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.address!r}, model={self._settings.model!r})"

    def __enter__(self) -> Self:
        """The client itself; it connects at the first call."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the connection."""
        self.close()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self._settings.address

    @property
    def model_name(self) -> str:
        """The model that is asked for; empty: the server's default."""
        return self._settings.model

    def close(self) -> None:
        """Closes the connection; requests under way are cancelled."""
        with self._lock:
            self._closed = True
            if self._channel is not None and self._process == os.getpid():
                for channel in (*self._retired, self._channel):
                    channel.close()
            self._retired.clear()
            self._channel = self._stub = None

    def predict(
        self,
        structures: StructuresLike,
        *,
        timeout: float | None = None,
        **asked: Unpack[Asked],
    ) -> Predictions:
        """Energies, and what else is asked for; a bad structure has its failure, the others go on.

        Args:
            structures: `ase.Atoms`, `Structure`, a dict of its fields, any iterable of these, or
                `StructureArrays`. Charge and spin of Atoms are taken from `atoms.info`.
            timeout: seconds for each request, another than the client's.
            asked: forces (True), stress (False), level_of_theory, model, uncertainty (False); see `Asked`.

        Raises:
            ModelChanged: the server changed its model between two parts of the batch.
            ClientError: the call as a whole failed, see the subclasses.
        """
        wish = self._settings.wish(asked)
        parts = list(self._parts(structures, wish, self._settings.seconds(timeout)))
        return Predictions.concatenate(parts, forces=wish.forces, stress=wish.stress)

    def predict_iter(
        self,
        structures: StructuresLike,
        *,
        timeout: float | None = None,
        **asked: Unpack[Asked],
    ) -> Generator[Prediction, None, None]:
        """As `predict`, one after the other while the structures are read: memory stays bounded."""
        wish = self._settings.wish(asked)
        known, start = None, 0
        for part in self._parts(structures, wish, self._settings.seconds(timeout)):
            known = same_model(known, part.model)
            yield from numbered(part, start)
            start += len(part)

    def explain(
        self,
        structures: StructuresLike,
        *,
        timeout: float | None = None,
        **asked: Unpack[Asked],
    ) -> Explanation:
        """What `predict` with the same arguments would cost now: sizes, failures, seconds; computes nothing.

        Raises:
            ModelChanged: the server changed its model between two parts of the batch.
            ClientError: the call as a whole failed, see the subclasses.
        """
        wish = self._settings.wish(asked)
        seconds = self._settings.seconds(timeout)
        parts: list[Explanation] = []
        for part in self._cut(structures, wish, seconds):
            if not part.structures:
                parts.append(explained(part, None, 0.0))
                continue
            request, begun = wish.request(part.structures), time.perf_counter()
            response = self._ask(self._connected().Explain, request, seconds)
            parts.append(explained(part, response, time.perf_counter() - begun))
        return together(parts)

    def session(
        self,
        structures: StructuresLike,
        *,
        skin: float = 0.0,
        timeout: float | None = None,
        **asked: Unpack[Asked],
    ) -> Session:
        """Opens a session for structures that are asked for again and again as their atoms move.

        Args:
            structures: as of `predict`; their positions count for nothing yet.
            skin: Å around the cutoff within which the server keeps neighbours; 0: its own choice.
            timeout: seconds for each step, another than the client's.
            asked: as of `predict`, for each step that does not say otherwise.

        Raises:
            InvalidStructure: one of the structures cannot be one; or there are none.
        """
        wish = self._settings.wish(asked)
        course = Course([as_structure(item) for item in each_structure(structures)], wish, skin)
        return Session(
            lambda: partial(self._connected().Session, metadata=self._token.headers()),
            course,
            address=self.address,
            retry=self._settings.retry,
            timeout=self._settings.seconds(timeout),
        )

    @property
    def jobs(self) -> Jobs:
        """Work that the server keeps, and goes on with whether anybody is connected or not."""
        line = Line(self._settings, self._open_channel, self._token, self.model, self._understand)
        return Jobs(line)

    def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """The models that the server serves."""
        reply = self._ask(self._connected().ListModels, pb.ListModelsRequest(), timeout)
        return tuple(ModelInfo.from_wire(model) for model in reply.models)

    def model(self, name: str | None = None, *, timeout: float | None = None) -> ModelInfo:
        """One model with its card; None: the client's own, empty: the server's default.

        Raises:
            ModelNotFound: the server does not serve it.
        """
        wanted = self._settings.model if name is None else name
        info = ModelInfo.from_wire(
            self._ask(
                self._connected().GetModel,
                pb.GetModelRequest(model=wanted, session=self._settings.session),
                timeout,
            )
        )
        self._limits[wanted] = info.limits
        return info

    def health(self, *, timeout: float | None = None) -> Health:
        """What the server says of itself now; never retried.

        Raises:
            ServerUnavailable: nothing answers.
        """
        check = self._open_channel().unary_unary(HEALTH_METHOD, None, None)
        try:
            return decode_health(check(b"", timeout=self._settings.seconds(timeout)))
        except grpc.RpcError as error:
            raise self._settings.explained(from_rpc_error(error, self.address)) from error

    def _understand(self, error: grpc.RpcError) -> ClientError:
        return self._settings.explained(from_rpc_error(error, self.address))

    def _parts(self, structures: StructuresLike, wish: Wish, timeout: float) -> Iterator[Predictions]:
        parts = self._cut(structures, wish, timeout)
        queue: deque[_UnderWay] = deque()
        first, second = next(parts, None), next(parts, None)
        if first is not None and second is None:
            # With nothing to overlap, a blocking call is faster than a future: it changes no thread.
            yield self._receive(wish, self._send(wish, first, timeout, at_once=False))
            return
        if second is not None:
            # Its name may come to mean another version before the last part is sent.
            info = self.model(wish.model, timeout=timeout)
            wish = wish.settle(info.name, info.digest)
        try:
            for part in itertools.chain((first, second), parts):
                if part is not None:
                    queue.append(self._send(wish, part, timeout, at_once=True))
                if len(queue) == self._settings.in_flight:
                    yield self._receive(wish, queue.popleft())
            while queue:
                yield self._receive(wish, queue.popleft())
        finally:
            for sent in queue:
                if sent.pending is not None:
                    sent.pending.cancel()

    def _cut(self, structures: StructuresLike, wish: Wish, timeout: float) -> Iterator[Part]:
        limits = self._limits.get(wish.model) or self.model(wish.model, timeout=timeout).limits
        return cut(
            each_structure(structures),
            limits,
            atoms_per_request=self._settings.atoms_per_request,
            max_message_bytes=self._settings.max_message_bytes,
        )

    def _send(self, wish: Wish, part: Part, timeout: float, *, at_once: bool) -> _UnderWay:
        deadline = Deadline(timeout)
        request = wish.request(part.structures) if part.structures else None
        pending: _Pending | None = None
        if request is not None and at_once:
            pending = self._connected().Predict.future(
                request, timeout=deadline.remaining, metadata=self._token.headers()
            )
        return _UnderWay(part, request, pending, deadline)

    def _receive(self, wish: Wish, sent: _UnderWay) -> Predictions:
        request = sent.request
        if request is None:
            return sent.part.merge(wish, None)

        def attempt() -> pb.PredictResponse:
            timeout = sent.deadline.require()
            return self._connected().Predict(request, timeout=timeout, metadata=self._token.headers())

        first = attempt if sent.pending is None else sent.pending.result
        try:
            response = self._persist(first, attempt, sent.deadline)
        except LimitExceeded:
            # Another server with other limits may stand at the address by now.
            self._limits.clear()
            raise
        except ModelNotFound as error:
            raise gone_meanwhile(wish, error) from error
        return sent.part.merge(wish, response)

    def _ask(self, method: Callable[..., _Reply], request: object, timeout: float | None) -> _Reply:
        deadline = Deadline(self._settings.seconds(timeout))

        def attempt() -> _Reply:
            return method(request, timeout=deadline.require(), metadata=self._token.headers())

        return self._persist(attempt, attempt, deadline)

    def _persist(
        self, first: Callable[[], _Reply], again: Callable[[], _Reply], deadline: Deadline
    ) -> _Reply:
        return persist(first, again, deadline, self._settings.retry, self._understand)

    def _open_channel(self) -> grpc.Channel:
        self._connected()
        assert self._channel is not None
        return self._channel

    def _connected(self) -> PotentialServiceStub:
        with self._lock:
            if self._closed:
                raise ClientError(f"the client of {self.address} is closed: make another one")
            credentials = self._settings.credentials
            if self._channel is not None and credentials.is_renewed(self._files):
                # Calls under way end on the connection they began on; those of two renewals ago are over.
                self._retired.append(self._channel)
                if len(self._retired) > 1:
                    self._retired.popleft().close()
                self._channel = self._stub = None
            if self._stub is None:
                options = channel_options(self.address, self._settings.max_message_bytes)
                self._files = credentials.state()
                self._channel = credentials.open(self.address, options)
                self._stub = PotentialServiceStub(self._channel)
                self._process = os.getpid()
            elif self._process != os.getpid():
                raise ClientError(
                    f"the client of {self.address} was connected before this process was forked: start "
                    "workers by multiprocessing.get_context('spawn'), each with a client of its own"
                )
            return self._stub
