"""Structures in files that people drop on the page, read by ASE from memory. Knows no server.

Formats are those whose readers only read text: none that unpickles, runs or follows what a file names.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import iread
from ase.io.formats import ioformats

from equipot.serve.errors import InvalidRequest, OverLimit

MOST_BYTES = 8 * 2**20
MOST_FRAMES = 500

FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "xyz": "extxyz",
        "extxyz": "extxyz",
        "cif": "cif",
        "vasp": "vasp",
        "poscar": "vasp",
        "contcar": "vasp",
        "pdb": "proteindatabank",
        "gen": "gen",
        "xsf": "xsf",
        "gro": "gromacs",
        "mol": "mol",
        "sdf": "sdf",
        "cube": "cube",
    }
)
"""ASE's formats by how a file's name ends, or begins if it has no ending."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file's structures.

    Attributes:
        format: as ASE calls it.
        frames: at most `MOST_FRAMES`.
    """

    format: str
    frames: list[Atoms]


def read_structures(name: str, data: bytes, *, most_atoms: int) -> Upload:
    """All frames of a file; safe in any thread.

    Args:
        name: of the file, for its format; without one the format is guessed from the text.
        data: its bytes.
        most_atoms: of one frame.

    Raises:
        InvalidRequest: it is no file that is read here, or damaged; with the frame and the reason.
        OverLimit: it is too large.
    """
    shown = name[:100] or "the text"
    if len(data) > MOST_BYTES:
        raise OverLimit(f"{shown} has {len(data)} bytes, the page takes {MOST_BYTES}", field="file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{shown} is no text (byte {error.start} is none of UTF-8): give one of {_formats()}",
            field="file",
        ) from error
    if not text.strip() or "\0" in text:
        what = "holds bytes that no text has" if text.strip() else "is empty"
        raise InvalidRequest(f"{shown} {what}: give one of {_formats()}", field="file")
    kind = _format_of(name, text)
    frames: list[Atoms] = []
    stream: Any = io.BytesIO(text.encode()) if ioformats[kind].isbinary else io.StringIO(text)
    try:
        for atoms in iread(stream, index=":", format=kind):
            if len(frames) == MOST_FRAMES:
                raise OverLimit(
                    f"{shown} has more than {MOST_FRAMES} frames, the most that the page takes",
                    field="file",
                )
            _check(atoms, f"frame {len(frames)} of {shown}", most_atoms)
            frames.append(atoms)
    except (OverLimit, InvalidRequest):
        raise
    except Exception as error:  # whatever a reader of ASE's makes of a damaged file
        raise InvalidRequest(
            f"frame {len(frames)} of {shown} cannot be read as {kind}: {_reason(error)}", field="file"
        ) from error
    if not frames:
        raise InvalidRequest(f"{shown} has no structure that can be read as {kind}", field="file")
    return Upload(kind, frames)


def _check(atoms: Atoms, where: str, most_atoms: int) -> None:
    if not 1 <= len(atoms) <= most_atoms:
        raise OverLimit(f"{where} has {len(atoms)} atoms, allowed are 1 to {most_atoms}", field="file")
    unknown = np.flatnonzero((atoms.numbers < 1) | (atoms.numbers > 118))
    if len(unknown):
        raise InvalidRequest(f"atom {unknown[0]} in {where} is of no element: correct it", field="file")
    wild = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if len(wild):
        raise InvalidRequest(
            f"the position of atom {wild[0]} in {where} is not finite: correct it", field="file"
        )
    if not np.isfinite(atoms.cell[:]).all():
        raise InvalidRequest(f"the cell of {where} is not finite: correct it", field="file")


def _format_of(name: str, text: str) -> str:
    path = PurePath(name.replace("\\", "/")).name.lower()
    stem, _, ending = path.rpartition(".")
    for word in (ending, re.split(r"[._-]", path)[0]):
        if word in FORMATS and (stem or word in ("poscar", "contcar")):
            return FORMATS[word]
    guessed = _guess(text)
    if guessed is None:
        shown = f"{name[:100]} is of no format" if name else "the text is of no format"
        raise InvalidRequest(f"{shown} that the page knows: give one of {_formats()}", field="file")
    return guessed


def _guess(text: str) -> str | None:
    """The format of a text without a telling name."""
    lines = text.lstrip("\n\r").splitlines()
    if re.fullmatch(r"\s*\d+\s*", lines[0]):
        return "extxyz"
    if re.search(r"^\s*data_", text, re.MULTILINE) and "_cell_" in text:
        return "cif"
    if any(line.startswith(("ATOM  ", "HETATM")) for line in lines[:1000]):
        return "proteindatabank"
    numbers = r"\s*[-+.\deE]+(\s+[-+.\deE]+){2}\b.*"
    if len(lines) > 7 and all(re.fullmatch(numbers, line) for line in lines[2:5]):
        return "vasp"
    return None


def _formats() -> str:
    return ", ".join(f".{word}" for word in FORMATS if word not in ("poscar", "contcar")) + ", POSCAR"


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{str(error.args[0])[:60]!r} is no element or key that it knows"
    return f"{str(error)[:200] or type(error).__name__}"
