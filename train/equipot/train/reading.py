"""Reads one file, or a range of its frames, into blocks: the part of an import that any process can do.

A file is hashed when its turn comes and not before. What comes out are messages, in this order: `Hashing`
while the checksum is made, `Hashed`, `Opened`, then blocks; for a range of a file that is known already,
blocks alone. Knows neither stores nor processes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from equipot.train.block import Block, BlockBuilder, BlockOptions
from equipot.train.errors import DataError
from equipot.train.sources.base import Frame, Reader, ReadOptions, Reason, Rejected
from equipot.train.sources.lmdb_file import data_file
from equipot.train.sources.registry import RELEASES, open_container
from equipot.train.sources.unreadable import UnreadableFile

RANGE_BYTES = 2**24
_HASH_BYTES = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingOptions:
    """What is the same for all files of an import.

    Attributes:
        read: keys and formats.
        source: name of the release the files are of, "" for any other file.
        block: how frames become blocks.
        known: checksums of files that the store holds; such a file is not read.
        range_bytes: of a file whose frames can be reached at once, so much is read at a time by one process.
    """

    read: ReadOptions
    source: str
    block: BlockOptions
    known: frozenset[str] = frozenset()
    range_bytes: int = RANGE_BYTES


@dataclass(frozen=True, slots=True)
class Task:
    """Frames `start` to `stop` (None: the last) of file number `file`.

    Attributes:
        checksum: of the file, "" if it is not known yet: then the file is hashed first, and if it can be
            divided, only the first range of `ranges` is read.
        careful: send every frame by itself: a process that died in these frames shall not lose others.
    """

    file: int
    start: int = 0
    stop: int | None = None
    checksum: str = ""
    careful: bool = False


@dataclass(frozen=True, slots=True)
class Hashing:
    """So many bytes of the file are hashed."""

    done: int


@dataclass(frozen=True, slots=True)
class Hashed:
    """Checksum and state of the file; `known` if the store holds it already, and nothing more comes."""

    sha256: str
    bytes: int
    modified: int
    known: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """What the file is.

    Attributes:
        format: name of it.
        ranges: [start, stop) of the tasks it is divided into, the first of which the process that opened it
            goes on with; empty if it is read as a whole.
        fault: why it cannot be read; its only item is then a `Rejected`.
    """

    format: str
    ranges: tuple[tuple[int, int], ...] = ()
    fault: str = ""


Message = Hashing | Hashed | Opened | Block


def divide(count: int, parts: int, start: int) -> tuple[tuple[int, int], ...]:
    """Frames `start` to `count` in about so many ranges of equal length; none if that leaves but one."""
    step = -(-count // max(1, min(count, parts)))
    cut = tuple((max(at, start), min(at + step, count)) for at in range(start // step * step, count, step))
    return cut if len(cut) > 1 else ()


class Reading:
    """Runs tasks; keeps the last file open, so that its next range costs no opening."""

    def __init__(self, files: Sequence[Path], options: ReadingOptions, *, divide: bool = True) -> None:
        self._divide = divide
        self._files = files
        self._options = options
        self._opened: tuple[int, Reader] | None = None

    def run(self, task: Task) -> Iterator[Message]:
        """Yields the messages of a task.

        Raises:
            DataError: the file went away or changed while it was read, or memory is short.
        """
        path = data_file(self._files[task.file])
        try:
            before = path.stat()
            checksum, stop = task.checksum, task.stop
            if not checksum:
                self._opened = None
                for done, digest in checksum_of(path):
                    yield Hashing(done)
                    checksum = digest
                known = checksum in self._options.known
                yield Hashed(checksum, before.st_size, before.st_mtime_ns, known)
                if known:
                    return
            reader, fault = self._open(task.file)
            if not task.checksum:
                ranges = self._ranges(reader, before.st_size, task.start)
                yield Opened(reader.format, ranges, fault)
                stop = ranges[0][1] if ranges else None
            task = replace(task, checksum=checksum, stop=stop)
            again = fault and task.start > 0  # it could be opened when its first frames were read
            items = [lost(task, task.start, fault)] if again else reader.frames(task.start)
            yield from self._blocks(reader, items, task)
            after = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; mend that, then {_AGAIN}") from None
        except MemoryError:
            raise DataError(f"{path}: there is not enough memory to read it; {_AGAIN} with more") from None
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(f"{path}: was changed while it was read; let it be finished, then {_AGAIN}")

    def _ranges(self, reader: Reader, size: int, start: int) -> tuple[tuple[int, int], ...]:
        if not self._divide or reader.count is None:
            return ()
        return divide(reader.count, size // self._options.range_bytes, start)

    def _open(self, file: int) -> tuple[Reader, str]:
        if self._opened is not None and self._opened[0] == file:
            return self._opened[1], ""
        path = self._files[file]
        source = RELEASES.get(self._options.source)
        try:
            if source is not None:
                reader: Reader = source.open(path, self._options.read)
            else:
                reader = open_container(path, self._options.read)
        except DataError as error:
            name = source.name if source is not None else path.suffix.lstrip(".")
            return UnreadableFile(path, name, str(error)), str(error)
        self._opened = (file, reader)
        return reader, ""

    def _blocks(self, reader: Reader, items: Iterable[Frame | Rejected], task: Task) -> Iterator[Block]:
        limits = replace(self._options.block, frames=1) if task.careful else self._options.block
        builder = BlockBuilder(limits, task.checksum)
        following = task.start
        try:
            for item in items:
                builder.add(item)
                following = item.index + 1
                if builder.full:
                    yield builder.take(reader.fraction())
                if task.stop is not None and following >= task.stop:
                    break
        except (OSError, MemoryError):
            raise
        except Exception as error:  # no file, however odd, shall cost more than itself
            builder.add(lost(task, following, f"{type(error).__name__}: {error}"[:200]))
        if not builder.empty:
            yield builder.take(reader.fraction())


_AGAIN = "run the same command again"


def checksum_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (bytes hashed so far, ""), and at last (all bytes, SHA-256 of the file)."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_HASH_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            yield done, ""
    yield done, digest.hexdigest()


def lost(task: Task, frame: int, why: str) -> Rejected:
    """Stands for the frames of a task from `frame` on, which cannot be read."""
    until = "the rest of the file" if task.stop is None else f"all up to frame {task.stop - 1}"
    return Rejected(frame, Reason.UNREADABLE, f"{why}; {until} is lost")
