"""Stands for a file of a release that cannot be opened, so that the report names it beside the others."""

from collections.abc import Iterator
from pathlib import Path

from equipot.train.sources.base import Frame, Reason, Rejected


class UnreadableFile:
    """A `Reader` whose only item says why there are none."""

    count = None

    def __init__(self, path: Path, format: str, why: str) -> None:
        self._path = path
        self._format = format
        self._why = why

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def format(self) -> str:
        """Name of the format it should have been."""
        return self._format

    def fraction(self) -> float | None:
        """All of it."""
        return 1.0

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields one `Rejected` for the whole file."""
        if start == 0:
            yield Rejected(0, Reason.UNREADABLE, f"the whole file: {self._why}")
