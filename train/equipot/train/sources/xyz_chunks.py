"""Cuts an (ext)xyz stream into frames of text, and survives frames that are cut short or too long.

ASE's own reader stops without a word at the first blank line and gives up the whole file at the first
malformed frame; this one goes on with the next frame and says which lines it could not use. It does not
look inside a frame.
"""

import bz2
import gzip
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

HEADER_LIMIT = 4096
"""Bytes read in search of the first line: a binary file may hold no line end at all."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The lines of one frame; `fault` says what is wrong with their number, if anything."""

    index: int
    first_line: int
    n_atoms: int
    text: str
    fault: str | None


def open_stream(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """Returns (stream of plain bytes, raw file): the second's position tells how much of the file is read."""
    raw = path.open("rb")
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
        case ".bz2":
            return cast(BinaryIO, bz2.BZ2File(raw)), raw
        case ".xz":
            return cast(BinaryIO, lzma.LZMAFile(raw)), raw
    return raw, raw


def first_line(path: Path) -> bytes:
    """The first non-blank line, at most `HEADER_LIMIT` bytes of it."""
    stream, raw = open_stream(path)
    with raw, stream:
        while line := stream.readline(HEADER_LIMIT):
            if line.strip():
                return line.strip()
    return b""


def is_header(line: bytes) -> bool:
    """Whether the line is a frame's first: an atom count and nothing else (an atom's line has four words)."""
    return line.strip().isdigit()


class _Lines:
    """A stream of lines with one line of look-ahead and a count."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._next: bytes | None = None
        self.number = 0

    def peek(self) -> bytes:
        if self._next is None:
            self._next = self._stream.readline()
        return self._next

    def take(self) -> bytes:
        line = self.peek()
        self._next = None
        self.number += bool(line)
        return line


def chunks(stream: BinaryIO) -> Iterator[Chunk]:
    """Yields each frame of an xyz stream; lines that belong to no frame make the frame before them faulty."""
    lines = _Lines(stream)
    index = 0
    while lines.peek():
        if not lines.peek().strip():
            lines.take()
            continue
        first = lines.number + 1
        if not is_header(lines.peek()):
            skipped = _skip_to_header(lines)
            yield Chunk(index, first, 0, "", f"line {first} is not an atom count; {skipped} line(s) skipped")
            index += 1
            continue
        header = lines.take()
        n_atoms = int(header)
        body = [lines.take()]
        fault = None
        while len(body) <= n_atoms:
            if not lines.peek() or is_header(lines.peek()):
                fault = f"line {first} announces {n_atoms} atoms, {len(body) - 1} follow"
                break
            body.append(lines.take())
        while lines.peek().lstrip().startswith(b"VEC"):  # ASE's own way of writing a cell
            body.append(lines.take())
        if fault is None and lines.peek().strip() and not is_header(lines.peek()):
            extra = _skip_to_header(lines)
            fault = f"line {first} announces {n_atoms} atoms, {n_atoms + extra} follow"
        text = b"".join([header, *body]).decode("utf-8", errors="replace")
        yield Chunk(index, first, n_atoms, text, fault)
        index += 1


def _skip_to_header(lines: _Lines) -> int:
    skipped = 0
    while lines.peek() and not is_header(lines.peek()):
        skipped += bool(lines.take().strip())
    return skipped
