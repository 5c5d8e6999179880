"""Writes a bundle's safetensors shards and their index, tensor by tensor. Knows no models.

The format (github.com/huggingface/safetensors) puts a header before the tensors, a JSON text that may end in
spaces. Room is left for it and it is written last, so nothing has to be collected first: a model is exported
in the memory of its largest tensor.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from equipot.model.card import Shard

INDEX_FILE = "model.safetensors.index.json"
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}
_CHUNK = 2**24  # bytes written at once


class ShardWriter:
    """Files of at most so many bytes, one after the other."""

    def __init__(
        self, folder: Path, max_shard_bytes: int, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Args:
        folder: an empty one.
        max_shard_bytes: a new shard begins before this is exceeded; one tensor alone may exceed it.
        dtype: the tensors are stored in.
        shapes: all that may come.
        """
        self._folder = folder
        self._limit = max_shard_bytes
        self._dtype = dtype
        numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
        end = numbers * dtype.itemsize
        longest = _header({key: (shape, end, end) for key, shape in shapes.items()}, dtype)
        self._room = -(-len(longest) // 8) * 8  # tensors begin at a multiple of eight bytes
        self._file: BinaryIO | None = None
        self._entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        self._size = 0
        self._total_bytes = 0
        self.shard_of: dict[str, int] = {}
        """Number of the shard that each tensor went to."""
        self._n_shards = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Write a tensor; it may be dropped then.

        Raises:
            OSError: it cannot be written.
        """
        size = tensor.numel() * self._dtype.itemsize
        if self._file is not None and self._size + size > self._limit:
            self._close()
        if self._file is None:
            self._file = self._part(self._n_shards).open("wb")
            self._file.seek(8 + self._room)
        flat = tensor.detach().to(device="cpu", dtype=self._dtype).contiguous().view(-1)
        step = _CHUNK // self._dtype.itemsize
        for at in range(0, len(flat), step):
            self._file.write(flat[at : at + step].view(torch.uint8).numpy().data)
        self._entries[key] = (tuple(tensor.shape), self._size, self._size + size)
        self._size += size
        self.shard_of[key] = self._n_shards

    def finish(self) -> tuple[Shard, ...]:
        """Name the shards, write their index, wait until all is on disk."""
        if self._file is not None:
            self._close()
        names = [f"model-{k + 1:05d}-of-{self._n_shards:05d}.safetensors" for k in range(self._n_shards)]
        shards = []
        for k, name in enumerate(names):
            file = self._part(k).rename(self._folder / name)
            shards.append(Shard(file=name, bytes=file.stat().st_size, sha256=sha256_of(file)))
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {key: names[k] for key, k in self.shard_of.items()},
        }
        write_text(self._folder / INDEX_FILE, json.dumps(index, sort_keys=True, indent=1) + "\n")
        return tuple(shards)

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"

    def _close(self) -> None:
        assert self._file is not None
        header = _header(self._entries, self._dtype)
        with self._file as file:
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
            file.flush()
            os.fsync(file.fileno())
        self._total_bytes += self._size
        self._file, self._entries, self._size = None, {}, 0
        self._n_shards += 1


def _header(entries: Mapping[str, tuple[tuple[int, ...], int, int]], dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for key, (shape, begin, end) in entries.items():
        header[key] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    return json.dumps(header).encode()


def sha256_of(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    file.write_text(text, encoding="utf-8")
    sync(file)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
