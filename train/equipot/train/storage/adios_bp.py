"""Stores in ADIOS2 BP5 files, as `bp_layout` describes them. The only module that imports adios2."""

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import adios2.bindings as adios
import numpy as np
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.manifest import Manifest
from equipot.train.storage.base import Arrays, take_by_spans
from equipot.train.storage.bp_layout import Variable, attributes, read_guard, variables, write_guard
from equipot.train.storage.fetched import Fetched
from equipot.train.structures import PER_ATOM_NAMES, PER_STRUCTURE_NAMES, Structures

_OFFSET = np.dtype("<i8")


class AdiosBp:
    """The arrays of a BP5 file; a `Storage` that reads no more than the rows asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._variables = variables(manifest.columns)
        self._first_structure = np.cumsum([0] + [entry.structures for entry in manifest.shards])
        self._first_atom = np.cumsum([0] + [entry.atoms for entry in manifest.shards])
        self._file: _File | None = None
        self._lock = threading.Lock()
        self._fetched = Fetched(self.gather, [entry.structures for entry in manifest.shards])

    def check(self) -> None:
        """Compares the files with what was noted of them."""
        read_guard(self._folder)

    def find(self, shard: int, row: int) -> tuple[Arrays, int]:
        """Reads the structure, or has it."""
        return self._fetched.find(shard, row)

    def gather(self, places: NDArray[np.int64]) -> Structures:
        """Read in one pass over the file; neighbours in it are read as one."""
        order = self._first_structure[places[:, 0]] + places[:, 1]
        runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
        spans = [(int(run[0]), int(run[-1]) + 1) for run in runs]
        with self._lock:
            file = self._opened
            n_all, atoms_all = int(self._first_structure[-1]), int(self._first_atom[-1])
            edges = file.offsets([(start, min(stop + 1, n_all)) for start, stop in spans])
            edges = [
                np.append(edge, atoms_all) if stop == n_all else edge
                for edge, (_, stop) in zip(edges, spans, strict=True)
            ]
            if any(edge[0] < 0 or edge[-1] > atoms_all or (np.diff(edge) < 0).any() for edge in edges):
                raise DataError(f"{self._folder}: its offsets are out of range, it is damaged; convert again")
            wanted = [(name, start, stop) for name in PER_STRUCTURE_NAMES for start, stop in spans]
            wanted += [(name, int(edge[0]), int(edge[-1])) for name in PER_ATOM_NAMES for edge in edges]
            read = file.read(wanted)
        values = {}
        for k, name in enumerate((*PER_STRUCTURE_NAMES, *PER_ATOM_NAMES)):
            values[name] = np.concatenate(read[k * len(spans) : (k + 1) * len(spans)])
        return Structures(n_atoms=np.concatenate([np.diff(edge) for edge in edges]), **values)

    def rows(self, shard: int, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read from the file."""
        with self._lock:
            if name == "atom_offsets":
                return self._offsets(shard, start, stop)
            of_atoms = self._variables[name].of_atoms
            first = int((self._first_atom if of_atoms else self._first_structure)[shard])
            return self._opened.read([(name, first + start, first + stop)])[0]

    def take(self, shard: int, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Read in spans."""
        return take_by_spans(self, shard, name, rows)

    def _offsets(self, shard: int, start: int, stop: int) -> NDArray[np.int64]:
        """Rows of a shard's `atom_offsets`; the last one stands in no array, it is the number of atoms."""
        first, end = int(self._first_structure[shard]), int(self._first_structure[shard + 1])
        inside = self._opened.offsets([(first + start, min(first + stop, end))])[0]
        atoms = self._first_atom[shard : shard + 2]
        closing = [int(atoms[1])] if first + stop > end else []
        offsets: NDArray[np.int64] = np.append(inside, np.array(closing, dtype=np.int64)) - atoms[0]
        return offsets

    @property
    def _opened(self) -> "_File":
        if self._file is None or self._file.process != os.getpid():
            self._file = _File(self._folder, self._variables)  # a file is not shared with a forked process
        return self._file


class _File:
    """An open BP5 file. Not safe to use from several threads."""

    def __init__(self, folder: Path, of_store: Mapping[str, Variable]) -> None:
        self.process = os.getpid()
        self._folder = folder
        self._of_store = of_store
        self._adios = adios.ADIOS()
        self._io = self._adios.DeclareIO("read")
        self._io.SetEngine("BP5")
        try:
            self._engine = self._io.Open(str(folder), adios.Mode.ReadRandomAccess)
        except Exception as error:  # the library raises whatever its C++ did
            raise _unreadable(folder, error) from None
        self._handles = {name: self._handle(variable.name) for name, variable in of_store.items()}
        self._offset = self._handle(f"{of_store['positions'].name}/variable_offset")

    def _handle(self, name: str) -> adios.Variable:
        handle = self._io.InquireVariable(name)
        if not handle:
            raise DataError(f"{self._folder}: holds no variable {name}; convert the store again")
        return handle

    def offsets(self, spans: Sequence[tuple[int, int]]) -> list[NDArray[np.int64]]:
        """The first atom of each structure of these spans."""
        parts = [np.empty(stop - start, dtype=np.int64) for start, stop in spans]
        for part, (start, _) in zip(parts, spans, strict=True):
            self._ask(self._offset, start, part)
        self._perform()
        return parts

    def read(self, wanted: Sequence[tuple[str, int, int]]) -> list[NDArray[Any]]:
        """Rows of arrays by the store's names, in the store's types."""
        parts = []
        for name, start, stop in wanted:
            variable = self._of_store[name]
            part = np.empty(((stop - start) * variable.rows, *variable.row), dtype=variable.dtype)
            self._ask(self._handles[name], start * variable.rows, part)
            parts.append(part)
        self._perform()
        return [
            _from_file(part, self._of_store[name], stop - start)
            for part, (name, start, stop) in zip(parts, wanted, strict=True)
        ]

    def _ask(self, handle: adios.Variable, start: int, part: NDArray[Any]) -> None:
        if part.size:
            handle.SetSelection([[start] + [0] * (part.ndim - 1), list(part.shape)])
            self._engine.Get(handle, part, adios.Mode.Deferred)

    def _perform(self) -> None:
        try:
            self._engine.PerformGets()
        except Exception as error:  # the library raises whatever its C++ did
            raise _unreadable(self._folder, error) from None


def _from_file(part: NDArray[Any], variable: Variable, n: int) -> NDArray[Any]:
    field = variable.field
    if field.dtype.startswith("|S"):
        return part.reshape(n, -1).view(field.dtype)[:, 0]
    return part.reshape(n, *field.row).astype(field.dtype, copy=False)


def _unreadable(folder: Path, error: Exception) -> DataError:
    return DataError(f"{folder}: cannot be read by ADIOS2 ({_plain(error)})")


def _plain(error: Exception) -> str:
    """What the library says, without its colours, on one line of bounded length."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())[-200:]


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises whatever its C++ did
        raise OSError(_plain(error)) from None


class BpWriter:
    """Writes a new BP5 file chunk by chunk, which stay on disk and not in memory.

    A context manager; what cannot be written is an OSError.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._variables = variables(manifest.columns)
        self._adios = adios.ADIOS()
        self._io = self._adios.DeclareIO("write")
        self._io.SetEngine("BP5")
        self._io.SetParameter("StatsLevel", "0")  # nobody asks for extremes of blocks, and they cost a pass
        self._handles: dict[str, adios.Variable] = {}
        self._structures = self._atoms = 0

    def __enter__(self) -> Self:
        with _os_errors():
            self._engine = self._io.Open(str(self._folder), adios.Mode.Write)
            self._engine.BeginStep()
        return self

    def write(self, counts: NDArray[np.int64], arrays: Arrays) -> None:
        """Adds structures, given their numbers of atoms and their arrays by the store's names."""
        atoms = int(counts.sum())
        for name, variable in self._variables.items():
            first, total = self._extent(variable)
            data = arrays[name]
            if data.dtype.kind == "S":
                data = np.ascontiguousarray(data).view(np.uint8)
            # copied, as the library takes no read-only array
            data = np.array(data, dtype=variable.dtype, order="C").reshape(
                -1, *variable.row
            )  # none read-only
            self._put(variable.name, first * variable.rows, total * variable.rows, data)
            if variable.key:
                each = counts if variable.of_atoms else np.full(len(counts), variable.rows)
                offset = first * variable.rows + np.cumsum(each) - each
                n, all_n = self._structures, self._manifest.structures
                self._put(f"{variable.name}/variable_count", n, all_n, each.astype(_OFFSET))
                self._put(f"{variable.name}/variable_offset", n, all_n, offset.astype(_OFFSET))
        with _os_errors():
            self._engine.PerformPuts()
            self._engine.PerformDataWrite()
        self._structures += len(counts)
        self._atoms += atoms

    def _extent(self, variable: Variable) -> tuple[int, int]:
        if variable.of_atoms:
            return self._atoms, self._manifest.atoms
        return self._structures, self._manifest.structures

    def _put(self, name: str, start: int, total: int, data: NDArray[Any]) -> None:
        if not data.size:
            return
        where, inner = [start] + [0] * (data.ndim - 1), list(data.shape[1:])
        if name not in self._handles:
            self._handles[name] = self._io.DefineVariable(
                name, data, [total, *inner], where, list(data.shape), False
            )
        self._handles[name].SetSelection([where, list(data.shape)])
        self._engine.Put(self._handles[name], data, adios.Mode.Sync)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, value in attributes(self._manifest).items():
            self._io.DefineAttribute(name, np.array(value) if isinstance(value, int) else value)
        with _os_errors() if kind is None else suppress(Exception):  # after an error the file is thrown away
            self._engine.EndStep()
            self._engine.Close()
        if kind is None:
            (self._folder / "profiling.json").unlink(missing_ok=True)  # tells of the machine, not of the data
            write_guard(self._folder, self._manifest)
