"""One thread that moves everybody's structures, in turns by identity. Knows neither ASE nor gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from equipot.serve.shares import EQUAL_SHARE, Share

SLICE_SECONDS = 0.005
"""After which another identity has its turn; a hop to the thread and back takes a hundredth of it."""

MOST_REMEMBERED = 1_000
"""Identities whose use of the thread is remembered while they wait for nothing."""


@dataclass(slots=True, eq=False)
class Errands:
    """What one request has moved.

    Attributes:
        identity: whose it is.
        seconds: of the thread that it had, counted from where the identity's others were when it came.
    """

    identity: str
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Turn:
    """Something to do in strides, one each time that an iterator is asked for its next."""

    errands: Errands
    strides: Iterator[None]
    done: asyncio.Future[None]
    left: bool = False
    ended: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    """What one identity waits for.

    Attributes:
        virtual: the time that it had, by its weight.
        reached: the time that the request had that was served last.
    """

    identity: str
    weight: float
    virtual: float
    reached: float = 0.0
    turns: list[_Turn] = field(default_factory=list)


class Mover:
    """Whoever had least of the thread's time, by weight, is first: nobody waits for another's crowd.

    Of one identity's requests, too, the one that had least is first.

    Attributes:
        crews: that have structures under way; whoever sends them here counts them.
    """

    def __init__(self, share_of: Callable[[str], Share] = lambda identity: EQUAL_SHARE) -> None:
        """An idle one; `share_of` says what an identity may have."""
        self._thread = ThreadPoolExecutor(1, "equipot-motion")
        self._share_of = share_of
        self._lanes: dict[str, _Lane] = {}
        self._had: dict[str, float] = {}
        self._clock = 0.0
        self._running: asyncio.Task[None] | None = None
        self._closed = False
        self.crews = 0

    async def move(self, errands: Errands, strides: Iterator[None]) -> None:
        """Exhausts an iterator in the thread; what it raises ends the call. Cancelled, it asks no more."""
        turn = _Turn(errands, strides, asyncio.get_running_loop().create_future())
        identity = errands.identity
        lane = self._lanes.get(identity)
        if lane is None:
            # Nobody saves up turns while idle.
            virtual = max(self._had.get(identity, 0.0), self._clock)
            lane = self._lanes[identity] = _Lane(
                identity, self._share_of(identity).weight, virtual, errands.seconds
            )
        errands.seconds = max(errands.seconds, lane.reached)
        lane.turns.append(turn)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        try:
            await turn.done
        finally:
            turn.left = True

    def let_go(self, end: Callable[[], None]) -> None:
        """Calls this in the thread once it is free, unless that ends before; nobody waits for it."""
        if not self._closed:
            self._thread.submit(end)

    def close(self) -> None:
        """Lets the thread go, and cancels whatever waits for it."""
        self._closed = True
        if self._running is not None:
            self._running.cancel()
        for lane in self._lanes.values():
            for turn in lane.turns:
                turn.done.cancel()
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._lanes:
            lane = min(self._lanes.values(), key=lambda lane: lane.virtual)
            self._clock = lane.virtual
            turn = min(lane.turns, key=lambda turn: turn.errands.seconds)
            lane.reached = turn.errands.seconds
            problem, seconds = await loop.run_in_executor(self._thread, _work, turn)
            lane.virtual += seconds / lane.weight
            turn.errands.seconds += seconds
            if not (turn.ended or turn.left):
                continue
            lane.turns.remove(turn)
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
    """In the thread: some of a turn's strides; what went wrong, and seconds of the processor."""
    begun, until = time.thread_time(), time.perf_counter() + SLICE_SECONDS
    problem = None
    try:
        while not turn.left:
            next(turn.strides)
            if time.perf_counter() >= until:
                break
    except StopIteration:
        turn.ended = True
    except Exception as error:
        problem, turn.ended = error, True
    return problem, time.thread_time() - begun
