"""The store in an event loop: its one thread, what waits to be written, and who waits for it. No gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from equipot.serve.jobs.records import JobRecord, Move, StoreError
from equipot.serve.jobs.store import Store
from equipot.serve.operation import to_its_end

WRITE_SECONDS = 0.2
"""For which ends of structures are gathered to be written together: each time the disk is waited for."""

RETRY_SECONDS = 2.0
"""Between two attempts to write where the disk is full."""

UNWRITTEN = 2_000
UNWRITTEN_BYTES = 2**26
"""Moves that wait to be written, and the bytes of these; whoever brings more waits with them."""

SAVING_SHARE = 0.05
"""Of the time, that writing ways may take: where there is much to write, it is written less often."""

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Desk:
    """Reads and writes jobs one after the other, and tells who waits what has been written.

    Args:
        store: of the jobs.
        save_seconds: between two times that ways are written.
        on_written: told each job as it is after its moves were written.

    Attributes:
        problem: why nothing can be written now; empty if it can.
    """

    def __init__(self, store: Store, *, save_seconds: float, on_written: Callable[[JobRecord], None]) -> None:
        self._store = store
        self._save_seconds = save_seconds
        self._on_written = on_written
        self._thread = ThreadPoolExecutor(1, "equipot-jobs")
        self._moves: dict[int, list[Move]] = defaultdict(list)
        self._ways: dict[tuple[int, int], Move] = {}
        self._save_at = time.monotonic() + save_seconds
        self._n_moves = self._n_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._writing = asyncio.Lock()
        self._changed: dict[int, asyncio.Event] = {}
        self._keeping: asyncio.Task[None] | None = None
        self.problem = ""

    def open(self) -> None:
        """Begins to write what comes."""
        self._keeping = asyncio.create_task(self._keep_writing())

    async def close(self) -> None:
        """Writes what is there, if it can be written, and lets the store go."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        try:
            await self.write(ways=True)
        except StoreError as error:
            logger.warning("the last steps of jobs are lost, and will be taken again: %s", error)
        await self.do(self._store.close)
        self._thread.shutdown()

    async def do(self, method: Callable[P, T], *args: P.args, **words: P.kwargs) -> T:
        """A call of the store, in its thread.

        Raises:
            StoreError: as the method does.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(method, *args, **words))

    async def note(self, key: int, move: Move) -> None:
        """Has a structure's move written soon; waits where too much waits already."""
        if move.walk is not None and not move.ended and not move.results:
            self._ways[key, move.place] = move
            return
        if move.goes_elsewhere:
            # What waits was before it, and would be written behind it.
            self._ways.pop((key, move.place), None)
        self._moves[key].append(move)
        self._n_moves += 1
        self._n_bytes += move.n_bytes
        if self._n_moves >= UNWRITTEN or self._n_bytes >= UNWRITTEN_BYTES:
            self._room.clear()
            await self._room.wait()

    def forget(self, key: int) -> None:
        """Writes no more of a job's ways."""
        self._ways = {at: move for at, move in self._ways.items() if at[0] != key}

    async def write(self, *, ways: bool = False) -> None:
        """Writes what has come, and where structures are on their ways if wanted.

        Raises:
            StoreError: nothing was written, and everything is kept for the next time.
        """
        # What has begun is ended, whoever was waiting for it: else it would be written twice.
        await to_its_end(self._write(ways=ways))

    async def _write(self, *, ways: bool) -> None:
        async with self._writing:
            moves, self._moves = self._moves, defaultdict(list)
            walking, self._ways = (self._ways, {}) if ways else ({}, self._ways)
            together = {key: list(of_job) for key, of_job in moves.items()}
            for (key, _), move in walking.items():
                together.setdefault(key, []).append(move)
            if not together:
                return
            try:
                records = await self.do(self._store.advance, together)
            except BaseException:
                # What came meanwhile is newer, also where it came with results.
                newer = {
                    (key, move.place)
                    for key, of_job in self._moves.items()
                    for move in of_job
                    if move.goes_elsewhere
                }
                older = {at: move for at, move in walking.items() if at not in newer}
                for key, of_job in self._moves.items():
                    moves[key].extend(of_job)
                self._moves = moves
                self._ways = {**older, **self._ways}
                raise
            self._n_moves -= sum(len(of_job) for of_job in moves.values())
            self._n_bytes -= sum(move.n_bytes for of_job in moves.values() for move in of_job)
            self._room.set()
            for record in records.values():
                self._on_written(record)
                self.changed(record.key)

    def changed(self, key: int) -> None:
        """Wakes whoever waits for news of a job."""
        if event := self._changed.pop(key, None):
            event.set()

    def news(self, key: int) -> asyncio.Event:
        """Set once when something of a job has changed."""
        return self._changed.setdefault(key, asyncio.Event())

    def wake_all(self) -> None:
        """Wakes everybody."""
        for key in list(self._changed):
            self.changed(key)

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(RETRY_SECONDS if self.problem else WRITE_SECONDS)
            ways, begun = time.monotonic() >= self._save_at, time.monotonic()
            try:
                await self.write(ways=ways)
            except StoreError as error:
                if not self.problem:
                    logger.error("jobs stand still: %s", error)
                self.problem = str(error)
                continue
            if self.problem:
                logger.info("jobs can be written again")
                self.problem = ""
            if ways:
                took = time.monotonic() - begun
                self._save_at = time.monotonic() + max(self._save_seconds, took / SAVING_SHARE)


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Returns when the event is set, or time has passed."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
