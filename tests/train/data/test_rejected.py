"""Bad frames are named by index and reason, the rest is imported; bad files are refused before all else."""

import gzip
from collections.abc import Callable
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from equipot.train.errors import DataError
from equipot.train.importer import ImportReport
from equipot.train.sources.base import ReadOptions
from equipot.train.store import Store

Import = Callable[..., ImportReport]

GOOD = """2
Properties=species:S:1:pos:R:3:forces:R:3 energy=-30.{k} pbc="F F F"
H 0.0 0.0 0.0 0.0 0.0 0.1
H 0.0 0.0 0.8 0.0 0.0 -0.1
"""
BOX = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="T T T"\n'
FLAT = BOX.replace("0 0 4", "0 4 0")
LINE = "H 0.0 0.0 0.0 0.0 0.0 0.1\n"

BAD = {
    "non-finite positions": "1\n" + BOX + "H nan 0.0 0.0 0.0 0.0 0.1\n",
    "no atoms": "0\n" + BOX,
    "overlapping atoms": "2\n" + BOX + LINE + "H 0.0 0.05 0.0 0.0 0.0 0.1\n",
    "impossible cell": "1\n" + FLAT + LINE,
    "non-finite label": "1\n" + BOX.replace("-1.0", "nan") + LINE,
    "no energy": "1\n" + BOX.replace("energy=-1.0 ", "") + LINE,
    "wrong shape of a label": "1\n" + BOX.replace("forces:R:3", "forces:R:2") + "H 0 0 0 0.1 0.2\n",
    "unit other than eV and Å": "1\n" + BOX.replace("energy=", "energy_unit=Ha energy=") + LINE,
    "invalid charge or spin": "1\n" + BOX.replace("energy=", "charge=0.5 energy=") + LINE,
    "invalid structure": "1\n" + BOX + LINE.replace("H 0.0", "H 1e9"),
    "unreadable": "1\n" + BOX + "Hx 0.0 0.0 0.0 0.0 0.0 0.1\n",
}


def good(k: int) -> str:
    return GOOD.format(k=k)


def places(report: ImportReport) -> dict[str, list[int]]:
    return {reason: [e[1] for e in tally.examples] for reason, tally in report.manifest.rejected.items()}


@pytest.mark.parametrize("reason", BAD)
def test_each_reason_by_index(reason: str, tmp_path: Path, run_import: Import) -> None:
    file = tmp_path / "a.extxyz"
    file.write_text(good(0) + good(1) + BAD[reason] + good(2) + BAD[reason] + good(3))
    report = run_import(file)
    assert places(report) == {reason: [2, 4]}
    store = Store.open(report.store)
    assert [store.origin(i).frame for i in range(len(store))] == [0, 1, 3, 5]
    assert store.energies.tolist() == [-30.0, -30.1, -30.2, -30.3]


def test_a_pair_that_overlaps_through_the_boundary(tmp_path: Path, run_import: Import) -> None:
    file = tmp_path / "a.extxyz"
    file.write_text(good(0) + "2\n" + BOX + LINE + "H 0.0 0.0 3.98 0.0 0.0 0.1\n")
    assert places(run_import(file)) == {"overlapping atoms": [1]}


@pytest.mark.parametrize("lost", [1, 2])
def test_a_frame_cut_short_costs_one_frame(lost: int, tmp_path: Path, run_import: Import) -> None:
    short = "".join(good(1).splitlines(keepends=True)[:-lost])
    file = tmp_path / "a.extxyz"
    file.write_text(good(0) + short + good(2))
    report = run_import(file)
    assert places(report) == {"unreadable": [1]}
    assert report.manifest.rejected["unreadable"].examples[0][2] == (
        f"line 5 announces 2 atoms, {2 - lost} follow"
    )
    assert Store.open(report.store).energies.tolist() == [-30.0, -30.2]


def test_a_frame_with_too_many_lines_costs_one_frame(tmp_path: Path, run_import: Import) -> None:
    file = tmp_path / "a.extxyz"
    file.write_text(good(0) + good(1) + LINE + LINE + good(2))
    report = run_import(file)
    assert places(report) == {"unreadable": [1]}
    assert "announces 2 atoms, 4 follow" in report.manifest.rejected["unreadable"].examples[0][2]


def test_blank_lines_between_frames_end_nothing(tmp_path: Path, run_import: Import) -> None:
    file = tmp_path / "a.extxyz"
    file.write_text("\n" + good(0) + "\n\n" + good(1) + "  \n" + good(2) + "\n")
    assert len(Store.open(run_import(file).store)) == 3


