"""Atoms and edges of every structure, counted once and kept beside the store. Knows nothing of batches."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equipot.train.arrays import Field, array_bytes, header
from equipot.train.edge_lists import EdgeError, edge_lists
from equipot.train.errors import DataError
from equipot.train.launch import available_cores
from equipot.train.store import Store

_ROWS = Field("<i4", (2,))
_BLOCK = 1024  # structures between two looks at the disk
_AT_ONCE = 64  # structures whose edges are held at once
_WORTH_A_BAR = 5000


def structure_sizes(store: Store, cutoff: float, *, progress: bool = True) -> NDArray[np.int32]:
    """(n_structures, 2) atoms, and directed edges within `cutoff` Å, of each structure; mapped, not read.

    They are kept under the store's `cache/`, or where that cannot be written under the user's cache folder,
    by cutoff and by the store's digest. A count that is killed goes on where it was; several processes may
    ask at once. Where nothing can be written, each process counts for itself and keeps the result in memory.

    Raises:
        DataError: a structure cannot be read, or has positions that are not finite; it is named.
    """
    paths = _paths(store, cutoff)
    for path in paths:
        known = _mapped(path, len(store))
        if known is not None:
            return known
    for path in paths:
        with contextlib.suppress(OSError):  # read-only or full: the next place may not be
            return _count_into(path, store, cutoff, progress=progress)
    sizes = np.zeros((len(store), 2), dtype=np.int32)
    blocks = list(range(0, len(store), _BLOCK))
    for start, counted in _counted(store, cutoff, blocks, progress=progress):
        sizes[start : start + len(counted)] = counted
    return sizes


def _paths(store: Store, cutoff: float) -> list[Path]:
    identity = store.manifest.digest.removeprefix("sha256:")[:16]
    name = f"sizes-{float(cutoff)!r}-{identity}.npy"
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [store.path / "cache" / name, home / "equipot" / name]


def _mapped(path: Path, n: int) -> NDArray[np.int32] | None:
    try:
        sizes = np.load(path, mmap_mode="r" if n else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return sizes.view(np.ndarray) if sizes.shape == (n, 2) and sizes.dtype == np.int32 else None


def _count_into(path: Path, store: Store, cutoff: float, *, progress: bool) -> NDArray[np.int32]:
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(store)
    with _working_file(path) as (file, aside):
        if os.fstat(file.fileno()).st_size != array_bytes(_ROWS, n):
            file.truncate(0)
            file.write(header(_ROWS, n))
            file.flush()
            os.ftruncate(file.fileno(), array_bytes(_ROWS, n))  # sparse: what is zero is not counted yet
        for start, counted in _counted(store, cutoff, _missing(file, n), progress=progress):
            # Written, not mapped: a full disk is an error here, and the death of the process there.
            os.pwrite(file.fileno(), counted.tobytes(), array_bytes(_ROWS, start))
        os.fsync(file.fileno())
        aside.replace(path)
    known = _mapped(path, n)
    if known is None:
        raise OSError(f"{path} was written and cannot be read")
    return known


@contextlib.contextmanager
def _working_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """The file of an unfinished count, which outlives a kill; one of our own while another process has it."""
    shared = path.with_name(f"{path.name}.part")
    own = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(shared.open("a+b"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = shared.exists() and os.path.samestat(os.fstat(file.fileno()), shared.stat())
        except OSError:
            mine = False  # taken, or a file system without locks
        if mine:
            writable = stack.enter_context(shared.open("r+b"))  # what is opened to append cannot be placed
            yield writable, shared
            return
        stack.callback(own.unlink, missing_ok=True)
        yield stack.enter_context(own.open("w+b")), own


def _missing(file: BinaryIO, n: int) -> list[int]:
    """Where the blocks begin that are not counted whole."""
    blocks = []
    for start in range(0, n, _BLOCK):
        rows = min(_BLOCK, n - start)
        data = os.pread(file.fileno(), rows * _ROWS.row_bytes, array_bytes(_ROWS, start))
        atoms = np.frombuffer(data, dtype=np.int32)[::2]
        if len(atoms) < rows or not atoms.all():
            blocks.append(start)
    return blocks


def _counted(
    store: Store, cutoff: float, blocks: list[int], *, progress: bool
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Each block's first structure and the sizes of its structures, in turn; threads count some ahead."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not progress or not console.is_terminal or len(store) < _WORTH_A_BAR,
    )
    threads = available_cores()
    with bar, ThreadPoolExecutor(threads, thread_name_prefix="edges") as pool:
        task = bar.add_task(f"counting edges within {cutoff:g} Å", total=len(store))
        bar.advance(task, len(store) - sum(min(_BLOCK, len(store) - start) for start in blocks))
        for at in range(0, len(blocks), 4 * threads):
            some = blocks[at : at + 4 * threads]
            for start, counted in zip(some, pool.map(lambda b: _count(store, cutoff, b), some), strict=True):
                yield start, counted
                bar.advance(task, len(counted))


def _count(store: Store, cutoff: float, start: int) -> NDArray[np.int32]:
    stop = min(start + _BLOCK, len(store))
    sizes = np.empty((stop - start, 2), dtype=np.int32)
    for at in range(start, stop, _AT_ONCE):
        indices = np.arange(at, min(at + _AT_ONCE, stop))
        structures = store.read(indices)
        try:
            found = edge_lists(structures, cutoff)
        except EdgeError as error:
            origin = store.origin(at + error.row)
            raise DataError(
                f"{store.path}[{at + error.row}] ({origin.file}, frame {origin.frame}): {error}"
            ) from error
        sizes[indices - start, 0] = structures.n_atoms
        sizes[indices - start, 1] = [len(edges.senders) for edges in found]
    return sizes
