"""Reads files in several processes and hands out what they read in the order of the files.

Each process has one task at a time. What arrives before its turn is held, up to `AHEAD_BYTES` in all; beyond
that only the process whose turn it is is listened to, and the others wait at their pipes: memory is bounded
whatever the files. A process that dies is replaced once for the same frames, which are then sent one by one;
if it dies again, of a crash, they are left out, and of anything else the import stops. Knows no store.
"""

import bisect
import heapq
import multiprocessing
import os
import pickle
import signal
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from equipot.train.block import Block, BlockBuilder, BlockOptions
from equipot.train.errors import DataError
from equipot.train.reading import (
    Hashed,
    Hashing,
    Message,
    Opened,
    Reading,
    ReadingOptions,
    Task,
    lost,
)
from equipot.train.sources.lmdb_file import data_file

AHEAD_BYTES = 2**25
"""Held per process at most; enough for a file of 5,000 slabs."""
MOST_WORKERS = 32
"""Not exceeded by default: the one writer is busy then."""
_SMALL = 2**23
"""Bytes of files that are read sooner than processes are started."""
_TICK = 0.2
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


@dataclass(frozen=True, slots=True)
class _Failed:
    """The task cannot go on; the message is the user's."""

    message: str


@dataclass(frozen=True, slots=True)
class _Ended:
    """The task is done."""


_STOP = struct.Struct("<q")
"""What goes before a message: the frame after a block's last, −1 for any other message."""


def _packed(message: Message | _Ended | _Failed) -> bytes:
    stop = message.stop if isinstance(message, Block) else -1
    return _STOP.pack(stop) + pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def _unpacked(data: bytes) -> Any:  # noqa: ANN401 - one of four kinds, told apart by their users
    return pickle.loads(memoryview(data)[_STOP.size :])


