"""Releases through the importer: the right level and licence, every drop with file, frame and reason."""

import json
import lzma
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import h5py
import lmdb
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from typer.testing import CliRunner

from equipot.train.cli_data import app
from equipot.train.errors import DataError, ImportStopped
from equipot.train.frames import as_atoms
from equipot.train.importer import ImportOptions, import_files
from equipot.train.seen import Seen
from equipot.train.sources.base import ReadOptions
from equipot.train.sources.registry import CONTAINERS, RELEASES, choose_level, find_files
from equipot.train.store import Store

Sample = Callable[[str], Path]


def run(*words: str | Path) -> Any:
    """`equipot data …`; the exception itself where it fails."""
    return CliRunner().invoke(app, [str(word) for word in words])


def imported(tmp_path: Path, *words: str | Path) -> Store:
    result = run("import", *words, "--out", tmp_path / "store")
    assert result.exit_code == 0, result.exception
    return Store.open(tmp_path / "store")


@pytest.mark.parametrize(
    ("words", "file", "count", "level", "licence"),
    [
        (["ani1x"], "ani1x/ani1_n5.hdf5", 8, "ωB97X/6-31G(d)", "CC0-1.0"),
        (["ani1x", "--level", "ccsd(t)_cbs"], "ani1x/ani1_n5.hdf5", 6, "CCSD(T)*/CBS", "CC0-1.0"),
        (["qm7x"], "qm7x/1000.hdf5", 10, "PBE0/tight (FHI-aims)", "CC-BY-4.0"),
        (
            ["oc20"],
            "oc20/s2ef_train_sample/3.extxyz.xz",
            444,
            "RPBE/PAW 350 eV (VASP), total energy",
            "CC-BY-4.0",
        ),
        (["oc22"], "oc22/data.0000.lmdb", 16, "PBE+U/PAW 500 eV (VASP), total energy", "CC-BY-4.0"),
        (
            ["mptrj", "--level", "corrected"],
            "mptrj/MPtrj_2022.9_sample.json",
            719,
            "PBE or PBE+U (MPRelaxSet), MP2020-corrected energy",
            "CC-BY-4.0",
        ),
    ],
)
def test_a_release_by_its_name(
    sample: Sample, tmp_path: Path, words: list[str], file: str, count: int, level: str, licence: str
) -> None:
    store = imported(tmp_path, words[0], sample(file), *words[1:])
    assert len(store) == count
    assert (store.manifest.level_of_theory, store.manifest.licence) == (level, licence)
    assert store.manifest.sources[0].sha256
    assert store.name(0)
    store.verify()


def test_tags_fixed_atoms_and_names_are_kept(sample: Sample, tmp_path: Path) -> None:
    path = sample("oc20/s2ef_train_sample/3.extxyz.xz")
    store = imported(tmp_path, "oc20", path)
    line = lzma.decompress((path.parent / "3.txt.xz").read_bytes()).decode().splitlines()[7].split(",")
    assert store.name(7) == f"{line[0]}/{line[1]}"
    reader = RELEASES["oc20"].open(path, ReadOptions(level="total"))
    frame: Any = list(reader.frames())[7]
    for name in ("tags", "fixed"):
        np.testing.assert_array_equal(store.extra(7, name), frame.extras[name])
    assert store.extra(7, "magmoms") is None
    assert store.manifest.groups == 12
    atoms = as_atoms(store, 7)
    np.testing.assert_array_equal(atoms.get_tags(), frame.extras["tags"])
    np.testing.assert_array_equal(atoms.constraints[0].index, np.flatnonzero(frame.extras["fixed"]))
    assert atoms.info["source_name"] == store.name(7)
    np.testing.assert_array_equal(atoms.calc.results["forces"], frame.forces)