def test_a_truncated_archive_keeps_what_can_be_read(tmp_path: Path, run_import: Import) -> None:
    rng = np.random.default_rng(0)
    text = "".join(good(k) for k in rng.integers(10**8, size=3000))
    file = tmp_path / "a.extxyz.gz"
    whole = gzip.compress(text.encode())
    file.write_bytes(whole[: len(whole) // 2])
    report = run_import(file)
    assert 500 < len(Store.open(report.store)) < 2500
    assert "the rest of the file is lost" in str(report.manifest.rejected["unreadable"].examples)


def test_all_zero_forces_are_counted_and_kept(tmp_path: Path, run_import: Import) -> None:
    file = tmp_path / "a.extxyz"
    file.write_text(good(0) + good(1).replace("0.1\n", "0.0\n"))
    report = run_import(file)
    assert [e[1] for e in report.manifest.notes["forces: all zero in a frame of several atoms"].examples] == [
        1
    ]
    assert len(Store.open(report.store)) == 2


def test_places_are_bounded_and_the_count_is_not(tmp_path: Path, run_import: Import) -> None:
    file = tmp_path / "a.extxyz"
    file.write_text(good(0) + BAD["no energy"] * 200)
    tally = run_import(file).manifest.rejected["no energy"]
    assert tally.count == 200
    assert len(tally.examples) == 50


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xyz", b"\x89HDF\r\n\x1a\n" + bytes(3000), "is not extxyz .*HDF5.*--format"),
        ("a.extxyz", b"not an xyz file\nat all\n", "line is b'not an xyz file', not an atom count.*--format"),
        ("a.traj", b"3\nProperties=species:S:1\n" + b"H 0 0 0\n" * 3, "a.traj: is not traj .*--format"),
        ("a.xyz.gz", b"plain text under a false name\n", "a.xyz.gz: cannot be read|is not extxyz"),
        ("a.blob", b"\x00\x01\x02 nobody knows", "neither its name nor its first bytes .*--format"),
        ("empty.xyz", b"", "the file is empty"),
        ("a.json", b'{"some": "json"}', "a.json: is not json"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_its_name_says(
    name: str, content: bytes, words: str, tmp_path: Path, run_import: Import
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        run_import(tmp_path / name)
    assert not (tmp_path / "store").exists()


def test_the_format_can_be_forced(tmp_path: Path, run_import: Import) -> None:
    (tmp_path / "frames.dat").write_text(good(0) + good(1))
    report = run_import(tmp_path / "frames.dat", read=ReadOptions(format="extxyz"))
    assert len(Store.open(report.store)) == 2
    with pytest.raises(DataError, match="ASE has no format 'extxy'"):
        run_import(tmp_path / "frames.dat", out=tmp_path / "b", read=ReadOptions(format="extxy"))


def test_a_missing_file_is_said_before_any_other_is_imported(tmp_path: Path, run_import: Import) -> None:
    (tmp_path / "a.xyz").write_text(good(0))
    with pytest.raises(DataError, match=r"b\.xyz: no such file"):
        run_import(tmp_path / "a.xyz", tmp_path / "b.xyz")
    with pytest.raises(DataError, match="not a file"):
        run_import(tmp_path)
    assert not (tmp_path / "store").exists()


def test_a_named_key_that_is_not_there(tmp_path: Path, run_import: Import) -> None:
    (tmp_path / "a.xyz").write_text(good(0))
    with pytest.raises(DataError, match=r"none of its first 1 frame\(s\) has 'REF_energy' \(--energy-key\)"):
        run_import(tmp_path / "a.xyz", read=ReadOptions(energy_key="REF_energy"))


def test_a_named_key_that_is_there_only_in_places(tmp_path: Path, run_import: Import) -> None:
    (tmp_path / "a.xyz").write_text(
        good(0) + good(1).replace("energy=", "E0=") + good(2).replace("energy=", "E0=")
    )
    report = run_import(tmp_path / "a.xyz", read=ReadOptions(energy_key="E0"))
    assert places(report) == {"no energy": [0]}
    assert report.manifest.rejected["no energy"].examples[0][2] == "no E0; keys there: energy, forces"


def test_nothing_to_keep_leaves_no_store(tmp_path: Path, run_import: Import) -> None:
    (tmp_path / "a.xyz").write_text(BAD["no energy"] * 3)
    with pytest.raises(
        DataError, match=r"none of the 3 frame\(s\) of a\.xyz .*no energy, as in frame 0.*--energy-key"
    ):
        run_import(tmp_path / "a.xyz")
    assert not (tmp_path / "store").exists()


def test_nothing_to_keep_leaves_an_older_store_as_it_was(
    tmp_path: Path, run_import: Import, tree_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    (tmp_path / "a.xyz").write_text(good(0))
    (tmp_path / "b.xyz").write_text(BAD["no energy"])
    store = run_import(tmp_path / "a.xyz").store
    before = tree_bytes(store)
    with pytest.raises(DataError, match="none of the 1 frame"):
        run_import(tmp_path / "b.xyz")
    assert tree_bytes(store) == before


@pytest.mark.parametrize("suffix", [".traj", ".db", ".json", ".extxyz.xz"])
def test_other_formats_of_ase(suffix: str, tmp_path: Path, run_import: Import) -> None:
    frames = []
    for k in range(3):
        atoms = ase.Atoms("OH2", [[0, 0, 0], [0, 0.8, 0.6], [0, -0.8, 0.6 + 0.01 * k]])
        atoms.calc = SinglePointCalculator(atoms, energy=-14.0 - k, forces=np.full((3, 3), 0.1 * k))
        frames.append(atoms)
    file = tmp_path / f"water{suffix}"
    if suffix == ".db":
        for atoms in frames:
            ase.io.write(file, atoms, append=True)
    else:
        ase.io.write(file, frames)
    store = Store.open(run_import(file).store)
    assert store.energies.tolist() == [-14.0, -15.0, -16.0]
    np.testing.assert_allclose(store.labels(2).forces, 0.2)
