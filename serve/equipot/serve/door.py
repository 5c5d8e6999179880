"""What every call passes before it is answered: who asks, under which id, and whether it may now.

When it is done it gets its line in the log. Knows no service: which are open to all is told.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
from prometheus_client import Gauge

from equipot.serve.call import ANONYMOUS, Call, current_call, enter
from equipot.serve.errors import CallError, DeadlinePassed, Unauthenticated
from equipot.serve.logs import write
from equipot.serve.open_streams import OpenStreams
from equipot.serve.patience import Patience
from equipot.serve.quotas import Account, Quotas
from equipot.serve.reread import Reread
from equipot.serve.status import REQUEST_ID, Context, refuse
from equipot.serve.tokens import Tokens, digest_of

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_TRACE = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-")

_END = object()

access = logging.getLogger("equipot.access")


class Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # at run time it takes none
    """Lets calls in, each as a `Call` that its task finds by `current_call`.

    Args:
        tokens: whoever calls must show one of them; None asks for none.
        quotas: what each identity may ask for.
        open_to_all: how the full names of methods begin that are answered without any of this, as to probes.
        certificates_name: whether callers show certificates, which then tell who they are if tokens do not.
        on_refusal: told the outcome of each call that is turned away here.
        on_stream: told each call that was a stream, when it has ended.
        on_done: told each call when its answer has left, with its phases; None if nobody wants to know.
        under_way: counts the calls that were let in and have not ended.
        patience: with callers who do not read their replies.
    """

    def __init__(
        self,
        *,
        tokens: Reread[Tokens] | None,
        quotas: Quotas,
        open_to_all: Sequence[str],
        certificates_name: bool,
        on_refusal: Callable[[str], None],
        on_stream: Callable[[Call], None],
        on_done: Callable[[Call], None] | None,
        under_way: Gauge,
        patience: Patience,
    ) -> None:
        self._tokens = tokens
        self._quotas = quotas
        self._open_to_all = tuple(open_to_all)
        self._certificates_name = certificates_name
        self._on_refusal = on_refusal
        self._on_stream = on_stream
        self._streams = OpenStreams()
        self._on_done = on_done
        self._under_way = under_way
        self._patience = patience
        self._guarded: dict[str, Handler] = {}

    async def intercept_service(  # type: ignore[override]  # there may be no handler, too
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of a call, behind the door; it is asked before any of the request is read."""
        method = details.method
        handler = await continuation(details)
        if handler is None or method.startswith(self._open_to_all):
            return handler
        try:
            enter(self.recognise(method, details.invocation_metadata))
        except Unauthenticated as error:
            return self._turned_away(error)
        # The same handler each time, so it is wrapped once: names that nobody serves do not come here.
        guarded = self._guarded.get(method)
        if guarded is None:
            guarded = self._guarded[method] = self._guard(handler)
        return guarded

    def recognise(self, method: str, metadata: Metadata | None) -> Call:
        """The call of these headers.

        Raises:
            Unauthenticated: it shows no token that is known here, and one is asked for.
        """
        authorization = request_id = traceparent = ""
        for name, value in metadata or ():
            if isinstance(value, str):
                if name == "authorization":
                    authorization = value
                elif name == REQUEST_ID:
                    request_id = value
                elif name == "traceparent":
                    traceparent = value
        if not _SANE_ID.fullmatch(request_id):
            # Unlike a secret it may be guessed, and so needs no call of the system.
            request_id = f"{random.getrandbits(64):016x}"
        call = Call(method=method, request_id=request_id, traceparent=traceparent)
        if self._on_done is not None:
            call.phases, call.totals = [], {}
        if self._tokens is not None:
            enter(call)
            call.identity, call.token = _owner(authorization, self._tokens.value)
        return call

    def withdraw(self) -> None:
        """Ends streams whose tokens are known no longer; to be called when the tokens have changed."""
        if self._tokens is not None:
            tokens = self._tokens.value
            self._streams.end(lambda call: tokens.owner_of(call.token) != call.identity)

    @asynccontextmanager
    async def passing(
        self, method: str, metadata: Metadata, *, peer: str, of_many: bool = False
    ) -> AsyncIterator[Call]:
        """A call that did not come by gRPC, from its headers on until it is answered.

        Raises:
            CallError: it is not let in, or what its answer raises.
        """
        try:
            call = self.recognise(method, metadata)
            enter(call)
            account = self._admit(call, of_many=of_many)
        except CallError as error:
            turned_away = current_call()
            turned_away.peer = peer
            self._count_refusal(turned_away, error)
            raise
        try:
            if of_many:
                with self._streams.opened(call) as stream, stream.listening():
                    yield call
            else:
                yield call
        except CallError as error:
            call.outcome = error.reason.lower()
            raise
        except (asyncio.CancelledError, ConnectionError):
            call.outcome = "cancelled"
            raise
        except Exception:
            call.outcome = "internal"
            raise
        finally:
            self._end(call, account, of_many=of_many)

    def _guard(self, handler: Handler) -> Handler:
        """The handler, with everything that happens before and after it."""
        if handler.response_streaming:
            return _same_kind(handler, self._streaming(handler))

        # grpc's types are those of servers with threads; under asyncio a behaviour is a coroutine.
        inner: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def answer(request: Any, context: Context) -> Any:  # noqa: ANN401  # as gRPC has it
            call, account = await self._begin(context)
            try:
                return await inner(request, context)
            except asyncio.CancelledError:
                if call.outcome == "ok":
                    call.outcome = "cancelled"
                raise
            finally:
                self._end(call, account)

        return _same_kind(handler, answer)

    def _streaming(self, handler: Handler) -> Callable[[Any, Context], AsyncIterator[Any]]:
        inner: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def answer(request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: ANN401  # as gRPC has it
            call, account = await self._begin(context, of_many=True)
            try:
                with self._streams.opened(call) as stream:
                    async with aclosing(inner(request, context)) as responses:
                        while True:
                            with stream.listening():
                                response = await anext(responses, _END)
                            if response is _END:
                                return
                            with self._patience.waits(context):
                                yield response
                            stream.check()
            except Unauthenticated as error:
                failure = error
                call.outcome = error.reason.lower()
            except (asyncio.CancelledError, GeneratorExit):
                if call.outcome == "ok":
                    call.outcome = "cancelled"
                raise
            finally:
                self._end(call, account, of_many=True)
            await refuse(context, failure)

        return answer

    async def _begin(self, context: Context, *, of_many: bool = False) -> tuple[Call, Account]:
        call = current_call()
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        if self._certificates_name and call.identity == ANONYMOUS:
            call.identity = _certified(context)
        try:
            # What waited so long to be looked at is not even read: a flood leaves no time for the dead.
            if (remaining := context.time_remaining()) is not None and remaining <= 0:
                raise DeadlinePassed("the deadline had passed when the server came to look at the call")
            return call, self._admit(call, of_many=of_many)
        except CallError as error:
            call.peer = context.peer()
            self._count_refusal(call, error)
            failure = error
        await refuse(context, failure)

    def _admit(self, call: Call, *, of_many: bool) -> Account:
        account = self._quotas.account(call.identity, now=call.started)
        account.begin(now=call.started, of_many=of_many)
        call.account = account
        self._under_way.inc()
        return account

    def _end(self, call: Call, account: Account, *, of_many: bool = False) -> None:
        account.end(of_many=of_many)
        self._under_way.dec()
        call.seconds = time.monotonic() - call.started
        if of_many:
            self._on_stream(call)
        # Once the answer has left: noting it is not what the caller waits for.
        asyncio.get_running_loop().call_soon(self._note, call)

    def _turned_away(self, error: CallError) -> Handler:
        # Of the kind that reads a stream, and reads nothing: no stranger's message is taken in.
        async def answer(requests: object, context: Context) -> None:
            call = current_call()
            call.peer = context.peer()
            self._count_refusal(call, error)
            await refuse(context, error)

        return grpc.stream_unary_rpc_method_handler(answer)

    def _count_refusal(self, call: Call, error: CallError) -> None:
        call.outcome = error.reason.lower()
        call.seconds = time.monotonic() - call.started
        self._on_refusal(call.outcome)
        asyncio.get_running_loop().call_soon(self._note, call)

    def _note(self, call: Call) -> None:
        if self._on_done is not None:
            self._on_done(call)
        write(access, call.method.rpartition("/")[2], described(call))


def described(call: Call) -> dict[str, object]:
    """What the log says of a call; of its structures only their number, unless they were kept for it."""
    fields: dict[str, object] = {
        "request_id": call.request_id,
        "identity": call.identity,
        "model": call.model,
        "structures": call.structures,
        "atoms": call.atoms,
        "outcome": call.outcome,
        "ms": round(1000 * call.seconds, 3),
    }
    if call.steps:
        fields["steps"] = call.steps
    if traced := _TRACE.match(call.traceparent):
        fields["trace_id"] = traced[1]
    if call.peer:
        fields["peer"] = call.peer
    if call.contents is not None:
        fields["contents"] = call.contents
    return fields


def _owner(authorization: str, tokens: Tokens) -> tuple[str, bytes]:
    """Whose the token is, and its digest."""
    if not authorization:
        raise Unauthenticated(
            "this server answers callers with a bearer token alone, and the call has none: send the header"
            " `authorization: Bearer TOKEN` (Client(token=…), --token-file or EQUIPOT_TOKEN)"
        )
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the authorization header is not of the form `Bearer TOKEN`")
    digest = digest_of(token.strip())
    identity = tokens.owner_of(digest)
    if identity is None:
        raise Unauthenticated(
            "the bearer token is not known here: it is mistyped, withdrawn, or another server's; whoever runs"
            " the server can make a new one with `equipot token`"
        )
    return identity, digest


def _certified(context: Context) -> str:
    """The name in the caller's certificate: its first alternative name, else its common name."""
    proven = context.auth_context()
    for kind in ("x509_subject_alternative_name", "x509_common_name"):
        for name in proven.get(kind, ()):
            return name.decode("utf-8", "replace")
    return ANONYMOUS


def _same_kind(handler: Handler, behaviour: Callable[..., Any]) -> Handler:
    kinds: dict[tuple[bool, bool], Callable[..., Handler]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