def test_moments_are_kept_and_absent_ones_are_nan(tmp_path: Path) -> None:
    body = {
        "structure": {
            "lattice": {"matrix": (np.eye(3) * 2.8).tolist()},
            "sites": [{"species": [{"element": "Fe", "occu": 1}], "abc": [x] * 3} for x in (0.0, 0.5)],
        },
        "uncorrected_total_energy": -16.5,
        "force": [[0.0, 0.0, 0.1], [0.0, 0.0, -0.1]],
        "stress": (np.eye(3) * 16.021766208).tolist(),
    }
    entries = {
        "mp-1-0-0": {**body, "magmom": [2.2, 2.3]},
        "mp-1-0-1": {**body, "uncorrected_total_energy": -16.0},
    }
    (tmp_path / "MPtrj.json").write_text(json.dumps({"mp-1": entries}))
    store = imported(tmp_path, "mptrj", tmp_path / "MPtrj.json")
    moments, absent, stress = store.extra(0, "magmoms"), store.extra(1, "magmoms"), store.labels(0).stress
    assert moments is not None
    assert absent is not None
    assert stress is not None
    np.testing.assert_allclose(moments, [2.2, 2.3], rtol=1e-6)
    assert np.isnan(absent).all()
    np.testing.assert_allclose(stress, -0.01 * np.eye(3))
    assert [store.name(0), store.name(1)] == ["mp-1-0-0", "mp-1-0-1"]
    store.verify()


def copper(count: int, start: int = 0) -> list[ase.Atoms]:
    frames = []
    for k in range(start, start + count):
        atoms = ase.Atoms("Cu2", [[0, 0, 0], [2.2 + 0.01 * k, 0, 0]])
        forces = np.array([[0.1 * k, 0, 0], [-0.1 * k, 0, 0]])
        atoms.calc = SinglePointCalculator(atoms, energy=-5.0 - k, forces=forces)
        frames.append(atoms)
    return frames


OPTIONS = ImportOptions(level_of_theory="EMT", licence="CC0-1.0", name="copper", group_by="frame")


def test_exact_duplicates_are_left_out_within_and_across_imports(tmp_path: Path) -> None:
    frames = copper(5)
    ase.io.write(tmp_path / "a.extxyz", [*frames, frames[2], frames[0]])
    ase.io.write(tmp_path / "b.extxyz", [frames[4], *copper(2, 5)])
    report = import_files([tmp_path / "a.extxyz"], tmp_path / "store", OPTIONS)
    tally = report.manifest.rejected["duplicate"]
    assert [(source, frame) for source, frame, _ in tally.examples] == [(0, 5), (0, 6)]
    assert "the same as structure 2 of the store" in tally.examples[0][2]
    report = import_files([tmp_path / "b.extxyz"], tmp_path / "store", OPTIONS)
    assert report.manifest.structures == 7
    assert report.manifest.rejected["duplicate"].examples[-1][:2] == [1, 0]
    both = [tmp_path / "a.extxyz", tmp_path / "b.extxyz"]
    options = ImportOptions(**{**_fields(OPTIONS), "keep_duplicates": True})
    assert import_files(both, tmp_path / "all", options).manifest.structures == 10


