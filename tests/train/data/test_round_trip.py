"""What goes into a store comes out of it, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from equipot.train import store_writer
from equipot.train.errors import DataError
from equipot.train.frames import write_frames
from equipot.train.importer import ImportReport
from equipot.train.store import Store

MakeFrames = Callable[..., list[ase.Atoms]]
MakeStore = Callable[..., Store]


def all_of(store: Store) -> np.ndarray:
    return np.stack([np.zeros(len(store), np.int64), np.arange(len(store))], axis=1)


@pytest.mark.parametrize("periodic", [False, True])
def test_structures_and_labels_survive(
    make_frames: MakeFrames, make_store: MakeStore, periodic: bool
) -> None:
    frames = make_frames(20, periodic=periodic)
    frames[3].info |= {"charge": -1, "spin_multiplicity": 2}
    store = make_store(frames)
    assert len(store) == 20
    assert store.n_atoms.tolist() == [len(atoms) for atoms in frames]
    for i, atoms in enumerate(frames):
        system, labels = store.system(i), store.labels(i)
        np.testing.assert_array_equal(system.atomic_numbers, atoms.numbers)
        np.testing.assert_allclose(system.positions, atoms.positions, atol=6e-9)  # 8 decimals in extxyz
        np.testing.assert_allclose(system.cell, atoms.cell.array)
        assert system.pbc.tolist() == [periodic] * 3
        assert labels.energy == atoms.calc.results["energy"]
        np.testing.assert_allclose(labels.forces, atoms.calc.results["forces"], atol=6e-9)
        if periodic:
            assert labels.stress is not None
            xx, yy, zz, yz, xz, xy = atoms.calc.results["stress"]
            np.testing.assert_allclose(labels.stress, [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        else:
            assert labels.stress is None
        assert store.origin(i) == ("made.extxyz", i)
    assert (store.system(3).charge, store.system(3).spin_multiplicity) == (-1, 2)
    assert (store.system(4).charge, store.system(4).spin_multiplicity) == (0, 0)
    assert store.manifest.charges == {"-1": 1, "0": 19}


def test_written_frames_are_read_back(
    make_frames: MakeFrames, make_store: MakeStore, run_import: Callable[..., ImportReport], tmp_path: Path
) -> None:
    frames = make_frames(9, periodic=True)
    frames[0].info["charge"] = 1
    store = make_store(frames)
    count = write_frames([store], all_of(store)[::-1], tmp_path / "out.extxyz")
    assert count == 9
    again = Store.open(run_import(tmp_path / "out.extxyz", out=tmp_path / "again").store)
    for i in range(9):
        one, two = store.labels(8 - i), again.labels(i)
        assert one.energy == two.energy
        np.testing.assert_array_equal(one.forces, two.forces)
        assert one.stress is not None
        assert two.stress is not None
        np.testing.assert_allclose(one.stress, two.stress, rtol=1e-12)
        np.testing.assert_array_equal(store.system(8 - i).positions, again.system(i).positions)
    assert again.system(8).charge == 1


def test_a_frame_without_forces_is_kept_with_its_energy(
    make_frames: MakeFrames, make_store: MakeStore
) -> None:
    frames = make_frames(4)
    del frames[2].calc.results["forces"]
    store = make_store(frames)
    assert np.isnan(store.labels(2).forces).all()
    assert store.labels(2).forces.shape == (len(frames[2]), 3)
    assert np.isfinite(store.labels(2).energy)
    assert (store.manifest.with_energy, store.manifest.with_forces) == (4, 3)
    assert [e[:2] for t in store.manifest.notes.values() for e in t.examples] == [[0, 2]]


def test_a_box_without_periodicity_is_stored_as_it_is(
    alcohols: Path, run_import: Callable[..., ImportReport]
) -> None:
    store = Store.open(run_import(alcohols).store)
    assert len(store) == 1300
    assert not store.system(0).pbc.any()
    np.testing.assert_array_equal(store.system(0).cell, np.eye(3) * 50)
    first = ase.io.read(alcohols, 0, format="extxyz")
    assert store.labels(0).energy == first.get_potential_energy()
    assert store.manifest.warnings == []


def test_two_imports_give_the_same_bytes(
    make_frames: MakeFrames,
    write_frames_to: Callable[..., Path],
    run_import: Callable[..., ImportReport],
    tmp_path: Path,
    tree_bytes: Callable[[Path], dict[str, bytes]],
) -> None:
    file = write_frames_to(make_frames(150), "a.extxyz")
    run_import(file, out=tmp_path / "a")
    run_import(file, out=tmp_path / "b", commit_structures=40)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_adding_later_is_the_same_as_importing_at_once(
    make_frames: MakeFrames,
    write_frames_to: Callable[..., Path],
    run_import: Callable[..., ImportReport],
    tmp_path: Path,
    tree_bytes: Callable[[Path], dict[str, bytes]],
) -> None:
    a = write_frames_to(make_frames(30, seed=1), "a.extxyz")
    b = write_frames_to(make_frames(17, seed=2), "b.extxyz")
    run_import(a, out=tmp_path / "later")
    before = Store.open(tmp_path / "later").manifest.digest
    report = run_import(a, b, out=tmp_path / "later")
    assert report.skipped == ("a.extxyz",)
    run_import(a, b, out=tmp_path / "at-once")
    assert tree_bytes(tmp_path / "later") == tree_bytes(tmp_path / "at-once")
    assert Store.open(tmp_path / "later").manifest.digest != before


def test_a_store_that_is_added_to_stays_readable(
    make_frames: MakeFrames,
    write_frames_to: Callable[..., Path],
    run_import: Callable[..., ImportReport],
    tmp_path: Path,
) -> None:
    a = write_frames_to(make_frames(30, seed=1), "a.extxyz")
    b = write_frames_to(make_frames(17, seed=2), "b.extxyz")
    report = run_import(a)
    old = Store.open(report.store)
    first, last = old.labels(0).energy, old.system(29).positions
    run_import(b)
    assert len(old) == 30
    assert old.labels(0).energy == first
    np.testing.assert_array_equal(old.system(29).positions, last)
    assert len(Store.open(report.store)) == 47


def test_nothing_new_changes_nothing(
    make_frames: MakeFrames,
    write_frames_to: Callable[..., Path],
    run_import: Callable[..., ImportReport],
    tree_bytes: Callable[[Path], dict[str, bytes]],
) -> None:
    a = write_frames_to(make_frames(5), "a.extxyz")
    report = run_import(a)
    before = tree_bytes(report.store)
    again = run_import(a)
    assert again.added == ()
    assert tree_bytes(report.store) == before


def test_another_level_of_theory_is_refused(
    make_frames: MakeFrames, write_frames_to: Callable[..., Path], run_import: Callable[..., ImportReport]
) -> None:
    run_import(write_frames_to(make_frames(5, seed=1), "a.extxyz"))
    with pytest.raises(DataError, match=r"'PBE/def2-SVP', not 'B3LYP'"):
        run_import(write_frames_to(make_frames(5, seed=2), "b.extxyz"), level="B3LYP")


def test_lookups_across_shards(
    make_frames: MakeFrames, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = make_frames(40)
    whole = make_store(frames, "whole")
    monkeypatch.setattr(store_writer, "SHARD_STRUCTURES", 7)
    parts = make_store(frames, "parts")
    assert [shard.structures for shard in parts.manifest.shards] == [7, 7, 7, 7, 7, 5]
    assert parts.manifest.digest == whole.manifest.digest
    parts.verify()
    wanted = np.array([39, 0, 7, 6, 13, 14, 7, 30])
    for i in wanted:
        np.testing.assert_array_equal(parts.system(i).positions, whole.system(i).positions)
        np.testing.assert_array_equal(parts.labels(i).forces, whole.labels(i).forces)
    counts = parts.element_counts(wanted)
    for row, i in zip(counts, wanted, strict=True):
        np.testing.assert_array_equal(row, np.bincount(frames[i].numbers, minlength=119))
    forces = np.concatenate(list(parts.force_blocks(wanted)))
    expected = np.concatenate([whole.labels(i).forces for i in wanted])
    np.testing.assert_allclose(np.sort(forces.ravel()), np.sort(expected.ravel()))
    np.testing.assert_array_equal(parts.groups, whole.groups)
    np.testing.assert_array_equal(parts.energies, whole.energies)
    with pytest.raises(IndexError, match="structure 40"):
        parts.system(40)
    with pytest.raises(IndexError, match="structure -1"):
        parts.system(-1)


def test_damage_is_named(make_frames: MakeFrames, make_store: MakeStore) -> None:
    store = make_store(make_frames(6))
    forces = store.path / "shards" / "00000" / "forces.npy"
    good = forces.read_bytes()
    forces.write_bytes(good[:-8])
    with pytest.raises(DataError, match=r"forces\.npy: is cut short"):
        Store.open(store.path)
    forces.unlink()
    with pytest.raises(DataError, match=r"forces\.npy: is missing"):
        Store.open(store.path)
    forces.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    changed = Store.open(store.path)
    with pytest.raises(DataError, match="has changed since the import"):
        changed.verify()
    forces.write_bytes(good)
    Store.open(store.path).verify()


def test_what_is_no_store_is_refused(make_frames: MakeFrames, make_store: MakeStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such store"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not an equipot store"):
        Store.open(tmp_path / "empty")
    store = make_store(make_frames(3))
    manifest = store.path / "manifest.json"
    body = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**body, "version": 2}))
    with pytest.raises(DataError, match="store version 2, this equipot reads up to 1; upgrade"):
        Store.open(store.path)
    manifest.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Store.open(store.path)


def test_a_folder_with_other_things_is_left_alone(
    make_frames: MakeFrames,
    write_frames_to: Callable[..., Path],
    run_import: Callable[..., ImportReport],
    tmp_path: Path,
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    file = write_frames_to(make_frames(3), "a.extxyz")
    with pytest.raises(DataError, match="holds other files and is no store"):
        run_import(file, out=tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_forces_of_fixed_atoms_are_kept(tmp_path: Path, run_import: Callable[..., ImportReport]) -> None:
    from ase.constraints import FixAtoms

    atoms = ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.9]])
    atoms.calc = SinglePointCalculator(atoms, energy=-30.0, forces=np.array([[0, 0, 1.5], [0, 0, -1.5]]))
    atoms.set_constraint(FixAtoms([0]))
    ase.io.write(tmp_path / "fixed.traj", [atoms])
    store = Store.open(run_import(tmp_path / "fixed.traj").store)
    np.testing.assert_array_equal(store.labels(0).forces, [[0, 0, 1.5], [0, 0, -1.5]])
