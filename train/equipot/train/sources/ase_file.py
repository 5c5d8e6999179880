"""Reads any labelled file ASE reads. (Ext)xyz is cut into frames first: one bad frame costs one frame."""

import io
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import ase
import ase.io
import ase.io.formats
import numpy as np
from ase.io.trajectory import TrajectoryReader

from equipot.model.batch import System
from equipot.train.errors import DataError
from equipot.train.sources import xyz_chunks
from equipot.train.sources.base import Frame, FrameError, ReadOptions, Reason, Rejected, require_file
from equipot.train.sources.keyed_frame import keyed_frame
from equipot.train.sources.plain_extxyz import plain_frame

XYZ_FORMATS = ("extxyz", "xyz")
_LOOKED_AT = 100  # frames that are searched for a key the user named before it is called absent


def open_ase_file(path: Path, options: ReadOptions) -> "AseFile":
    """Opens a file and looks at its first frames.

    Raises:
        DataError: missing, empty, of a kind ASE does not read, not what its name says, or without the
            keys that the options name.
    """
    require_file(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    reader = AseFile(path, options.format or _detect(path), options)
    reader.check_start()
    return reader


def _detect(path: Path) -> str:
    try:
        format = str(ase.io.formats.filetype(str(path)))
    except ase.io.formats.UnknownFileTypeError:
        format = ""
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); is it really what its name says?") from None
    if format not in ase.io.formats.ioformats:  # ASE takes an unknown extension for a format
        raise DataError(
            f"{path}: neither its name nor its first bytes say what it is; name ASE's format with --format "
            "(extxyz, traj, vasp-xml, …)"
        )
    return format


