"""Turns errors into gRPC statuses with google.rpc details, in one place for all methods."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from equipot.serve.call import current_call
from equipot.serve.errors import (
    CallError,
    DeadlinePassed,
    DeadlineUnreachable,
    Forbidden,
    InvalidRequest,
    NoSuchJob,
    NotPossible,
    NotReady,
    NotServed,
    OverLimit,
    OverQuota,
    QueueFull,
    RanksExhausted,
    SessionIdle,
    Unauthenticated,
)
from equipot.serve.operation import to_its_end

REQUEST_ID = "x-request-id"
"""The header by which a caller may name a call, and by which every answer does."""

DOMAIN = "equipot"
"""ErrorInfo's domain: whose reasons these are."""

GOES_BY_ITSELF = 0.1
"""Seconds in which gRPC has ended a call whose deadline has passed."""

LONGEST_RETRY = 10 * 365 * 86_400.0
"""Seconds; the message holds no more than some millennia, and a rate may be next to nothing."""

LONGEST_MESSAGE = 2_000
"""Characters of a status message that travel: it goes in a header, and headers are limited to 8 kB."""

CODES: Mapping[type[CallError], grpc.StatusCode] = MappingProxyType(
    {
        InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
        NotServed: grpc.StatusCode.NOT_FOUND,
        NoSuchJob: grpc.StatusCode.NOT_FOUND,
        OverLimit: grpc.StatusCode.RESOURCE_EXHAUSTED,
        OverQuota: grpc.StatusCode.RESOURCE_EXHAUSTED,
        QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
        DeadlineUnreachable: grpc.StatusCode.RESOURCE_EXHAUSTED,
        DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
        NotReady: grpc.StatusCode.UNAVAILABLE,
        RanksExhausted: grpc.StatusCode.UNAVAILABLE,
        SessionIdle: grpc.StatusCode.UNAVAILABLE,
        NotPossible: grpc.StatusCode.FAILED_PRECONDITION,
        Forbidden: grpc.StatusCode.PERMISSION_DENIED,
        Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        CallError: grpc.StatusCode.INTERNAL,
    }
)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
RequestT = TypeVar("RequestT", bound=Message)

logger = logging.getLogger(__name__)


def to_status(error: CallError, request_id: str = "") -> status_pb2.Status:
    """The rich status of an error.

    It has ErrorInfo, RequestInfo if the call has an id, BadRequest if a field is at fault, RetryInfo if it
    helps.
    """
    message = error.message[:LONGEST_MESSAGE]
    status = status_pb2.Status(code=CODES[type(error)].value[0], message=message)
    _attach(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.facts))
    if request_id:
        _attach(status, error_details_pb2.RequestInfo(request_id=request_id))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        _attach(status, error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(min(error.retry_after, LONGEST_RETRY) * 1000))
        _attach(status, retry)
    return status


def _attach(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


async def refuse(context: Context, error: CallError) -> NoReturn:
    """Ends the call with this error."""
    call = current_call()
    call.outcome = error.reason.lower()
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        # gRPC ends the call now by itself, and cancels this. A status could not be sent, and what grpc.aio
        # took of the core to send it would stay for ever.
        await asyncio.sleep(GOES_BY_ITSELF)
    status = rpc_status.to_status(to_status(error, call.request_id))
    named = ((REQUEST_ID, call.request_id),) if call.request_id else ()
    await to_its_end(context.abort(status.code, status.details, (*status.trailing_metadata, *named)))


def bare(error: CallError) -> CallError:
    """The error without the frames it came through: they hold the request, in a circle that nobody breaks."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def guarded(
    method: Callable[[RequestT, Context], Awaitable[Message]], request_type: type[RequestT]
) -> grpc.RpcMethodHandler[bytes, Message]:
    """The gRPC handler of one unary method that may raise `CallError`; parses the request itself.

    gRPC's own answer to bytes that are no message is UNKNOWN, and a traceback in the log.
    """

    async def answer(raw: bytes, context: Context) -> Message:
        request: RequestT | None = None
        try:
            request = _parse(request_type, raw)
            # It has been copied, and may be large.
            raw = b""
            return await method(request, context)
        except CallError as error:
            failure = bare(error)
        except Exception:
            logger.exception("%s failed", request_type.__name__)
            failure = CallError("the server failed on this request; its log has the reason")
        # What refuses keeps this frame, in a circle, until the garbage collector comes.
        raw, request = b"", None
        await refuse(context, failure)

    return grpc.unary_unary_rpc_method_handler(
        answer, request_deserializer=None, response_serializer=lambda message: message.SerializeToString()
    )


def guarded_stream(
    method: Callable[[AsyncIterator[RequestT], Context], AsyncGenerator[Message, None]],
    request_type: type[RequestT],
) -> grpc.RpcMethodHandler[bytes, Message]:
    """As `guarded`, of a method with streams both ways."""

    async def parsed(raws: AsyncIterator[bytes]) -> AsyncIterator[RequestT]:
        async for raw in raws:
            yield _parse(request_type, raw)

    def begin(raws: AsyncIterator[bytes], context: Context) -> AsyncGenerator[Message, None]:
        return method(parsed(raws), context)

    # grpc's types are those of servers with threads; under asyncio a behaviour is an asynchronous generator.
    behaviour: Any = partial(_streamed, begin, request_type)
    return grpc.stream_stream_rpc_method_handler(
        behaviour, request_deserializer=None, response_serializer=lambda message: message.SerializeToString()
    )


def guarded_reply_stream(
    method: Callable[[RequestT, Context], AsyncGenerator[Message, None]], request_type: type[RequestT]
) -> grpc.RpcMethodHandler[bytes, Message]:
    """As `guarded`, of a method that answers one request by a stream."""

    def begin(raw: bytes, context: Context) -> AsyncGenerator[Message, None]:
        return method(_parse(request_type, raw), context)

    behaviour: Any = partial(_streamed, begin, request_type)
    return grpc.unary_stream_rpc_method_handler(
        behaviour, request_deserializer=None, response_serializer=lambda message: message.SerializeToString()
    )


async def _streamed(
    begin: Callable[[Any, Context], AsyncGenerator[Message, None]],
    request_type: type[Message],
    request: object,
    context: Context,
) -> AsyncIterator[Message]:
    """The replies of a stream; what it raises, from its beginning on, ends the call with a status."""
    try:
        # Closed at once when the caller leaves: what it held must not wait for the garbage collector.
        async with aclosing(begin(request, context)) as replies:
            # As in `guarded`: it may be large.
            request = None
            async for reply in replies:
                yield reply
        return
    except CallError as error:
        failure = bare(error)
    except Exception:
        logger.exception("%s failed", request_type.__name__)
        failure = CallError("the server failed on this request; its log has the reason")
    await refuse(context, failure)


def _parse(request_type: type[RequestT], raw: bytes) -> RequestT:
    try:
        return request_type.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"the request is not a {request_type.DESCRIPTOR.full_name}: {error}") from error
