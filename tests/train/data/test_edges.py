"""Edges are counted as the model will see them, once per store and cutoff."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import ase
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from equipot.model.neighbors import brute_force_neighbor_list
from equipot.train import edges
from equipot.train.edges import structure_sizes
from equipot.train.errors import DataError
from equipot.train.store import Store
from equipot.train.structures import Structures

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
            senders = brute_force_neighbor_list(s.positions, s.cell, s.pbc, cutoff).senders
            expected.append([len(s.atomic_numbers), len(senders)])
        found = structure_sizes(store, cutoff)
        assert found.dtype == np.int32
        assert found.tolist() == expected


def test_the_cache_is_used_and_renewed(make_frames: MakeFrames, make_store: MakeStore) -> None:
    store = make_store(make_frames(9))
    first = np.array(structure_sizes(store, 3.0))
    (cached,) = (store.path / "cache").iterdir()
    np.save(cached, first + 1)
    np.testing.assert_array_equal(structure_sizes(store, 3.0), first + 1)
    cached.write_bytes(b"half a file")
    np.testing.assert_array_equal(structure_sizes(store, 3.0), first)
    structure_sizes(store, 3.5)
    assert len(list((store.path / "cache").iterdir())) == 2
    store.manifest.digest = "sha256:another"
    structure_sizes(store, 3.0)
    assert len(list((store.path / "cache").iterdir())) == 3


def test_where_the_store_cannot_be_written_to_the_users_cache_is_used_or_nothing(
    make_frames: MakeFrames, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(make_frames(4))
    expected = np.array(structure_sizes(store, 3.0))
    shutil.rmtree(store.path / "cache")
    (store.path / "cache").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    np.testing.assert_array_equal(structure_sizes(store, 3.0), expected)
    assert len(list((tmp_path / "home" / "equipot").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(store.path / "cache"))
    np.testing.assert_array_equal(structure_sizes(store, 3.0), expected)


def test_a_full_disk_only_costs_the_keeping(
    make_frames: MakeFrames, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = make_store(make_frames(4))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        found = structure_sizes(store, 3.0)
    np.testing.assert_array_equal(found, structure_sizes(store, 3.0))


def test_a_count_that_was_ended_goes_on_where_it_was(
    make_frames: MakeFrames, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(make_frames(40))
    read: list[int] = []
    whole_read = Store.read

    def reading(store: Store, indices: ArrayLike) -> Structures:
        wanted = np.asarray(indices).tolist()
        if ending and wanted[0] >= 24:
            raise KeyboardInterrupt
        read.extend(wanted)
        return whole_read(store, indices)

    monkeypatch.setattr(edges, "_BLOCK", 4)
    monkeypatch.setattr(edges, "available_cores", lambda: 1)
    monkeypatch.setattr(Store, "read", reading)
    ending = True
    with pytest.raises(KeyboardInterrupt):
        structure_sizes(store, 3.0)
    assert set(read) == set(range(24))
    ending = False
    read.clear()
    resumed = np.array(structure_sizes(store, 3.0))
    assert read == list(range(24, 40))
    shutil.rmtree(store.path / "cache")
    np.testing.assert_array_equal(structure_sizes(store, 3.0), resumed)


def test_a_damaged_structure_is_named(make_frames: MakeFrames, make_store: MakeStore) -> None:
    store = make_store(make_frames(9))
    (path,) = store.path.glob("shards/*/positions.npy")
    positions = np.load(path, mmap_mode="r+")
    positions[store.n_atoms[:5].sum()] = np.nan
    positions.flush()
    with pytest.raises(DataError, match=r"\[5\] \(.*, frame 5\): a position .* not a finite number"):
        structure_sizes(store, 3.0)
    assert not list((store.path / "cache").glob("*.npy"))


def test_two_processes_at_once(make_frames: MakeFrames, make_store: MakeStore) -> None:
    store = make_store(make_frames(200, periodic=True))
    program = (
        "import sys; from equipot.train.edges import structure_sizes; from equipot.train.store import Store;"
        "print(structure_sizes(Store.open(sys.argv[1]), 4.0).sum())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(store.path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    sums = {process.communicate(timeout=120)[0] for process in processes}
    assert sums == {f"{structure_sizes(store, 4.0).sum()}\n"}
    assert [path.suffix for path in (store.path / "cache").iterdir()] == [".npy"]


def test_several_at_once(make_frames: MakeFrames, make_store: MakeStore) -> None:
    store = make_store(make_frames(30))
    found: list[NDArray[np.int32]] = []
    threads = [
        threading.Thread(target=lambda: found.append(structure_sizes(Store.open(store.path), 3.0)))
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
