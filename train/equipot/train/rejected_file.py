"""`rejected.csv` beside the manifest: every frame that was left out, with file, frame, reason and evidence.

It grows with the store: rows are appended in the order of reading, and what lies behind the length that the
journal states is cut off when a killed import is taken up again. Knows nothing of arrays.
"""

import csv
import io
import os
from pathlib import Path

from equipot.train.errors import DataError
from equipot.train.sources.base import Rejected

NAME = "rejected.csv"
HEADER = ("file", "frame", "reason", "detail")
_HELD = 2**20


class RejectedFile:
    """The list of one store, held open for appending by nobody but the writer."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._text = io.StringIO(newline="")
        self._csv = csv.writer(self._text, lineterminator="\n")
        self._bytes = 0

    def start(self, size: int) -> None:
        """Goes on after so many bytes; DataError if they are not there."""
        if size and (not self._path.exists() or self._path.stat().st_size < size):
            raise DataError(f"{self._path}: is missing or cut short; import the data again into a new store")
        self._bytes = size
        self.cut(size)

    def cut(self, size: int) -> None:
        """Drops what lies behind so many bytes; an empty list is no file."""
        if size == 0:
            self._path.unlink(missing_ok=True)
        else:
            os.truncate(self._path, size)

    def add(self, file: str, item: Rejected) -> None:
        """Lists a frame of a file."""
        if self._bytes == 0 and self._text.tell() == 0:
            self._csv.writerow(HEADER)
        self._csv.writerow((file, item.index, item.reason.value, " ".join(item.detail.split())))
        if self._text.tell() > _HELD:
            self._write()

    def _write(self) -> None:
        data = self._text.getvalue().encode("utf-8", "backslashreplace")
        if not data:
            return
        with self._path.open("r+b" if self._bytes else "w+b") as file:
            file.truncate(self._bytes)
            file.seek(self._bytes)
            file.write(data)
        self._bytes += len(data)
        self._text.seek(0)
        self._text.truncate()

    def sync(self) -> int:
        """Brings it onto the disk; returns its length in bytes."""
        self._write()
        if self._bytes:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        return self._bytes
