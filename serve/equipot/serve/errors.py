"""What can go wrong in serving, as types. Which status code each becomes is `status.py`'s business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

FaultReason = Literal[
    "invalid_structure",
    "unsupported",
    "too_large",
    "not_finite",
    "internal",
    "unstable",
    "outside_domain",
]


RETRY_STARTING = 2.0
"""Seconds after which a server that loads may be ready."""


class ServeError(RuntimeError):
    """The server cannot start as asked; the message is for the operator."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one structure of a request cannot be answered, while the others are.

    Attributes:
        reason: the kind of fault, as on the wire in lower case.
        field: the field at fault as the .proto names it, empty if none is.
        message: what is wrong, with the value and the limit.
        remedy: what the caller can do about it.
    """

    reason: FaultReason
    field: str
    message: str
    remedy: str


class CallError(Exception):
    """A whole call that cannot be answered.

    Attributes:
        reason: a constant in UPPER_SNAKE_CASE for programs to branch on.
        field: the request's field at fault, empty if none is.
        retry_after: seconds after which the same call may succeed; None if it never will.
        facts: values and limits by name, for programs.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        retry_after: float | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after
        self.facts = dict(facts or {})


class InvalidRequest(CallError):
    """The request's fields do not fit together, or one is out of range."""

    reason = "INVALID_REQUEST"


class NotServed(CallError):
    """The named model or level of theory is not served here."""

    reason = "NOT_SERVED"


class NoSuchJob(CallError):
    """The caller has no job of this name."""

    reason = "NO_SUCH_JOB"


class OverLimit(CallError):
    """The request is larger than this server takes, now and later."""

    reason = "OVER_LIMIT"


class Unauthenticated(CallError):
    """The caller did not show who it is, or showed what is not known here."""

    reason = "UNAUTHENTICATED"


class Forbidden(CallError):
    """The caller is known, and may not do this."""

    reason = "FORBIDDEN"


class NotPossible(CallError):
    """What is asked for cannot be done as things stand; the message says what stands in the way."""

    reason = "NOT_POSSIBLE"


class OverQuota(CallError):
    """The caller has used up what it may ask for now; later it may ask again."""

    reason = "OVER_QUOTA"


class QueueFull(CallError):
    """Too much work waits already; later there will be room."""

    reason = "QUEUE_FULL"


class DeadlineUnreachable(CallError):
    """The work ahead takes longer than the caller would wait, so the call is refused at the door."""

    reason = "DEADLINE_UNREACHABLE"


class DeadlinePassed(CallError):
    """The deadline passed while the request waited."""

    reason = "DEADLINE_PASSED"


class SessionIdle(CallError):
    """A session was not used for so long that it was ended; it may be opened again."""

    reason = "SESSION_IDLE"


class NotReady(CallError):
    """The server is starting or draining; another one, or this one later, will answer."""

    reason = "NOT_READY"


class RanksExhausted(NotReady):
    """Ranks ran out of memory with a batch, and are being started again."""
