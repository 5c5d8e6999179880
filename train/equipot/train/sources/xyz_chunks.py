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
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO, cast

HEADER_LIMIT = 4096
"""Bytes read in search of the first line: a binary file may hold no line end at all."""


LINE_LIMIT = 2**20
"""Bytes taken for one line: a few bytes of .xz can be made to hold a line of any length."""
_PIECE = 2**18
_DIGITS = 7
"""Of an atom count; a frame has to fit into memory."""


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
    """A stream of lines without their ends, with look-ahead and a count."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = cast(BufferedIOBase, stream)
        self._lines: list[bytes] = []
        self._at = 0
        self._rest = b""
        self._ended = False
        self.number = 0

    def _more(self) -> bool:
        """Reads on until there is a line; False at the end."""
        while self._at == len(self._lines) and not self._ended:
            # read1, as read loses what came before the damage of a compressed stream
            piece = self._stream.read1(_PIECE)
            self._ended = not piece
            lines = (self._rest + piece).split(b"\n")
            self._rest = lines.pop()
            if self._rest and (self._ended or len(self._rest) > LINE_LIMIT):
                lines.append(self._rest)
                self._rest = b""
            self._lines, self._at = lines, 0
        return self._at < len(self._lines)

    def peek(self) -> bytes | None:
        return self._lines[self._at] if self._more() else None

    def peek_header(self) -> bool:
        line = self.peek()
        return line is not None and is_header(line)

    def take(self) -> bytes:
        line = self._lines[self._at] if self._more() else b""
        self._at += 1
        self.number += 1
        return line

    def take_rows(self, count: int) -> list[bytes]:
        """The next `count` lines, or those before a header or the end."""
        rows: list[bytes] = []
        while len(rows) < count and self._more():
            found = self._lines[self._at : self._at + count - len(rows)]
            stop = len(found)
            if any(map(bytes.isdigit, map(bytes.strip, found))):
                stop = next(k for k, line in enumerate(found) if is_header(line))
            rows += found[:stop]
            self._at += stop
            self.number += stop
            if stop < len(found):
                break
        return rows


def chunks(stream: BinaryIO) -> Iterator[Chunk]:
    """Yields each frame of an xyz stream; lines that belong to no frame make the frame before them faulty."""
    lines = _Lines(stream)
    index = 0
    while (line := lines.peek()) is not None:
        if not line.strip():
            lines.take()
            continue
        first = lines.number + 1
        if not is_header(line):
            skipped = _skip_to_header(lines)
            yield Chunk(index, first, 0, "", f"line {first} is not an atom count; {skipped} line(s) skipped")
            index += 1
            continue
        header = lines.take()
        if len(header.strip()) > _DIGITS:
            skipped = _skip_to_header(lines)
            many = f"line {first} announces more than 10^{_DIGITS} atoms; {skipped} line(s) skipped"
            yield Chunk(index, first, 0, "", many)
            index += 1
            continue
        n_atoms = int(header)
        comment = lines.take()
        rows = lines.take_rows(n_atoms)
        fault = None
        if len(rows) < n_atoms:
            fault = f"line {first} announces {n_atoms} atoms, {len(rows)} follow"
        while (line := lines.peek()) is not None and line.lstrip().startswith(b"VEC"):
            rows.append(lines.take())  # ASE's own way of writing a cell
        if fault is None and line is not None and line.strip() and not is_header(line):
            extra = _skip_to_header(lines)
            fault = f"line {first} announces {n_atoms} atoms, {n_atoms + extra} follow"
        text = b"\n".join([header, comment, *rows, b""]).decode("utf-8", errors="replace")
        yield Chunk(index, first, n_atoms, text, fault)
        index += 1


def _skip_to_header(lines: _Lines) -> int:
    skipped = 0
    while lines.peek() is not None and not lines.peek_header():
        skipped += bool(lines.take().strip())
    return skipped
