"""When to try a call again and how long to wait. Knows no gRPC."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from equipot.client.errors import ClientError, DeadlineExceeded, LimitExceeded, ServerUnavailable


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter, for a server that is unavailable or says when it takes the call.

    No other error is tried again.

    The defaults bridge a restart of about ten seconds. The call's deadline bounds everything.

    Raises:
        ValueError: a field out of its range.
    """

    attempts: int = 8
    """How often a call is tried in all; 1 means never again.

    A relaxation or simulation is tried so often in a row without getting further.
    """
    initial_delay: float = 0.1
    """Seconds before the second attempt, at most."""
    multiplier: float = 2.0
    """Growth of the delay from attempt to attempt."""
    max_delay: float = 5.0
    """Longest delay in seconds, unless the server asks for more."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts}; it counts the first one, so give at least 1")
        if not 0 <= self.initial_delay <= self.max_delay:
            raise ValueError(
                f"initial_delay is {self.initial_delay} s; give 0 to max_delay ({self.max_delay} s)"
            )
        if self.multiplier < 1:
            raise ValueError(f"multiplier is {self.multiplier}; give at least 1")

    def delay(self, error: ClientError, attempt: int, remaining: float) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1); None: give up.

        The server's own wish is a lower bound: many clients that it turned away together must not come back
        together either, so jitter is added to it.
        """
        if not isinstance(error, ServerUnavailable | LimitExceeded) or attempt >= self.attempts:
            return None
        if isinstance(error, LimitExceeded) and error.retry_after is None:
            # Too much at once is too much later, too.
            return None
        try:
            backoff = min(self.initial_delay * self.multiplier ** (attempt - 1), self.max_delay)
        except OverflowError:
            backoff = self.max_delay if self.initial_delay else 0.0
        delay = backoff * random.uniform(0.5, 1.0) + (error.retry_after or 0.0)
        return delay if delay < remaining else None


LONGEST_TIMEOUT = 10 * 365 * 86_400.0
"""Seconds; gRPC counts time in nanoseconds of 64 bits, and takes what is beyond them for past."""


def seconds_of(timeout: float) -> float:
    """A timeout as gRPC can hold it: who gives infinity, or centuries, waits for ten years.

    Raises:
        ValueError: it is not above 0.
    """
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout} s; give a positive number of seconds")
    return min(timeout, LONGEST_TIMEOUT)


class Deadline:
    """A moment by which a call, all its attempts included, must be answered."""

    __slots__ = ("_at", "_timeout")

    def __init__(self, timeout: float) -> None:
        self._timeout = seconds_of(timeout)
        self._at = time.monotonic() + self._timeout

    @property
    def remaining(self) -> float:
        """Seconds left; below zero when it has passed."""
        return self._at - time.monotonic()

    def require(self) -> float:
        """Seconds left.

        Raises:
            DeadlineExceeded: none is left.
        """
        remaining = self.remaining
        if remaining <= 0:
            raise DeadlineExceeded(f"no answer within {self._timeout:g} s: raise the timeout")
        return remaining
