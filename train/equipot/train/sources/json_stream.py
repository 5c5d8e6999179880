"""Walks through a JSON file of many entries without ever holding it whole. Knows nothing of structures.

The text is decoded piece by piece, and each entry by the standard library's C decoder: an entry costs its own
size in memory, whatever the file's.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from equipot.train.sources.xyz_chunks import open_stream

_PIECE = 2**20
_TAIL = 256
"""An error this close to the end of the text may only mean that more text is needed."""
MAX_ENTRY = 2**27
"""Characters of one entry; beyond this the file is not a list of entries."""


class JsonDamage(Exception):
    """The text is not JSON from here on, or ends too early."""


class JsonStream:
    """A cursor in the text of one file; a context manager.

    Attributes:
        fraction: share of the file read so far.
    """

    def __init__(self, path: Path) -> None:
        self._size = max(path.stat().st_size, 1)
        self._stream, self._raw = open_stream(path)
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False

    def __enter__(self) -> "JsonStream":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._raw.close()

    @property
    def fraction(self) -> float:
        """Share of the file read so far."""
        return self._raw.tell() / self._size

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def expect(self, characters: str) -> str:
        """Takes the next character, which has to be one of these."""
        found = self.peek()
        if not found:
            raise JsonDamage("the file ends here, in the middle")
        if found not in characters:
            raise JsonDamage(f"{found!r} where one of {characters!r} should be")
        self._at += 1
        return found

    def entries(self) -> Iterator[None]:
        """Steps through the list or object that begins here; the caller takes each entry in between.

        In an object, what is to be taken first is `key()`.
        """
        end = {"[": "]", "{": "}"}[self.expect("[{")]
        if self.peek() == end:
            self.expect(end)
            return
        while True:
            yield
            if self.expect("," + end) == end:
                return

    def key(self) -> str:
        """Takes a key and its colon."""
        if self.peek() != '"':
            raise JsonDamage(f"{self.peek()!r} where a key should be")
        key = self.value()
        self.expect(":")
        return str(key)

    def value(self) -> object:
        """Takes one whole value."""
        if not self.peek():
            raise JsonDamage("the file ends here, in the middle")
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # a string that is not closed is reported where it begins
                open_string = error.msg.startswith("Unterminated string")
                if not open_string and error.pos < len(self._text) - _TAIL:
                    raise JsonDamage(f"not JSON: {error.msg}") from None
                if not self._more():
                    raise JsonDamage(f"the file ends in the middle of an entry ({error.msg})") from None
            except (RecursionError, ValueError) as error:
                raise JsonDamage(f"not read: {error}"[:150]) from None
            else:
                # a number near the end of the text may go on in the next piece: 2, 2.5, 2.5e-10
                settled = not isinstance(value, int | float) or end < len(self._text) - _TAIL
                if settled or not self._more():
                    self._at = end
                    return value

    def _more(self) -> bool:
        """Reads on, dropping what is behind the cursor; False at the end of the file."""
        if self._ended:
            return False
        rest = self._text[self._at :]
        if len(rest) > MAX_ENTRY:
            raise JsonDamage(f"an entry of more than {MAX_ENTRY} characters")
        try:
            # twice as much each time, so that a long entry is not decoded over and over
            piece = self._stream.read(max(_PIECE, len(rest)))
            self._text = rest + self._decode.decode(piece, final=not piece)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise JsonDamage(f"{error or type(error).__name__}"[:150]) from None
        self._at = 0
        self._ended = not piece
        return bool(piece)
