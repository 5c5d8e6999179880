"""Writes tensors to a safetensors file one after the other. Knows neither checkpoints nor models.

The format (github.com/huggingface/safetensors): a header's length as eight bytes, the header as JSON, the
tensors' bytes. Written by hand because the tensors come one at a time, from wherever they live, and their
checksum is taken as they pass: a rank needs no second copy of its state, and nothing is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_NAMES = {torch.float32: "F32", torch.uint8: "U8"}
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
