"""Edges are counted as the model will see them, once per store and cutoff."""

import threading
from collections.abc import Callable

import ase
import numpy as np
import pytest
from numpy.typing import NDArray

from equipot.model.neighbors import brute_force_neighbor_list
from equipot.train.edges import edge_counts
from equipot.train.store import Store

MakeFrames = Callable[..., list[ase.Atoms]]
MakeStore = Callable[..., Store]


@pytest.mark.parametrize("periodic", [False, True])
def test_counts_are_those_of_every_pair(
    make_frames: MakeFrames, make_store: MakeStore, periodic: bool
) -> None:
    store = make_store(make_frames(9, periodic=periodic))
    for cutoff in (2.0, 5.5):
        expected = []
        for i in range(9):
            s = store.system(i)
            expected.append(len(brute_force_neighbor_list(s.positions, s.cell, s.pbc, cutoff).senders))
        found = edge_counts(store, cutoff)
        assert found.dtype == np.int32
        assert found.tolist() == expected


def test_the_cache_is_used_and_renewed(make_frames: MakeFrames, make_store: MakeStore) -> None:
    store = make_store(make_frames(9))
    first = edge_counts(store, 3.0)
    (cached,) = (store.path / "cache").iterdir()
    np.save(cached, first + 1)
    np.testing.assert_array_equal(edge_counts(store, 3.0), first + 1)
    cached.write_bytes(b"half a file")
    np.testing.assert_array_equal(edge_counts(store, 3.0), first)
    edge_counts(store, 3.5)
    assert len(list((store.path / "cache").iterdir())) == 2
    store.manifest.digest = "sha256:another"
    edge_counts(store, 3.0)
    assert len(list((store.path / "cache").iterdir())) == 3


def test_a_store_that_cannot_be_written_to(make_frames: MakeFrames, make_store: MakeStore) -> None:
    store = make_store(make_frames(4))
    (store.path / "cache").write_text("in the way")
    np.testing.assert_array_equal(edge_counts(store, 3.0), edge_counts(store, 3.0))


def test_several_at_once(make_frames: MakeFrames, make_store: MakeStore) -> None:
    store = make_store(make_frames(30))
    found: list[NDArray[np.int32]] = []
    threads = [
        threading.Thread(target=lambda: found.append(edge_counts(Store.open(store.path), 3.0)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for counts in found[1:]:
        np.testing.assert_array_equal(counts, found[0])
    assert [path.suffix for path in (store.path / "cache").iterdir()] == [".npy"]
