"""Parses one frame of extended xyz quickly: columns by `Properties`, values of the comment line as text.

ASE's parser takes milliseconds a frame, which is days for a release of 1e8 frames. This one reads what such
releases are written with (columns of kinds S, R, I and L; key=value pairs, quoted or not) and refuses the
rest.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.model.elements import MAX_ATOMIC_NUMBER, symbol
from equipot.train.sources.base import FrameError, Reason
from equipot.train.sources.xyz_chunks import Chunk

_PAIR = re.compile(r"""([^\s=]+)=("([^"]*)"|\{([^}]*)\}|'([^']*)'|\S+)""")
_NUMBERS = {symbol(z): z for z in range(1, MAX_ATOMIC_NUMBER + 1)}
_TRUE, _FALSE = ("T", "True", "true", "1"), ("F", "False", "false", "0")


@dataclass(frozen=True, slots=True, eq=False)
class ExtxyzFrame:
    """One frame as it stands in the file.

    Attributes:
        atomic_numbers: (n_atoms,).
        positions: (n_atoms, 3).
        cell: (3, 3), zeros without `Lattice`.
        pbc: (3,), as stated, else whether there is a `Lattice`.
        columns: further columns, (n_atoms,) or (n_atoms, k).
        values: of the comment line, as text.
    """

    atomic_numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    columns: dict[str, NDArray[Any]]
    values: dict[str, str]

    def column(self, name: str) -> NDArray[Any] | None:
        """A column, None if absent."""
        return self.columns.get(name)

    def number(self, name: str) -> float | None:
        """A value of the comment line as a number, None if absent."""
        if name not in self.values:
            return None
        try:
            return float(self.values[name])
        except ValueError:
            raise FrameError(
                Reason.WRONG_SHAPE, f"{name} is {self.values[name]!r:.40}, expected one number"
            ) from None


def parse_extxyz(chunk: Chunk) -> ExtxyzFrame:
    """Reads the text of a frame. FrameError says what cannot be read."""
    if chunk.fault is not None:
        raise FrameError(Reason.UNREADABLE, chunk.fault)
    if chunk.n_atoms == 0:
        raise FrameError(Reason.NO_ATOMS, f"line {chunk.first_line} announces 0 atoms")
    _, comment, body = chunk.text.split("\n", 2)
    values = {
        pair[1]: next(g for g in pair.group(5, 4, 3, 2) if g is not None) for pair in _PAIR.finditer(comment)
    }
    try:
        columns = _columns(values.get("Properties", "species:S:1:pos:R:3"), body.split(), chunk.n_atoms)
        cell = np.zeros((3, 3))
        if "Lattice" in values:
            cell = np.array(values["Lattice"].split(), dtype=np.float64).reshape(3, 3)
        pbc = np.full(3, "Lattice" in values)
        if "pbc" in values:
            pbc = np.array([_logical(word) for word in values["pbc"].split()])
        if pbc.shape != (3,):
            raise ValueError(f"pbc={values['pbc']!r}")
        species = columns.pop("species")
        numbers = np.array([_NUMBERS[word] for word in species.tolist()], dtype=np.int64)
        return ExtxyzFrame(numbers, columns.pop("pos"), cell, pbc, columns, values)
    except KeyError as error:
        raise FrameError(
            Reason.INVALID, f"line {chunk.first_line}: no such element or column: {error}"
        ) from None
    except ValueError as error:
        raise FrameError(Reason.UNREADABLE, f"line {chunk.first_line}: {error}"[:200]) from None


def _columns(properties: str, words: list[str], n_atoms: int) -> dict[str, NDArray[Any]]:
    parts = properties.split(":")
    if len(parts) % 3 or not all(width.isdigit() for width in parts[2::3]):
        raise ValueError(f"Properties={properties!r:.80}")
    widths = [int(width) for width in parts[2::3]]
    total = sum(widths)
    if len(words) != n_atoms * total:
        raise ValueError(f"{len(words)} words for {n_atoms} atoms of {total} columns each")
    found: dict[str, NDArray[Any]] = {}
    at = 0
    for name, kind, width in zip(parts[::3], parts[1::3], widths, strict=True):
        if width == 1:
            found[name] = _column(kind, words[at::total])
        else:
            rows = [_column(kind, words[k::total]) for k in range(at, at + width)]
            found[name] = np.ascontiguousarray(np.array(rows).T)
        at += width
    return found


def _column(kind: str, words: list[str]) -> NDArray[Any]:
    if kind == "R":
        return np.fromiter(map(float, words), dtype=np.float64, count=len(words))
    if kind == "I":
        return np.fromiter(map(int, words), dtype=np.int64, count=len(words))
    if kind == "L":
        return np.fromiter(map(_logical, words), dtype=np.bool_, count=len(words))
    if kind == "S":
        return np.array(words, dtype=object)
    raise ValueError(f"column of kind {kind!r}")


def _logical(word: str) -> bool:
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"{word!r:.20} is neither T nor F")
