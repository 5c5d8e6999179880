"""The errors a caller of the client can meet, and their making from gRPC's status and its rich details."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from equipot.wire.v1.codec import Failure, FailureReason

_DETAILS_KEY = "grpc-status-details-bin"
_Detail = TypeVar("_Detail", bound=Message)


class ClientError(RuntimeError):
    """Base of every error that the client raises on purpose.

    Attributes:
        request_id: by which the server's log names the call; empty if no server answered.
    """

    exit_code = 2
    request_id = ""


class ServerUnavailable(ClientError):
    """The server cannot be reached, starts or drains.

    Attributes:
        retry_after: seconds the server asked to wait, None if it did not say.
        reached: whether a server said so itself.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, reached: bool = True) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reached = reached


class NotTrusted(ClientError):
    """Client and server cannot agree on TLS: certificates, authorities, names, or to use it at all."""


class Unauthenticated(ClientError):
    """The server wants to know who calls, and does not know the token it was shown, if any."""


class DeadlineExceeded(ClientError):
    """No answer before the deadline."""


class LimitExceeded(ClientError):
    """The request is over a limit of the server, or its queue is full.

    Attributes:
        retry_after: seconds after which the server would take it, until when it is tried again as far as the
            deadline allows; None if it never will.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InvalidRequest(ClientError):
    """The request as a whole is wrong.

    Attributes:
        field: the field at fault, as named in the .proto; empty if none is.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ModelNotFound(ClientError):
    """The server serves no such model, or the model does not know the level of theory."""


class JobNotFound(ClientError):
    """The server has no such job of this caller's."""


class JobFailed(ClientError):
    """A job ended before all of its structures had come to their end."""


class ModelChanged(ClientError):
    """Another bundle answers than the one that answered first."""


class Refused(ClientError):
    """What is asked for cannot be done as things stand, or not by this caller."""


class ServerError(ClientError):
    """The server failed, or its answer does not fit the request.

    Attributes:
        code: gRPC's name of the status, for example "INTERNAL".
    """

    def __init__(self, message: str, *, code: str = "INTERNAL") -> None:
        super().__init__(message)
        self.code = code


class FileError(ClientError):
    """A file of structures cannot be read or written."""


class InvalidStructure(ClientError, ValueError):
    """Arrays that cannot be one structure.

    Attributes:
        field: the field at fault.
        problem: what is wrong, with the value.
        remedy: what the caller can do about it.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(field, problem, remedy)
        self.field = field
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}; {self.remedy}"


class StructureFailure(ClientError):
    """One structure of a batch could not be answered; the others were.

    Attributes:
        failure: index, reason, field, message and remedy.
        others: how many more structures of the batch failed.
    """

    def __init__(self, failure: Failure, others: int = 0) -> None:
        super().__init__(failure, others)
        self.failure = failure
        self.others = others

    def __str__(self) -> str:
        more = f" (and {self.others} more structures failed)" if self.others else ""
        return f"{describe(self.failure)}{more}"

    @property
    def index(self) -> int:
        """The structure's index in the batch."""
        return self.failure.index

    @property
    def reason(self) -> FailureReason:
        """Why it failed."""
        return self.failure.reason

    @property
    def field(self) -> str:
        """The field at fault; empty if none is."""
        return self.failure.field

    @property
    def remedy(self) -> str:
        """What the caller can do about it."""
        return self.failure.remedy


class _FailedCall(Protocol):
    """What grpc's errors of both kinds, sync and aio, offer."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> object: ...


def refused(
    index: int, problem: InvalidStructure, reason: FailureReason = FailureReason.INVALID_STRUCTURE
) -> Failure:
    """The failure of a structure that is not sent."""
    return Failure(index, reason, problem.field, problem.problem, problem.remedy)


def describe(failure: Failure) -> str:
    """One line for one failed structure."""
    field = f"{failure.field}: " if failure.field else ""
    remedy = f"; {failure.remedy}" if failure.remedy else ""
    return f"structure {failure.index}: {field}{failure.message}{remedy}"


def from_rpc_error(error: BaseException, address: str) -> ClientError:
    """The typed error for a failed call to `address`; `error` is grpc's own, of either kind."""
    call = cast(_FailedCall, error)
    status = _rich_status(call)
    problem = _typed(call, status, address)
    for detail in _details(status, error_details_pb2.RequestInfo):
        problem.request_id = detail.request_id
    return problem


def _typed(call: _FailedCall, status: status_pb2.Status | None, address: str) -> ClientError:
    code, message = call.code(), _one_line(call.details())
    retry_after = _retry_after(status)
    match code:
        case grpc.StatusCode.UNAVAILABLE if status is not None:
            return ServerUnavailable(f"{address} is not available: {message}", retry_after=retry_after)
        case grpc.StatusCode.UNAVAILABLE:
            return ServerUnavailable(
                f"cannot reach {address}: is 'equipot serve' running? ({message})", reached=False
            )
        case grpc.StatusCode.CANCELLED:
            # Nobody here cancels a call and then asks for its answer: a server that stops ends calls so.
            return ServerUnavailable(f"{address} stopped before it answered ({message})")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(
                f"no answer from {address} in time ({message}): raise the timeout or send less at once"
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            when = "" if retry_after is None else f"; try again in {retry_after:.3g} s"
            return LimitExceeded(f"{message}{when}", retry_after=retry_after)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(message, field=_field_at_fault(status))
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(f"{address} refuses the call: {message}")
        case grpc.StatusCode.NOT_FOUND if _reason(status) == "NO_SUCH_JOB":
            return JobNotFound(message)
        case grpc.StatusCode.NOT_FOUND:
            return ModelNotFound(message)
        case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.PERMISSION_DENIED:
            return Refused(message)
        case _:
            return ServerError(f"{address} failed: {code.name}: {message}", code=code.name)


def _one_line(text: str | None) -> str:
    return " ".join((text or "no reason given").split())


def _rich_status(call: _FailedCall) -> status_pb2.Status | None:
    metadata = call.trailing_metadata()
    if metadata is None:
        return None
    for key, value in cast("Iterator[tuple[str, bytes]]", metadata):
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _details(status: status_pb2.Status | None, kind: type[_Detail]) -> Iterator[_Detail]:
    for packed in status.details if status is not None else ():
        detail = kind()
        if packed.Is(kind.DESCRIPTOR) and packed.Unpack(detail):
            yield detail


def _retry_after(status: status_pb2.Status | None) -> float | None:
    for detail in _details(status, error_details_pb2.RetryInfo):
        return float(detail.retry_delay.ToMilliseconds() / 1000)
    return None


def _reason(status: status_pb2.Status | None) -> str:
    """By which programs tell errors of one status apart; empty if the server did not say."""
    return next((str(info.reason) for info in _details(status, error_details_pb2.ErrorInfo)), "")


def _field_at_fault(status: status_pb2.Status | None) -> str:
    for detail in _details(status, error_details_pb2.BadRequest):
        for violation in detail.field_violations:
            return str(violation.field)
    return ""
