"""What the last minutes were like, second by second, for whoever looks at the server. Bookkeeping alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

SECONDS = 300
"""How far back it remembers."""

GROUP = 5
"""Seconds that are told together."""

MOST_LATENCIES = 256
"""Of one second that are kept: quantiles of more would be no better."""


@dataclass(slots=True)
class _Second:
    at: int
    structures: int = 0
    atoms: int = 0
    edges: int = 0
    answers: int = 0
    latencies: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Some seconds together.

    Attributes:
        ago: seconds from its end until now.
        seconds: its length.
        answers: requests and steps of sessions answered.
        structures, atoms, edges: computed.
        p50, p99: of the answers' seconds in the server; None if there were none.
    """

    ago: float
    seconds: float
    answers: int
    structures: int
    atoms: int
    edges: int
    p50: float | None
    p99: float | None


class Recent:
    """Answers and batches of the last minutes. Its methods are called in one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[_Second] = deque()
        self._begun = clock()

    def answered(self, seconds: float) -> None:
        """Notes an answer that took so long."""
        now = self._now()
        now.answers += 1
        if len(now.latencies) < MOST_LATENCIES:
            now.latencies.append(seconds)

    def computed(self, *, structures: int, atoms: int, edges: int) -> None:
        """Notes a batch."""
        now = self._now()
        now.structures += structures
        now.atoms += atoms
        now.edges += edges

    def spans(self) -> list[Span]:
        """The last minutes in groups of seconds, the oldest first; the present second is left out."""
        end = int(self._clock())
        count = min(SECONDS, max(GROUP, end - int(self._begun)))
        return [
            self._span(max(end - count, stop - GROUP), stop, end)
            for stop in sorted(range(end, end - count, -GROUP))
        ]

    def whole(self) -> Span:
        """The last minutes as one."""
        end = int(self._clock())
        return self._span(end - min(SECONDS, max(1, end - int(self._begun))), end + 1, end)

    def _span(self, start: int, stop: int, now: int) -> Span:
        within = [second for second in self._seconds if start <= second.at < stop]
        latencies = [latency for second in within for latency in second.latencies]
        p50, p99 = np.quantile(latencies, (0.5, 0.99)).tolist() if latencies else (None, None)
        return Span(
            ago=max(0, now - stop),
            seconds=stop - start,
            answers=sum(second.answers for second in within),
            structures=sum(second.structures for second in within),
            atoms=sum(second.atoms for second in within),
            edges=sum(second.edges for second in within),
            p50=p50,
            p99=p99,
        )

    def _now(self) -> _Second:
        at = int(self._clock())
        if not self._seconds or self._seconds[-1].at != at:
            self._seconds.append(_Second(at))
            while self._seconds[0].at < at - SECONDS:
                self._seconds.popleft()
        return self._seconds[-1]
