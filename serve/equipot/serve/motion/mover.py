"""One thread that moves everybody's structures, in turns by identity. Knows neither ASE nor gRPC."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from equipot.serve.shares import EQUAL_SHARE, Share

SLICE_SECONDS = 0.005
"""After which another identity has its turn; a hop to the thread and back takes a hundredth of it."""

MOST_REMEMBERED = 1_000
"""Identities whose use of the thread is remembered while they wait for nothing."""


@dataclass(slots=True, eq=False)
class _Turn:
    """Some structures to move: `do` is called with each number below `count`."""

    do: Callable[[int], None]
    count: int
    done: asyncio.Future[None]
    next: int = 0


@dataclass(slots=True, eq=False)
class _Lane:
    """What one identity waits for, and the time that it had, by its weight."""

    identity: str
    weight: float
    virtual: float
    turns: deque[_Turn] = field(default_factory=deque)


class Mover:
    """Whoever had least of the thread's time, by weight, is first: nobody waits for another's crowd."""

    def __init__(self, share_of: Callable[[str], Share] = lambda identity: EQUAL_SHARE) -> None:
        """An idle one; `share_of` says what an identity may have."""
        self._thread = ThreadPoolExecutor(1, "equipot-motion")
        self._share_of = share_of
        self._lanes: dict[str, _Lane] = {}
        self._had: dict[str, float] = {}
        self._clock = 0.0
        self._running: asyncio.Task[None] | None = None

    async def move(self, identity: str, count: int, do: Callable[[int], None]) -> None:
        """Calls `do` with 0 to count − 1, in order, in the thread; what it raises ends the call.

        Cancelled, it calls no more.
        """
        turn = _Turn(do, count, asyncio.get_running_loop().create_future())
        lane = self._lanes.get(identity)
        if lane is None:
            # Nobody saves up turns while idle.
            virtual = max(self._had.get(identity, 0.0), self._clock)
            lane = self._lanes[identity] = _Lane(identity, self._share_of(identity).weight, virtual)
        lane.turns.append(turn)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            await turn.done
        finally:
            turn.count = 0

    def let_go(self, end: Callable[[], None]) -> None:
        """Calls this in the thread once it is free; nobody waits for it."""
        self._thread.submit(end)

    def close(self) -> None:
        """Lets the thread go."""
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._lanes:
            lane = min(self._lanes.values(), key=lambda lane: lane.virtual)
            self._clock = lane.virtual
            turn = lane.turns[0]
            problem, seconds = await loop.run_in_executor(self._thread, _work, turn)
            lane.virtual += seconds / lane.weight
            lane.turns.popleft()
            if turn.next < turn.count and problem is None:
                # Of one identity's, too, the few need not wait for the many.
                lane.turns.append(turn)
                continue
            if not turn.done.done():
                if problem is None:
                    turn.done.set_result(None)
                else:
                    turn.done.set_exception(problem)
            if not lane.turns:
                self._remember(lane)

    def _remember(self, lane: _Lane) -> None:
        del self._lanes[lane.identity]
        self._had[lane.identity] = lane.virtual
        if len(self._had) > MOST_REMEMBERED:
            self._had = {identity: had for identity, had in self._had.items() if had > self._clock}


def _work(turn: _Turn) -> tuple[Exception | None, float]:
    """In the thread: some of a turn's structures; what went wrong, and seconds of the processor."""
    begun, until = time.thread_time(), time.perf_counter() + SLICE_SECONDS
    problem = None
    while turn.next < turn.count:
        number, turn.next = turn.next, turn.next + 1
        try:
            turn.do(number)
        except Exception as error:
            problem = error
            break
        if time.perf_counter() >= until:
            break
    return problem, time.thread_time() - begun
