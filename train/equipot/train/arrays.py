"""The flat arrays of a shard: names, types, and how they grow on disk. Knows nothing of labels or manifests.

Every array is a .npy file with a header of fixed length, so rows can be appended and the header rewritten in
place; `numpy.load(…, mmap_mode="r")` reads it at any time.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.sources.base import EXTRAS


@dataclass(frozen=True, slots=True)
class Field:
    """One flat array: little-endian type and the shape of a row."""

    dtype: str
    row: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.row, dtype=int))


PER_STRUCTURE: Mapping[str, Field] = {
    "energy": Field("<f8"),
    "cell": Field("<f8", (3, 3)),
    "pbc": Field("|b1", (3,)),
    "stress": Field("<f8", (3, 3)),
    "charge": Field("<i4"),
    "spin_multiplicity": Field("<i4"),
    "group": Field("<i8"),
    "source": Field("<i4"),
    "frame": Field("<i8"),
}
PER_ATOM: Mapping[str, Field] = {
    "atomic_numbers": Field("|u1"),
    "positions": Field("<f8", (3,)),
    "forces": Field("<f8", (3,)),
}
OPTIONAL_PER_STRUCTURE: Mapping[str, Field] = {"name": Field("|S64"), "fingerprint": Field("<u8")}
"""Arrays that a store may have; its manifest lists those it has. name: the source's own identifier.
fingerprint: hash of structure and labels, equal for frames that are the same to the last bit."""
OPTIONAL_PER_ATOM: Mapping[str, Field] = {name: Field(dtype) for name, dtype in EXTRAS.items()}
OFFSETS = Field("<i8")
"""`atom_offsets`: one row more than there are structures; row 0 is 0."""

_HEADER_BYTES = 128


def per_structure(columns: Sequence[str]) -> dict[str, Field]:
    """The per-structure arrays of a store with these optional ones."""
    return dict(PER_STRUCTURE) | {k: v for k, v in OPTIONAL_PER_STRUCTURE.items() if k in columns}


def per_atom(columns: Sequence[str]) -> dict[str, Field]:
    """The per-atom arrays of a store with these optional ones."""
    return dict(PER_ATOM) | {k: v for k, v in OPTIONAL_PER_ATOM.items() if k in columns}


def header(field: Field, rows: int) -> bytes:
    """A version 1.0 .npy header of always the same length."""
    shape = (rows, *field.row)
    text = f"{{'descr': '{field.dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    padded = text.ljust(_HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("ascii")


def append_rows(path: Path, field: Field, rows_before: int, rows: NDArray[Any]) -> None:
    """Makes the array hold its first `rows_before` rows and then `rows`; whatever lay behind is cut off.

    It survives the end of the process; a power cut only after `sync`.

    Raises:
        DataError: the file holds fewer rows than it should.
    """
    data = np.ascontiguousarray(rows, dtype=field.dtype)
    if data.shape[1:] != field.row:
        raise AssertionError(f"{path.name}: rows of shape {data.shape[1:]}, expected {field.row}")
    if rows_before and (not path.exists() or path.stat().st_size < array_bytes(field, rows_before)):
        raise DataError(f"{path}: is missing or cut short, the store is damaged; import the data again")
    with path.open("r+b" if rows_before else "w+b") as file:
        file.truncate(array_bytes(field, rows_before))
        file.seek(0, os.SEEK_END)
        file.write(data.tobytes())
        file.seek(0)
        file.write(header(field, rows_before + len(data)))


def sync(paths: Iterable[Path]) -> None:
    """Waits until files that were appended to are on disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def array_bytes(field: Field, rows: int) -> int:
    """Size of the file that holds so many rows."""
    return _HEADER_BYTES + rows * field.row_bytes


def map_rows(path: Path, rows: int) -> NDArray[Any]:
    """The first `rows` rows, mapped read-only. OSError or ValueError if the file is missing or short."""
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    array: NDArray[Any] = mapped.view(np.ndarray)  # numpy's memmap type makes every slice cost ten times more
    if len(array) < rows:
        raise ValueError(f"holds {len(array)} rows, the manifest says {rows}")
    return array[:rows]
