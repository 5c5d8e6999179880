"""Frames of one group never end up in different splits, and the same seed gives the same splits."""

from collections.abc import Callable, Sequence
from pathlib import Path

import ase
import numpy as np
import pytest
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.importer import ImportReport
from equipot.train.splits import Caps, Dealer, blocks_of, place
from equipot.train.store import Store

MakeFrames = Callable[..., list[ase.Atoms]]
MakeStore = Callable[..., Store]
EIGHT = (0.8, 0.1, 0.1)


def groups_in(stores: list[Store], part: NDArray[np.int64]) -> set[tuple[int, int]]:
    return {(int(k), int(stores[k].groups[i])) for k, i in part}


def parts(
    stores: list[Store], *, fractions: Sequence[float], seed: int, caps: Caps | None = None
) -> list[NDArray[np.int64]]:
    """(k, 2) store and structure in training, validation and test."""
    caps = caps or Caps()
    dealer = Dealer(fractions, seed)
    dealt = [dealer.deal(store, caps) for store in stores]
    dealer.check()
    found: list[list[tuple[int, int]]] = [[], [], []]
    for k, (store, groups) in enumerate(zip(stores, dealt, strict=True)):
        lists = [np.full(length, -1) for length in groups.lengths]
        seen = np.zeros(len(groups.numbers), dtype=np.int64)
        for block in blocks_of(store):
            rows, owner, places = place(block, groups, seen, caps.max_atoms)
            for split in range(3):
                lists[split][places[owner == split]] = block.first + rows[owner == split]
        for split in range(3):
            assert (lists[split] >= 0).all()
            found[split] += [(k, i) for i in lists[split].tolist()]
    return [np.array(each, dtype=np.int64).reshape(-1, 2) for each in found]


@pytest.fixture
def two_stores(make_frames: MakeFrames, make_store: MakeStore) -> list[Store]:
    return [
        make_store(make_frames(200, seed=1, sizes=(3,)), "one", group_by="block:7"),
        make_store(make_frames(90, seed=2), "two", group_by="frame"),
    ]


@pytest.mark.parametrize("seed", [0, 1, 2, 17])
def test_no_group_is_in_two_splits_and_no_structure_is_lost(two_stores: list[Store], seed: int) -> None:
    dealt = parts(two_stores, fractions=EIGHT, seed=seed)
    a, b, c = (groups_in(two_stores, part) for part in dealt)
    assert a & b == a & c == b & c == set()
    everything = np.concatenate(dealt)
    assert sorted(map(tuple, everything.tolist())) == [
        (k, i) for k, s in enumerate(two_stores) for i in range(len(s))
    ]
    assert [len(part) for part in dealt] == pytest.approx([232, 29, 29], abs=4)


def test_the_seed_decides_and_nothing_else(two_stores: list[Store]) -> None:
    one, same, other = (parts(two_stores, fractions=EIGHT, seed=seed) for seed in (5, 5, 6))
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(one, other, strict=True))


def test_groups_of_very_different_size(make_frames: MakeFrames, make_store: MakeStore) -> None:
    frames = make_frames(100)
    for k, atoms in enumerate(frames):
        atoms.info["trajectory"] = "long" if k < 60 else f"short{k // 4}"
    store = make_store(frames)
    assert store.manifest.groups == 11
    for seed in range(20):
        sizes = [len(part) for part in parts([store], fractions=EIGHT, seed=seed)]
        assert sizes[0] >= 60
        assert min(sizes) >= 4


def test_every_split_gets_a_group_when_there_are_just_enough(
    make_frames: MakeFrames, make_store: MakeStore
) -> None:
    frames = make_frames(30, sizes=(3,))
    for atoms in frames:
        atoms.numbers[:] = 8
    store = make_store(frames, group_by="block:10")
    assert [len(part) for part in parts([store], fractions=EIGHT, seed=0)] == [10, 10, 10]
    assert [len(part) for part in parts([store], fractions=(1, 0, 0), seed=0)] == [30, 0, 0]
    assert [len(part) for part in parts([store], fractions=(0.5, 0, 0.5), seed=0)] in (
        [10, 0, 20],
        [20, 0, 10],
    )
    assert len(parts([store], fractions=(0, 0, 1), seed=0)[2]) == 30


