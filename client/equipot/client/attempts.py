"""Calls that are tried again while that may help."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from equipot.client.errors import ClientError, LimitExceeded, ServerUnavailable
from equipot.client.retry import Deadline, RetryPolicy

_Reply = TypeVar("_Reply")


class Tries:
    """Counts those of a long call that failed in a row and got no further."""

    def __init__(self, retry: RetryPolicy) -> None:
        self._retry = retry
        self._failed = 0

    def delay(self, problem: ClientError, cause: grpc.RpcError, *, got_on: bool) -> float:
        """Seconds to wait after a try that failed so.

        Args:
            problem: why it failed, in our words.
            cause: and in gRPC's.
            got_on: whether it got further than those before.

        Raises:
            ClientError: there is to be no other.
        """
        self._failed = 1 if got_on else self._failed + 1
        delay = self._retry.delay(problem, self._failed, math.inf)
        if delay is not None:
            return delay
        if self._failed > 1 and isinstance(problem, ServerUnavailable | LimitExceeded):
            problem.args = (f"{problem}; {self._failed} tries in a row got no further",)
        raise problem from cause


def persist(
    first: Callable[[], _Reply],
    again: Callable[[], _Reply],
    deadline: Deadline,
    retry: RetryPolicy,
    understand: Callable[[grpc.RpcError], ClientError],
) -> _Reply:
    """What the first attempt or a later one returns.

    Raises:
        ClientError: as `understand` makes it of the last attempt's error.
    """
    attempt, call = 1, first
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            problem = understand(error)
            delay = retry.delay(problem, attempt, deadline.remaining)
            if delay is None:
                raise problem from error
        time.sleep(delay)
        attempt, call = attempt + 1, again
