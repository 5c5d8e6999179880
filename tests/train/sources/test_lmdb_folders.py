"""LMDB's own layout, a folder with `data.mdb` in it, is read as the single file is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from equipot.train.importer import ImportOptions, import_files
from equipot.train.sources.base import ReadOptions
from equipot.train.sources.registry import RELEASES, find_container, find_files

Sample = Callable[[str], Path]


@pytest.fixture
def folder(sample: Sample, tmp_path: Path) -> Path:
    found = tmp_path / "release" / "train"
    found.mkdir(parents=True)
    (found / "data.mdb").write_bytes(sample("oc22/data.0000.lmdb").read_bytes())
    (found / "lock.mdb").write_bytes(b"")
    return found


def test_a_folder_holds_the_same_frames_as_the_file(sample: Sample, folder: Path, tmp_path: Path) -> None:
    options = ImportOptions(level_of_theory="PBE+U", licence="CC-BY-4.0", name="oc22", source="oc22")
    one = import_files([sample("oc22/data.0000.lmdb")], tmp_path / "one", options).manifest
    other = import_files([folder], tmp_path / "other", options, workers=2).manifest
    assert other.digest == one.digest
    assert other.structures == 16
    (entry,) = other.sources
    assert (entry.file, entry.sha256) == ("train", one.sources[0].sha256)


def test_folders_are_found(folder: Path) -> None:
    assert find_files([folder], RELEASES["oc22"]) == [folder]
    named = folder.parent / "data.0001.lmdb"
    named.mkdir()
    (named / "data.mdb").write_bytes(b"x")
    assert find_files([folder.parent], RELEASES["oc22"]) == [named, folder]
    container = find_container(folder, ReadOptions())
    assert container is not None
    assert container.name == "lmdb"
