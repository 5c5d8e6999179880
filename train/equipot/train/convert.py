"""Copies a store into another storage, the same to the last bit. Memory does not grow with the data."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from equipot.train.arrays import OFFSETS, append_rows, per_atom, per_structure
from equipot.train.errors import DataError
from equipot.train.manifest import write_json
from equipot.train.storage.memory_map import SHARDS
from equipot.train.storage.opening import MANIFEST, missing
from equipot.train.store import Store

Progress = Callable[[int], None]
"""Told how many structures have been written."""


def to_bp(store: Store, out: Path, *, on_progress: Progress) -> None:
    """Writes an ADIOS2 BP5 file, laid out as `storage.bp_layout` says; named when it is complete.

    Raises:
        DataError: adios2 is not installed, `out` exists, nothing to write, or it cannot be written.
    """
    try:
        from equipot.train.storage.adios_bp import BpWriter
    except ModuleNotFoundError as error:
        raise missing(out, "is to be an ADIOS2 file", error) from None
    with _aside(store, out) as folder, BpWriter(folder / out.name, store.manifest) as writer:
        written = 0
        for _, counts, arrays in store.chunks():
            writer.write(counts, arrays)
            written += len(counts)
            on_progress(written)


def to_npy(store: Store, out: Path, *, on_progress: Progress) -> None:
    """Writes a folder of memory-mapped files, as an import does; named when it is complete.

    Raises:
        DataError: `out` exists, nothing to write, or it cannot be written.
    """
    columns = store.manifest.columns
    with _aside(store, out) as folder:
        written, structures, atoms, at = 0, 0, 0, -1
        for shard, counts, arrays in store.chunks():
            if shard != at:
                structures, atoms, at = 0, 0, shard
            target = folder / out.name / SHARDS / store.manifest.shards[shard].name
            target.mkdir(parents=True, exist_ok=True)
            ends = atoms + np.cumsum(counts)
            begun = structures + 1 if structures else 0
            append_rows(
                target / "atom_offsets.npy", OFFSETS, begun, ends if begun else np.concatenate([[0], ends])
            )
            for name, field in per_structure(columns).items():
                append_rows(target / f"{name}.npy", field, structures, arrays[name])
            for name, field in per_atom(columns).items():
                append_rows(target / f"{name}.npy", field, atoms, arrays[name])
            structures, atoms, written = structures + len(counts), int(ends[-1]), written + len(counts)
            on_progress(written)
        write_json(folder / out.name / MANIFEST, store.manifest.to_json())


@contextmanager
def _aside(store: Store, out: Path) -> Iterator[Path]:
    """A folder in which `out` is made; it takes its name when all went well, and is removed otherwise."""
    if not len(store):
        raise DataError(f"{store.path}: holds no structures to convert")
    if out.exists():
        raise DataError(f"{out}: exists; give the name of a new one as --out")
    folder = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise DataError(f"{out}: another conversion to it is running; wait for it") from None
    try:
        for left in folder.iterdir():  # of one that was killed
            shutil.rmtree(left)
        yield folder
        _sync(folder / out.name)
        (folder / out.name).rename(out)
        _sync(out.parent, deep=False)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sync(folder: Path, *, deep: bool = True) -> None:
    for path in [*folder.rglob("*"), folder] if deep else [folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
