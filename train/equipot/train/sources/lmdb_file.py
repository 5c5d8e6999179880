"""Reads an LMDB file's pages without the lmdb library. Knows nothing of what the records mean.

liblmdb maps the file and trusts it: a truncated one ends the process with a bus error, a forged one may do
worse. Downloads of this size do get truncated, so every page number and length is checked here, and a record
that lies behind the end of the file costs that record alone.

The layout is LMDB 0.9's (`mdb.c`: MDB_meta, MDB_page, MDB_node), data version 1, little-endian, 64-bit.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from equipot.train.errors import DataError

DATA = "data.mdb"
"""What LMDB calls its file where a database is a folder."""
_MAGIC = 0xBEEFC0DE
_VERSION = 1
_META = struct.Struct("<IIQQ")
_DB = struct.Struct("<IHHQQQQQ")
_TAIL = struct.Struct("<QQ")
_PAGE = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_PAGE_HEADER = _PAGE.size
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_BIG_DATA, _SUB_DATA, _DUP_DATA = 0x01, 0x02, 0x04
_NONE = 2**64 - 1
_MAX_DEPTH = 32


def data_file(path: Path) -> Path:
    """The file that holds the data: of a folder, `data.mdb` in it."""
    return path / DATA if path.is_dir() else path


def is_folder(path: Path) -> bool:
    """Whether this is a database in LMDB's layout of a folder."""
    return path.is_dir() and (path / DATA).is_file()


class LmdbDamage(Exception):
    """A record cannot be reached; the message says why. Never reaches the user as it is."""


