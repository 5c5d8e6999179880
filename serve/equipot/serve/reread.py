"""Values read from files that are read again when the files change. Knows nothing of what is in them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from equipot.serve.errors import ServeError

POLL_SECONDS = 1.0
"""How often files are looked at; a look is one `stat`, which also sees Kubernetes swap its symlinks."""

MOST_BYTES = 8 * 2**20
"""Of a file of certificates, tokens or limits; a larger one is none of these, and reading it holds up all."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Refreshable(Protocol):
    """Something that may have changed on disk."""

    def refresh(self) -> bool:
        """Looks; returns whether there is a new value."""


class Reread(Generic[T]):
    """The last good value of some files. A bad new one is logged once, tried again, and the old one stays.

    Args:
        what: they are, for the log.
        paths: of the files; a change of any of them reads all again.
        read: makes the value of them.

    Attributes:
        value: the last good one.

    Raises:
        ServeError: by `read`, the first time.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._read = read
        # Looked at before they are read: what changes meanwhile is read again.
        self._seen = self._look()
        self._told = ""
        self.value = read()

    def refresh(self) -> bool:
        """Reads again what has changed since it was read well; returns whether there is a new value."""
        seen = self._look()
        if seen == self._seen:
            return False
        try:
            self.value = self._read()
        except Exception as error:
            # Tried again at the next look: a certificate may begin in a second, a disk may answer again.
            self._tell(error)
            return False
        self._seen, self._told = seen, ""
        logger.info("%s read again", self._what)
        return True

    def _tell(self, error: Exception) -> None:
        if self._told == (told := f"{type(error).__name__}: {error}"):
            return
        self._told = told
        words = "the new %s cannot be used, the old one stays: %s"
        # What is no ServeError nobody expected: the log says where it came from.
        unexpected = None if isinstance(error, ServeError) else error
        logger.error(words, self._what, error, exc_info=unexpected)

    def _look(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(_signature(path) for path in self._paths)


async def keep_current(values: Iterable[Refreshable]) -> None:
    """Reads again what has changed, until cancelled."""
    values = list(values)
    while values:
        await asyncio.sleep(POLL_SECONDS)
        for value in values:
            try:
                value.refresh()
            except Exception:
                # Else nothing would be looked at any more, and nobody would know.
                logger.exception("what has changed in files could not be put into force")


def read_bytes(path: Path, flag: str) -> bytes:
    """A file's bytes.

    Raises:
        ServeError: it cannot be read, or is too large; names the flag that named the file.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ServeError(f"{flag} {path} cannot be read: {error.strerror or error}") from error
    if len(raw) > MOST_BYTES:
        raise ServeError(f"{flag} {path} has more than {MOST_BYTES} bytes: name the right file")
    return raw


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
