"""Edges per structure within a cutoff, counted once and kept beside the store. Knows nothing of batches."""

import contextlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from equipot.model.neighbors import neighbor_list
from equipot.train.store import Store


def edge_counts(store: Store, cutoff: float, *, progress: bool = True) -> NDArray[np.int32]:
    """(n_structures,) number of directed edges within `cutoff` Å.

    The counts are kept under the store's `cache/`, by cutoff and by the store's digest, and written aside and
    renamed: several ranks may ask at once. A store that cannot be written to is counted anew each time.
    """
    path = _cache_file(store, cutoff)
    counts = _cached(path, len(store))
    if counts is not None:
        return counts
    counts = np.empty(len(store), dtype=np.int32)
    steps = track(
        range(len(store)),
        description=f"counting edges within {cutoff:g} Å",
        console=Console(stderr=True),
        transient=True,
        disable=not progress or len(store) < 5000,
    )
    for i in steps:
        system = store.system(i)
        counts[i] = len(neighbor_list(system.positions, system.cell, system.pbc, cutoff).senders)
    _keep(path, counts)
    return counts


def _cache_file(store: Store, cutoff: float) -> Path:
    identity = store.manifest.digest.removeprefix("sha256:")[:16]
    return store.path / "cache" / f"edges-{float(cutoff)!r}-{identity}.npy"


def _cached(path: Path, n: int) -> NDArray[np.int32] | None:
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return counts if counts.shape == (n,) and counts.dtype == np.int32 else None


def _keep(path: Path, counts: NDArray[np.int32]) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with contextlib.suppress(
        OSError
    ):  # a read-only or full store still trains, it only counts again next time
        path.parent.mkdir(exist_ok=True)
        try:
            with aside.open("wb") as file:
                np.save(file, counts)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
