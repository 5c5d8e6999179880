"""Blocking calls that are tried again while that may help."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from equipot.client.errors import ClientError
from equipot.client.retry import Deadline, RetryPolicy

_Reply = TypeVar("_Reply")


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
