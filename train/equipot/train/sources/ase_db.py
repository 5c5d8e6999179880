"""ASE databases in SQLite (`.db`), row by row, with their key-value pairs, which `ase.io.read` drops."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.db
from ase.db.row import AtomsRow

from equipot.train.errors import DataError
from equipot.train.sources.ase_row import row_frame
from equipot.train.sources.base import Frame, FrameError, ReadOptions, Reason, Rejected, Source, require_file

_SQLITE_MAGIC = b"SQLite format 3\x00"
_FIELDS = ("energy", "free_energy", "forces", "stress", "magmoms", "tags")


class AseDb:
    """One file as a `Reader`; frames are rows in the order of their ids."""

    format = "ase-db"

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._done = 0.0
        require_file(path)
        with path.open("rb") as file:
            if file.read(len(_SQLITE_MAGIC)) != _SQLITE_MAGIC:
                raise DataError(f"{path}: is not an SQLite file; name its real format with --format")
        try:
            self._ids = self._read_ids()
        except sqlite3.Error as error:
            raise DataError(f"{path}: is not an ASE database, or damaged ({error})") from None
        if not self._ids:
            raise DataError(f"{path}: holds no row")

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def count(self) -> int | None:
        """Number of rows."""
        return len(self._ids)

    def fraction(self) -> float | None:
        """Share of the rows read so far."""
        return self._done

    def _read_ids(self) -> range | list[int]:
        """Ids of the rows: a range where there are no gaps, so that memory does not grow with the file."""
        uri = f"file:{self._path.resolve().as_posix().replace('?', '%3f').replace('#', '%23')}?mode=ro"
        connection = sqlite3.connect(uri, uri=True)
        try:
            count, first, last = connection.execute(
                "SELECT COUNT(id), MIN(id), MAX(id) FROM systems"
            ).fetchone()
            if count and last - first + 1 == count:
                return range(first, last + 1)
            return [row[0] for row in connection.execute("SELECT id FROM systems ORDER BY id")]
        finally:
            connection.close()

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields row `start` and those after it."""
        with ase.db.connect(self._path, type="db", use_lock_file=False) as database:
            for index in range(start, len(self._ids)):
                self._done = index / len(self._ids)
                number = self._ids[index]
                try:
                    yield row_frame(index, _named(database.get(id=number)), self._options)
                except FrameError as error:
                    yield Rejected(index, error.reason, f"row {number}: {error.detail}")
                except Exception as error:  # a damaged row: whatever SQLite and ASE's decoders raise
                    detail = f"row {number}: {type(error).__name__}: {error}"[:200]
                    yield Rejected(index, Reason.UNREADABLE, detail)
            self._done = 1.0


def _named(row: AtomsRow) -> dict[str, Any]:
    return {
        "numbers": row.numbers,
        "positions": row.positions,
        "cell": row.cell,
        "pbc": row.pbc,
        "key_value_pairs": row.key_value_pairs,
        "data": row.data,
        "constraints": [constraint.todict() for constraint in row.constraints],
        **{field: row.get(field) for field in _FIELDS if row.get(field) is not None},
    }


SOURCE = Source(name="ase-db", open=AseDb, files=("*.db",), extras=("tags", "fixed", "magmoms"))