def _fields(options: ImportOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


def test_a_killed_import_remembers_what_it_has_seen(tmp_path: Path) -> None:
    frames = copper(30)
    ase.io.write(tmp_path / "a.extxyz", [*frames, *frames[:20], *copper(5, 30)])
    files = [tmp_path / "a.extxyz"]
    whole = import_files(files, tmp_path / "whole", OPTIONS)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked % 13 == 0

    for _ in range(10):
        try:
            report = import_files(files, tmp_path / "parts", OPTIONS, should_stop=stop, commit_structures=4)
            break
        except ImportStopped:
            continue
    assert report.manifest.digest == whole.manifest.digest
    assert report.manifest.structures == 35
    assert report.manifest.rejected["duplicate"].count == 20
    for file in sorted((tmp_path / "whole" / "shards").rglob("*.npy")):
        other = tmp_path / "parts" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == other.read_bytes()


def test_forces_over_the_limit_are_left_out(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", copper(10))
    result = run(
        "import", tmp_path / "a.extxyz", "--out", tmp_path / "store", "--level-of-theory", "EMT",
        "--licence", "CC0-1.0", "--max-force", "0.55",
    )  # fmt: skip
    assert result.exit_code == 0
    manifest = Store.open(tmp_path / "store").manifest
    assert manifest.structures == 6
    assert manifest.rejected["force over the limit"].count == 4
    assert (
        "atom 0 feels 0.6 eV/Å, the limit is 0.55" in manifest.rejected["force over the limit"].examples[0][2]
    )


def test_one_damaged_file_among_many_is_reported_and_the_rest_imported(
    sample: Sample, tmp_path: Path
) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    whole = sample("qm7x/1000.hdf5").read_bytes()
    (folder / "1000.hdf5").write_bytes(whole)
    (folder / "2000.hdf5").write_bytes(whole[:20000])
    store = imported(tmp_path, "qm7x", folder)
    assert len(store) == 10
    ((source, frame, detail),) = store.manifest.rejected["unreadable"].examples
    assert (store.manifest.sources[source].file, frame) == ("2000.hdf5", 0)
    assert "the whole file" in detail
    result = run("import", "qm7x", folder / "2000.hdf5", "--out", tmp_path / "none")
    assert isinstance(result.exception, DataError)
    assert not (tmp_path / "none").exists()


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_hostile_records_do_not_run_and_are_listed(sample: Sample, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "data.0000.lmdb"
    path.write_bytes(sample("oc22/data.0000.lmdb").read_bytes())
    with lmdb.open(str(path), subdir=False, map_size=2**28) as env, env.begin(write=True) as transaction:
        transaction.put(b"3", pickle.dumps(Runs(marker)))
    store = imported(tmp_path, "oc22", path)
    assert len(store) == 15
    ((source, frame, detail),) = store.manifest.rejected["refused: not plain data"].examples
    assert (source, frame) == (0, 3)
    assert "posix.system" in detail
    assert not marker.exists()


def test_a_folder_gives_its_files_in_order(tmp_path: Path) -> None:
    for name in ("10.extxyz.xz", "2.extxyz.xz", "2.txt.xz", "sub/1.extxyz.xz", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [str(path.relative_to(tmp_path)) for path in find_files([tmp_path], RELEASES["oc20"])]
    assert names == ["2.extxyz.xz", "10.extxyz.xz", "sub/1.extxyz.xz"]
    with pytest.raises(DataError, match=r"holds no \*\.lmdb or \*\.traj"):
        find_files([tmp_path], RELEASES["oc22"])
    with pytest.raises(DataError, match="name the release's files"):
        find_files([], RELEASES["oc22"])


def test_words_that_do_not_fit_are_refused(sample: Sample, tmp_path: Path) -> None:
    path = sample("mptrj/MPtrj_2022.9_sample.json")
    for words, match in (
        (["mptrj", path, "--level", "total"], "mptrj has uncorrected, corrected"),
        ([path, "--level", "corrected"], "only a release has levels"),
        ([path], "--level-of-theory is empty"),
        (["mptrj", tmp_path / "none.json"], "no such file"),
        ([path, "--energy-unit", "Ry"], "--energy-unit Ry"),
    ):
        result = run("import", *words, "--out", tmp_path / "store")
        assert isinstance(result.exception, DataError), result.output
        assert match in str(result.exception)
    with pytest.raises(DataError):
        choose_level(RELEASES["oc20"], "x", [])


def test_two_levels_never_share_a_store(sample: Sample, tmp_path: Path) -> None:
    path = sample("mptrj/MPtrj_2022.9_sample.json")
    imported(tmp_path, "mptrj", path)
    result = run("import", "mptrj", path, "--level", "corrected", "--out", tmp_path / "store")
    assert "holds data of level of theory" in str(result.exception)


def test_ani1x_and_qm7x_split_by_formula_and_molecule(sample: Sample, tmp_path: Path) -> None:
    store = imported(tmp_path, "ani1x", sample("ani1x/ani1_n5.hdf5"))
    with h5py.File(sample("ani1x/ani1_n5.hdf5")) as file:
        assert store.manifest.groups == len(file) == 5


def test_every_source_says_what_its_files_are_called() -> None:
    for name, source in {**RELEASES, **CONTAINERS}.items():
        assert source.name == name
        assert source.files
        assert bool(source.levels) == bool(source.licence) == (name in RELEASES)


def test_fingerprints_are_remembered_past_the_first_table(tmp_path: Path) -> None:
    seen = Seen(tmp_path)
    keys = np.random.default_rng(0).integers(0, 2**63, 70000)
    assert all(seen.add(int(key), place) is None for place, key in enumerate(keys))
    assert [seen.add(int(keys[k]), -1) for k in (0, 40000, 69999)] == [0, 40000, 69999]
    assert seen.add(0, 5) is None
    assert seen.add(0, 6) == 5
    assert list(tmp_path.iterdir()) == []
