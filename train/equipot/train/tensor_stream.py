"""Writes and reads safetensors files one tensor after the other. Knows neither checkpoints nor models.

The format (github.com/huggingface/safetensors): a header's length as eight bytes, the header as JSON, the
tensors' bytes. By hand, because tensors come one at a time, from wherever they live, and their checksum is
taken as they pass: a rank needs no second copy of its state. Read with plain reads, because the pages of a
mapped file count as the process's memory for as long as it is open.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import torch

_NAMES = {torch.float32: "F32", torch.uint8: "U8"}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
T = TypeVar("T", bytearray, memoryview)
_CHUNK = 2**24  # bytes: what is hashed is still in the cache when it is written


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to come."""

    key: str
    dtype: torch.dtype
    length: int


def write_stream(
    path: Path, entries: Iterable[Entry], tensors: Iterable[torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, object]:
    """Write flat tensors, in the order of their entries, and wait until they are on disk.

    Args:
        path: the file, which is written anew.
        entries: what will come.
        tensors: what comes, on any device; asked for one at a time.
        metadata: words to keep in the header.

    Returns:
        The file's ``bytes`` and ``sha256``.

    Raises:
        OSError: it cannot be written.
    """
    entries = list(entries)
    header = _header(entries, metadata)
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        size = file.write(header)
        for entry, tensor in zip(entries, tensors, strict=True):
            if (tensor.dtype, tensor.numel()) != (entry.dtype, entry.length):
                raise ValueError(f"{entry.key} came as {tensor.numel()} numbers of {tensor.dtype}")
            if not entry.length:
                continue  # numpy has no view of nothing
            data = tensor.detach().cpu().contiguous().numpy().data.cast("B")
            for at in range(0, len(data), _CHUNK):
                digest.update(data[at : at + _CHUNK])
                size += file.write(data[at : at + _CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


class TensorFile:
    """Tensors of a file, read where they are asked for; use as a context manager.

    Raises:
        OSError, ValueError, KeyError: no such file, or not of this format.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb", buffering=0)
        try:
            length = int.from_bytes(self._read(bytearray(8)), "little")
            if length > path.stat().st_size:
                raise ValueError(f"{path} has a header of {length} bytes and is shorter")
            self._entries: dict[str, dict[str, Any]] = json.loads(self._read(bytearray(length)))
            self.metadata: dict[str, str] = self._entries.pop("__metadata__")
        except BaseException:
            self._file.close()
            raise
        self._begin = 8 + length

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def read(self, key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A flat tensor, or the part of it from `start` to `stop`."""
        entry = self._entries[key]
        stop = entry["shape"][0] if stop is None else stop
        values = torch.empty(stop - start, dtype=_TYPES[entry["dtype"]])
        if len(values):
            self._file.seek(self._begin + entry["data_offsets"][0] + start * values.itemsize)
            self._read(values.numpy().data.cast("B"))
        return values

    def _read(self, into: T) -> T:
        view, done = memoryview(into), 0
        while done < len(view):
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]  # unbuffered: may be a part
            if not count:
                raise ValueError(f"{self._file.name} ends too early")
            done += count
        return into


def _header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for entry in entries:
        end = at + entry.length * entry.dtype.itemsize
        header[entry.key] = {
            "dtype": _NAMES[entry.dtype],
            "shape": [entry.length],
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text
