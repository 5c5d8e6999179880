"""ASE databases in LMDB (`.aselmdb`, as fairchem ships OMat24, OC20 and OMol25): zlib-compressed JSON rows.

Keys are row numbers; "nextid", "deleted_ids" and "metadata" are none. Arrays are ASE's `__ndarray__` or plain
lists; nothing in a row names a class.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equipot.train.errors import DataError
from equipot.train.sources.ase_row import row_frame
from equipot.train.sources.base import Frame, FrameError, ReadOptions, Reason, Rejected, Source
from equipot.train.sources.lmdb_file import LmdbDamage, LmdbFile

MAX_ROW = 2**28
"""Bytes of one row when decompressed; a few bytes can be made to decompress to any size."""


class AseLmdb:
    """One file as a `Reader`; frames are rows in the order of their numbers, without gaps."""

    format = "aselmdb"

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path = path
        self._options = options
        self._done = 0.0
        if not path.exists():
            raise DataError(f"{path}: no such file")
        file = LmdbFile(path)
        try:
            self._count, self._damage = _last_row(file), file.missing_bytes
            if self._count < 1:
                raise DataError(f"{path}: holds no rows 1, 2, …: is not an ASE database in LMDB")
        finally:
            file.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def count(self) -> int | None:
        """Number of rows."""
        return self._count

    def fraction(self) -> float | None:
        """Share of the rows read so far."""
        return self._done

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields row `start` + 1 and those after it; a deleted row comes as `Rejected`."""
        file = LmdbFile(self._path)
        try:
            deleted = set(_decoded(file, b"deleted_ids") or ())
            for index in range(start, self._count):
                self._done = index / self._count
                try:
                    data = file.get(str(index + 1).encode())
                    if data is None:
                        what = "was deleted" if index + 1 in deleted else "is not there"
                        raise FrameError(Reason.UNREADABLE, f"row {index + 1} {what}")
                    yield row_frame(index, decode_row(data), self._options)
                except FrameError as error:
                    yield Rejected(index, error.reason, error.detail)
                except LmdbDamage as error:
                    yield Rejected(index, Reason.UNREADABLE, f"row {index + 1}: {error}")
            self._done = 1.0
        finally:
            file.close()


def _last_row(file: LmdbFile) -> int:
    """Number of the last row."""
    following = _decoded(file, b"nextid")
    if isinstance(following, int):
        return following - 1
    try:
        return max((int(key) for key in iter(file.keys()) if key.isdigit()), default=0)
    except LmdbDamage:
        return file.entries


def _decoded(file: LmdbFile, key: bytes) -> Any:  # noqa: ANN401 - whatever JSON holds
    try:
        data = file.get(key)
        return None if data is None else _json(data)
    except (LmdbDamage, FrameError):
        return None


def decode_row(data: bytes) -> Mapping[str, Any]:
    """One row as named values; FrameError if it is damaged or too large."""
    row = _json(data)
    if not isinstance(row, dict):
        raise FrameError(Reason.UNREADABLE, f"the row is a {type(row).__name__}, not named values")
    try:
        return {key: _arrays(value) for key, value in row.items() if value is not None}
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(Reason.UNREADABLE, f"an array is malformed ({error})"[:150]) from None


def _json(data: bytes) -> Any:  # noqa: ANN401 - whatever JSON holds
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(data, MAX_ROW)
        if inflate.unconsumed_tail:
            raise FrameError(Reason.REFUSED, f"the row decompresses to more than {MAX_ROW} bytes")
        if not inflate.eof:
            raise FrameError(Reason.UNREADABLE, "the row is cut short")
        return json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise FrameError(Reason.UNREADABLE, f"the row is damaged ({error})"[:150]) from None


def _arrays(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Undoes ASE's way of writing an array in JSON, {"__ndarray__": [shape, type, numbers]}."""
    if isinstance(value, dict) and "__ndarray__" in value:
        shape, dtype, numbers = value["__ndarray__"]
        if np.dtype(dtype).kind not in "biuf":
            raise ValueError(f"an array of {dtype}")
        return np.array(numbers, dtype=dtype).reshape(shape)
    if isinstance(value, dict) and "array" in value and value.get("__ase_objtype__") == "cell":
        return _arrays(value["array"])
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_arrays(item) for item in value]
    return value


SOURCE = Source(name="aselmdb", open=AseLmdb, files=("*.aselmdb",), extras=("tags", "fixed", "magmoms"))