class LmdbFile:
    """The main database of one file, read-only; records are looked up by key.

    Attributes:
        path: the file, or `data.mdb` in the folder that was given.
        entries: number of records, as the file says.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its newest meta page.

        Raises:
            DataError: missing, empty, not LMDB, or of a layout other than that of LMDB 0.9.
        """
        self.path = data_file(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read as LMDB ({error})") from None
        metas = [meta for meta in (self._meta(0), self._meta_after_first()) if meta is not None]
        if not metas:
            self._map.close()
            raise DataError(f"{self.path}: is not an LMDB file (no meta page of data version {_VERSION})")
        _, self._page_size, self._root, self.entries, self._last_page = max(metas)

    def close(self) -> None:
        """Lets go of the file."""
        self._map.close()

    @property
    def missing_bytes(self) -> int:
        """How much shorter the file is than its own header says; 0 for a whole file."""
        return max(0, (self._last_page + 1) * self._page_size - len(self._map))

    def _meta(self, at: int) -> tuple[int, int, int, int, int] | None:
        """(transaction, page size, root page, entries, last page) of the meta page at a byte offset."""
        if at + _PAGE_HEADER + _META.size + 2 * _DB.size + _TAIL.size > len(self._map):
            return None
        magic, version, _, _ = _META.unpack_from(self._map, at + _PAGE_HEADER)
        if magic != _MAGIC or version != _VERSION:
            return None
        databases = at + _PAGE_HEADER + _META.size
        page_size = _DB.unpack_from(self._map, databases)[0]
        *_, entries, root = _DB.unpack_from(self._map, databases + _DB.size)
        last_page, transaction = _TAIL.unpack_from(self._map, databases + 2 * _DB.size)
        if page_size < 256 or page_size > 65536 or page_size & (page_size - 1):
            return None
        return transaction, page_size, root, entries, last_page

    def _meta_after_first(self) -> tuple[int, int, int, int, int] | None:
        first = self._meta(0)
        return self._meta(first[1]) if first is not None else None

    def get(self, key: bytes) -> bytes | None:
        """The record of a key, None if there is none.

        Raises:
            LmdbDamage: a page on the way to it is missing or malformed.
        """
        if self._root == _NONE:
            return None
        page = self._root
        for _ in range(_MAX_DEPTH):
            at, flags, count = self._page(page)
            if flags & _LEAF:
                slot, found = self._search(at, count, key, first=0)
                return self._data(at, slot) if found else None
            slot, found = self._search(at, count, key, first=1)
            page = self._child(at, slot if found else slot - 1)
        raise LmdbDamage(f"the tree is deeper than {_MAX_DEPTH} pages")

    def keys(self) -> Iterator[bytes]:
        """All keys in the file's own order (as bytes). Raises LmdbDamage where the tree is broken."""
        if self._root != _NONE:
            yield from self._keys(self._root, 0)

    def _keys(self, page: int, depth: int) -> Iterator[bytes]:
        if depth > _MAX_DEPTH:
            raise LmdbDamage(f"the tree is deeper than {_MAX_DEPTH} pages")
        at, flags, count = self._page(page)
        for slot in range(count):
            if flags & _LEAF:
                yield self._key(at, slot)
            else:
                yield from self._keys(self._child(at, slot), depth + 1)

    def _page(self, number: int) -> tuple[int, int, int]:
        """(byte offset, flags, number of nodes) of a branch or leaf page."""
        at = number * self._page_size
        if number < 2 or at + self._page_size > len(self._map):
            raise LmdbDamage(f"page {number} lies behind the end of the file ({len(self._map)} bytes)")
        own, _, flags, lower, upper = _PAGE.unpack_from(self._map, at)
        kind = flags & (_BRANCH | _LEAF | _OVERFLOW)
        if own != number or kind not in (_BRANCH, _LEAF):
            raise LmdbDamage(f"page {number} is not a page of the tree (flags {flags:#x})")
        if lower < _PAGE_HEADER or lower > upper or upper > self._page_size or (lower == _PAGE_HEADER):
            raise LmdbDamage(f"page {number} is malformed (free space {lower} to {upper})")
        return at, flags, (lower - _PAGE_HEADER) // 2

    def _node(self, at: int, slot: int) -> tuple[int, int, int, int, int]:
        """(low, high, flags, key length, byte offset of the key) of a node."""
        (pointer,) = struct.unpack_from("<H", self._map, at + _PAGE_HEADER + 2 * slot)
        if pointer < _PAGE_HEADER or pointer + _NODE.size > self._page_size:
            raise LmdbDamage(f"page {at // self._page_size}: node {slot} lies outside of it")
        low, high, flags, length = _NODE.unpack_from(self._map, at + pointer)
        if pointer + _NODE.size + length > self._page_size:
            raise LmdbDamage(f"page {at // self._page_size}: the key of node {slot} lies outside of it")
        return low, high, flags, length, at + pointer + _NODE.size

    def _key(self, at: int, slot: int) -> bytes:
        *_, length, start = self._node(at, slot)
        return self._map[start : start + length]

    def _child(self, at: int, slot: int) -> int:
        low, high, flags, _, _ = self._node(at, slot)
        return low | high << 16 | flags << 32

    def _search(self, at: int, count: int, key: bytes, *, first: int) -> tuple[int, bool]:
        """(first slot whose key is not less, whether it is equal). A branch's slot 0 has no key."""
        low, high = first, count
        while low < high:
            middle = (low + high) // 2
            if self._key(at, middle) < key:
                low = middle + 1
            else:
                high = middle
        return low, low < count and self._key(at, low) == key

    def _data(self, at: int, slot: int) -> bytes:
        low, high, flags, length, start = self._node(at, slot)
        size = low | high << 16
        if flags & (_SUB_DATA | _DUP_DATA):
            raise LmdbDamage("the record is a database of its own")
        if not flags & _BIG_DATA:
            value = start + length
            if value + size > at + self._page_size:
                raise LmdbDamage(
                    f"page {at // self._page_size}: the record of node {slot} lies outside of it"
                )
            return self._map[value : value + size]
        (page,) = struct.unpack_from("<Q", self._map, min(start + length, len(self._map) - 8))
        value = page * self._page_size + _PAGE_HEADER
        if page < 2 or value + size > len(self._map):
            raise LmdbDamage(f"its {size} bytes from page {page} on lie behind the end of the file")
        own, _, overflow, _, _ = _PAGE.unpack_from(self._map, page * self._page_size)
        if own != page or not overflow & _OVERFLOW:
            raise LmdbDamage(f"page {page} does not hold a record (flags {overflow:#x})")
        return self._map[value : value + size]
