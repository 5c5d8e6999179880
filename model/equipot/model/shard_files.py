"""A bundle's files against what its card states, on the disk and on their way there. Knows no tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from equipot.model.card import BundleCard, Shard
from equipot.model.errors import BundleError

CHUNK_BYTES = 4 * 2**20
AGAIN = "copy or export the bundle again"


class Readable(Protocol):
    """What can be read from: a file, a reply."""

    def read(self, amount: int, /) -> bytes:
        """At most so many bytes, none at the end."""
        ...


def check_shards(folder: str | Path, card: BundleCard) -> None:
    """Checks every shard's size and sha256.

    Raises:
        BundleError: one is missing, truncated or altered.
    """
    for shard in card.shards:
        check_shard(Path(folder), shard, verify=True)


def check_shard(folder: Path, shard: Shard, *, verify: bool) -> None:
    """Checks that a shard is there and of its size, and with `verify` its sha256.

    Raises:
        BundleError: it is missing, truncated or altered.
    """
    file = _place(folder, shard)
    if not file.is_file():
        raise BundleError(f"{file}: shard is missing; {AGAIN}")
    size = file.stat().st_size
    if size != shard.bytes:
        raise _wrong_size(str(file), str(size), shard)
    if verify:
        with file.open("rb") as stream:
            _compare(str(file), hashlib.file_digest(stream, "sha256").hexdigest(), shard)


def copy_shard(source: Readable, shard: Shard, folder: Path) -> None:
    """Writes a shard into a folder; no more of it than the card states is read.

    Raises:
        BundleError: it is not what the card states.
        Exception: whatever the source raises.
    """
    checksum, size = hashlib.sha256(), 0
    with _place(folder, shard).open("wb") as target:
        for chunk in chunks(source):
            size += len(chunk)
            if size > shard.bytes:
                break
            checksum.update(chunk)
            target.write(chunk)
    if size != shard.bytes:
        more = size > shard.bytes
        raise _wrong_size(shard.file, f"more than {shard.bytes}" if more else str(size), shard)
    _compare(shard.file, checksum.hexdigest(), shard)


def chunks(source: Readable) -> Iterator[bytes]:
    """What is left in it, some megabytes at a time."""
    while chunk := source.read(CHUNK_BYTES):
        yield chunk


def _place(folder: Path, shard: Shard) -> Path:
    if Path(shard.file).name != shard.file:
        raise BundleError(
            f"{folder}: shard name {shard.file!r} leaves the bundle's folder; do not use this bundle"
        )
    return folder / shard.file


def _wrong_size(shown: str, size: str, shard: Shard) -> BundleError:
    return BundleError(f"{shown}: shard has {size} bytes, the card says {shard.bytes}; {AGAIN}")


def _compare(shown: str, sha256: str, shard: Shard) -> None:
    if sha256 != shard.sha256:
        raise BundleError(
            f"{shown}: shard's sha256 differs from the card's, so it was altered or damaged; {AGAIN}"
        )