def work(files: Sequence[Path], options: ReadingOptions, tasks: Connection, results: Connection) -> None:
    """The life of a reading process: tasks in, messages out, until the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a stop is for the writer, who says when to end
        signal.signal(number, signal.SIG_IGN)
    reading = Reading(files, options)
    try:
        while True:
            task: Task = tasks.recv()
            try:
                for message in reading.run(task):
                    results.send_bytes(_packed(message))
                last: _Ended | _Failed = _Ended()
            except DataError as error:
                last = _Failed(str(error))
            results.send_bytes(_packed(last))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@dataclass(slots=True)
class _Part:
    """A task, and what has arrived of it."""

    task: Task
    held: deque[bytes] = field(default_factory=deque)
    hashed: Hashed | None = None
    opened: bool = False
    reached: int = 0
    deaths: int = 0
    ended: bool = False

    @property
    def place(self) -> tuple[int, int]:
        return self.task.file, self.task.start


class _Worker:
    """A reading process with its two pipes."""

    def __init__(self, files: Sequence[Path], options: ReadingOptions) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        theirs, self._tasks = context.Pipe(duplex=False)
        self.results, theirs_too = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(
            target=work, args=(files, options, theirs, theirs_too), daemon=True
        )
        self.process.start()
        theirs.close()
        theirs_too.close()
        self.part: _Part | None = None

    def give(self, part: _Part) -> None:
        """Sends a task. OSError if the process is dead."""
        self._tasks.send(part.task)
        self.part = part

    def end(self) -> int | None:
        """Ends the process at once; returns how it ended by itself, None if it had not."""
        self.process.join(0.5)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self._tasks.close()
        self.results.close()
        return code


class ReaderPool:
    """Processes that read files; a context manager that ends them."""

    def __init__(
        self,
        files: Sequence[Path],
        options: ReadingOptions,
        *,
        workers: int,
        start: tuple[int, int],
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        """Nothing is read before `messages` is.

        Args:
            files: in the order in which they are handed out.
            options: how to read them.
            workers: number of processes.
            start: (file, frame) to begin with.
            ahead_bytes: that may be held, times the number of processes.
        """
        self._files = files
        self._options = options
        self._limit = ahead_bytes * workers
        self._next = start
        self._order: list[_Part] = []
        self._waiting: list[tuple[tuple[int, int], _Part]] = []
        self._held = 0
        self.most_held = 0
        self._workers: list[_Worker] = []
        self._wanted = workers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()

    @property
    def pids(self) -> list[int]:
        """Of the processes that live."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def messages(self) -> Iterator[tuple[int, Message] | None]:
        """Yields (number of the file, message) in the order of files and frames; None now and then.

        `Hashing` comes when it happens.

        Raises:
            DataError: a file changed or vanished, or processes died of it.
        """
        while True:
            self._assign()
            if not self._order:
                return
            head = self._order[0]
            while head.held:
                data = head.held.popleft()
                self._held -= len(data)
                message = _unpacked(data)
                if isinstance(message, _Failed):
                    raise DataError(message.message)
                yield head.task.file, message
            if head.ended:
                del self._order[0]
                continue
            yield None
            for worker in self._ready(head):
                part, message = self._receive(worker)
                if message is not None:
                    yield part.task.file, message

    def _assign(self) -> None:
        """Gives every idle process the first task that none has."""
        while len(self._workers) < self._wanted and self._more():
            self._workers.append(_Worker(self._files, self._options))
            self._give(len(self._workers) - 1)
        for k, worker in enumerate(self._workers):
            if worker.part is None and self._more():
                self._give(k)

    def _more(self) -> bool:
        return bool(self._waiting) or self._next[0] < len(self._files)

    def _give(self, k: int) -> None:
        if self._waiting:
            _, part = heapq.heappop(self._waiting)
        else:
            file, frame = self._next
            self._next = (file + 1, 0)
            part = _Part(Task(file, frame), reached=frame)
            self._order.append(part)
        try:
            self._workers[k].give(part)
        except OSError:
            self._replace(k, part)

    def _replace(self, k: int, part: _Part) -> None:
        """A new process in place of a dead one, for the same task."""
        self._workers[k].end()
        self._workers[k] = _Worker(self._files, self._options)
        self._workers[k].give(part)

    def _ready(self, head: _Part) -> list[_Worker]:
        """Processes that have something to say and may: beyond the limit, only the one whose turn it is."""
        listened = {
            worker.results: worker
            for worker in self._workers
            if worker.part is not None and (worker.part is head or self._held < self._limit)
        }
        return [listened[connection] for connection in wait(list(listened), _TICK) if connection in listened]

    def _receive(self, worker: _Worker) -> tuple[_Part, Hashing | None]:
        """Takes one message; holds it until its turn, but `Hashing` is returned at once."""
        part = worker.part
        assert part is not None
        try:
            data = worker.results.recv_bytes()
        except (EOFError, OSError):
            self._died(worker, part)
            return part, None
        (stop,) = _STOP.unpack_from(data)
        if stop >= 0:
            part.reached = stop
            self._hold(part, data)
            return part, None
        message = _unpacked(data)
        if isinstance(message, Hashing):
            return part, message
        if isinstance(message, _Ended | _Failed):
            part.ended = isinstance(message, _Ended)
            worker.part = None
            if isinstance(message, _Ended):
                return part, None
        elif isinstance(message, Hashed):
            if part.hashed is not None:  # it died in between, and the file was hashed again
                return part, None
            part.hashed = message
        elif isinstance(message, Opened):
            self._divide(part, message)
        self._hold(part, data)
        return part, None

    def _hold(self, part: _Part, data: bytes) -> None:
        part.held.append(data)
        self._held += len(data)
        self.most_held = max(self.most_held, self._held)

    def _divide(self, part: _Part, opened: Opened) -> None:
        """Makes tasks of the ranges of a file but the first, which its process reads by itself."""
        part.opened = True
        if part.hashed is None or not opened.ranges:
            return
        for start, stop in opened.ranges[1:]:
            further = _Part(
                Task(part.task.file, start, stop, part.hashed.sha256),
                opened=True,
                hashed=part.hashed,
                reached=start,
            )
            bisect.insort(self._order, further, key=lambda each: each.place)
            heapq.heappush(self._waiting, (further.place, further))
        part.task = replace(part.task, stop=opened.ranges[0][1])

    def _died(self, worker: _Worker, part: _Part) -> None:
        """Lets another process try once more, frame by frame; then gives the frames up, or the import."""
        part.deaths += 1
        k = self._workers.index(worker)
        if part.deaths == 1:
            checksum = part.hashed.sha256 if part.hashed is not None and part.opened else ""
            part.task = replace(part.task, start=part.reached, checksum=checksum, careful=True)
            self._replace(k, part)
            return
        code = worker.end()
        self._workers[k] = _Worker(self._files, self._options)
        self._give_up(part, code)

    def _give_up(self, part: _Part, code: int | None) -> None:
        path = self._files[part.task.file]
        until = "on" if part.task.stop is None else f"to {part.task.stop - 1}"
        why = "nobody knows why" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            why = signal.Signals(-code).name
        what = f"the process that read it died twice ({why})"
        if code is None or -code not in _CRASHES or part.hashed is None:
            told = f"{path}: {what}, in frames {part.reached} {until}; what is committed stays: run the same "
            told += "command again, with fewer --workers if memory was short"
            self._hold(part, _packed(_Failed(told)))
            return
        if not part.opened:
            name = self._options.source or path.suffix.lstrip(".")
            self._hold(part, _packed(Opened(name, fault=f"{path}: {what}")))
        builder = BlockBuilder(BlockOptions(columns=(), rule=self._options.block.rule), "")
        builder.add(lost(part.task, part.reached, what))
        self._hold(part, _packed(builder.take(None)))
        part.ended = True


def default_workers(files: Sequence[Path]) -> int:
    """One for each core that this process may use, up to `MOST_WORKERS`; 1 for data read in no time."""
    if sum(data_file(path).stat().st_size for path in files if data_file(path).is_file()) < _SMALL:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)