class AseFile:
    """One file as a `Reader`."""

    def __init__(self, path: Path, format: str, options: ReadOptions) -> None:
        self._path = path
        self._format = format
        self._options = options
        self._fraction: float | None = None
        self._count: int | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def format(self) -> str:
        """Name of ASE's format."""
        return self._format

    @property
    def count(self) -> int | None:
        """Number of frames of a .traj; any other format is read from the beginning."""
        return self._count

    def fraction(self) -> float | None:
        """Share of the file read so far; known for (ext)xyz."""
        return self._fraction

    def check_start(self) -> None:
        """Raises DataError if the file is not what it is taken for, or lacks a key that the user named."""
        if self._format not in ase.io.formats.ioformats:
            raise DataError(f"{self._path}: ASE has no format {self._format!r}; name another with --format")
        if self._format in XYZ_FORMATS:
            try:
                line = xyz_chunks.first_line(self._path)
            except (OSError, EOFError) as error:
                raise self._not_what_it_says(str(error)) from None
            if not xyz_chunks.is_header(line):
                raise self._not_what_it_says(f"its first line is {line[:40]!r}, not an atom count")
        first = list(islice(self._atoms(0), 1 if self._named_keys() == {} else _LOOKED_AT))
        if not first:
            raise DataError(f"{self._path}: holds no frame")
        if self._format == "traj" and not isinstance(first[0], Rejected):
            with TrajectoryReader(self._path) as reader:
                self._count = len(reader)
        keys = {key for atoms in first if isinstance(atoms, ase.Atoms) for key in _all_values(atoms)}
        for option, key in self._named_keys().items():
            if keys and key not in keys:
                there = ", ".join(sorted(keys - {"numbers", "positions"})) or "none"
                raise DataError(
                    f"{self._path}: none of its first {len(first)} frame(s) has {key!r} ({option}); "
                    f"keys there: {there}"
                )

    def _named_keys(self) -> dict[str, str]:
        named = {
            "--energy-key": self._options.energy_key,
            "--forces-key": self._options.forces_key,
            "--stress-key": self._options.stress_key,
        }
        return {option: key for option, key in named.items() if key is not None}

    def _not_what_it_says(self, why: str) -> DataError:
        with self._path.open("rb") as file:
            start = file.read(ase.io.formats.PEEK_BYTES)
        try:
            hint = f"; it looks like {ase.io.formats.match_magic(start).name}"
        except ase.io.formats.UnknownFileTypeError:
            hint = "; it starts like HDF5" if start.startswith(b"\x89HDF") else ""
        return DataError(
            f"{self._path}: is not {self._format} ({why}{hint}); name its real format with --format, "
            "or give another file"
        )

    def frames(self, start: int = 0) -> Iterator[Frame | Rejected]:
        """Yields frame `start` and those after it; a bad frame comes as `Rejected`."""
        for index, atoms in enumerate(self._atoms(start, plain=True), start):
            if isinstance(atoms, Rejected | Frame):
                yield atoms
                continue
            try:
                yield self._frame(index, atoms)
            except FrameError as error:
                yield Rejected(index, error.reason, error.detail)

    def _atoms(self, start: int, *, plain: bool = False) -> Iterator[ase.Atoms | Rejected | Frame]:
        """What is in the file; with `plain`, as frames at once where that needs no ASE."""
        if self._format in XYZ_FORMATS:
            yield from self._xyz_atoms(start, plain=plain)
            return
        if start and ase.io.formats.ioformats[self._format].single:
            return
        read = start
        try:
            for atoms in ase.io.iread(
                str(self._path),
                index=slice(start, None),
                format=self._format,
                do_not_split_by_at_sign=True,  # an "@" in a file's name is part of the name
            ):
                read += 1
                yield atoms
        except Exception as error:  # each of ASE's eighty readers raises what it likes
            what = f"{type(error).__name__}: {error}"[:200]
            if read == 0:
                raise self._not_what_it_says(what) from error
            yield Rejected(read, Reason.UNREADABLE, f"{what}; the rest of the file is lost")

    def _xyz_atoms(self, start: int, *, plain: bool) -> Iterator[ase.Atoms | Rejected | Frame]:
        size = self._path.stat().st_size
        stream, raw = xyz_chunks.open_stream(self._path)
        index = -1
        with raw, stream:
            try:
                for chunk in xyz_chunks.chunks(stream):
                    index = chunk.index
                    self._fraction = raw.tell() / size
                    if index >= start:
                        frame = plain_frame(chunk, self._options) if plain else None
                        yield self._parse(chunk) if frame is None else frame
            except (OSError, EOFError) as error:  # a truncated or damaged .gz, .xz, .bz2
                yield Rejected(index + 1, Reason.UNREADABLE, f"{error}; the rest of the file is lost")

    def _parse(self, chunk: xyz_chunks.Chunk) -> ase.Atoms | Rejected:
        if chunk.fault is not None:
            return Rejected(chunk.index, Reason.UNREADABLE, chunk.fault)
        if chunk.n_atoms == 0:
            return Rejected(chunk.index, Reason.NO_ATOMS, f"line {chunk.first_line} announces 0 atoms")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # ASE warns of each odd key; what matters is reported as a note
                return next(ase.io.iread(io.StringIO(chunk.text), index=":", format="extxyz"))
        except (
            Exception
        ) as error:  # ASE's parser raises KeyError, IndexError, TypeError, … for malformed text
            detail = f"line {chunk.first_line}: {type(error).__name__}: {error}"[:200]
            return Rejected(chunk.index, Reason.UNREADABLE, detail)

    def _frame(self, index: int, atoms: ase.Atoms) -> Frame:
        system = System(
            atomic_numbers=np.asarray(atoms.numbers, dtype=np.int64),
            positions=np.asarray(atoms.positions, dtype=np.float64),
            cell=np.asarray(atoms.cell.array, dtype=np.float64),
            pbc=np.asarray(atoms.pbc, dtype=np.bool_),
        )
        values = _all_values(atoms)
        group = _group(values, self._options.group_keys)
        return keyed_frame(index, system, values, atoms.info, group, self._options)


def _all_values(atoms: ase.Atoms) -> dict[str, Any]:
    """Every key of a frame: per-atom arrays, info, the calculator's results as stored (no constraints)."""
    results: Mapping[str, Any] = {} if atoms.calc is None else atoms.calc.results
    pairs: Mapping[str, Any] = atoms.info.get(
        "key_value_pairs", {}
    )  # how ASE's database hands out its columns
    return {**atoms.arrays, **pairs, **atoms.info, **results}


def _group(info: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, str] | None:
    for key in keys:
        value = info.get(key)
        if isinstance(value, (str, int, np.integer)) and not isinstance(value, bool):
            return key, str(value)
    return None