def test_too_few_groups_name_the_remedy(make_frames: MakeFrames, make_store: MakeStore) -> None:
    store = make_store(make_frames(30), group_by="file")
    with pytest.raises(
        DataError, match=r"1 group\(s\) of structures cannot fill 3 splits; import with a finer --group-by"
    ):
        parts([store], fractions=EIGHT, seed=0)


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.1), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)]
)
def test_impossible_fractions(two_stores: list[Store], fractions: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="that sum to 1, as"):
        parts(two_stores, fractions=fractions, seed=0)


def test_blocks_are_of_one_file_and_one_composition(make_frames: MakeFrames, make_store: MakeStore) -> None:
    water = [ase.Atoms("OH2", [[0, 0, 0], [0, 0.8, 0.6], [0, -0.8, 0.6]]) for _ in range(15)]
    hydrogen = [ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.8]]) for _ in range(15)]
    for atoms, labelled in zip(water + hydrogen, make_frames(30), strict=True):
        atoms.calc = labelled.calc
        atoms.calc.results = {"energy": labelled.calc.results["energy"]}
    store = make_store(water + hydrogen, group_by="block:10")
    _, sizes = np.unique(store.groups, return_counts=True)
    assert sorted(sizes) == [5, 5, 10, 10]
    assert len(set(store.groups[:10].tolist())) == 1
    assert store.groups[10] == store.groups[14] != store.groups[15]


def test_auto_goes_by_a_key_that_names_a_trajectory_else_by_blocks(
    make_frames: MakeFrames, make_store: MakeStore
) -> None:
    frames = make_frames(40, sizes=(3,))
    for k, atoms in enumerate(frames[:20]):
        atoms.info |= {"mol_id": k % 3, "config_type": f"frame{k}"}
        atoms.numbers[:] = 1
    for atoms in frames[20:]:
        atoms.numbers[:] = 8
    store = make_store(frames)
    assert store.manifest.grouped_by == {"block:10": 20, "info:mol_id": 20}
    assert len(set(store.groups[:20].tolist())) == 3
    assert store.groups[0] == store.groups[3] != store.groups[1]
    assert [len(set(store.groups[k : k + 10].tolist())) for k in (20, 30)] == [1, 1]


def test_a_trajectory_in_two_files_is_one_group_and_blocks_of_two_files_are_not(
    make_frames: MakeFrames,
    write_frames_to: Callable[..., Path],
    run_import: Callable[..., ImportReport],
    tmp_path: Path,
) -> None:
    files = []
    for name in "ab":
        frames = make_frames(5, seed=ord(name), sizes=(3,))
        for atoms in frames:
            atoms.numbers[:] = 6
            atoms.info["run"] = "one"
        files.append(write_frames_to(frames, f"{name}.extxyz"))
    expected = {"info:run": 1, "formula": 1, "file": 2, "block:100": 2, "frame": 10, "auto": 2}
    for rule, groups in expected.items():
        report = run_import(*files, group_by=rule, out=tmp_path / rule.replace(":", "-"))
        assert report.manifest.groups == groups, rule


def test_a_frame_without_the_named_key_is_left_out(
    make_frames: MakeFrames, write_frames_to: Callable[..., Path], run_import: Callable[..., ImportReport]
) -> None:
    frames = make_frames(4)
    for atoms in frames[1:]:
        atoms.info["run"] = 7
    report = run_import(write_frames_to(frames, "a.extxyz"), group_by="info:run")
    assert report.manifest.rejected["group key absent"].examples[0][:2] == [0, 0]
    assert report.manifest.structures == 3


@pytest.mark.parametrize("rule", ["", "block", "block:0", "block:x", "info:", "trajectory", "frame:3"])
def test_unknown_rules(rule: str, alcohols: Path, run_import: Callable[..., ImportReport]) -> None:
    with pytest.raises(DataError, match="give one of auto, frame, formula, file, block:N or info:KEY"):
        run_import(alcohols, group_by=rule)
