"""An import by several processes leaves the bytes of one by one process, whoever is killed meanwhile."""

import csv
import functools
import lzma
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.db
import ase.io
import h5py
import lmdb
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from equipot.train import importer, reader_pool
from equipot.train.block import Block, BlockOptions
from equipot.train.errors import DataError, ImportStopped
from equipot.train.grouping import GroupRule
from equipot.train.importer import ImportOptions, Progress, import_files
from equipot.train.reader_pool import ReaderPool
from equipot.train.reading import ReadingOptions
from equipot.train.sources.base import ReadOptions
from equipot.train.store import Store

OPTIONS = ImportOptions(level_of_theory="PBE", licence="MIT", name="x", group_by="frame")
SCRIPT = """
import sys
from pathlib import Path
from equipot.train.importer import ImportOptions, import_files
options = ImportOptions(level_of_theory="PBE", licence="MIT", name="x", group_by="frame")
if __name__ == "__main__":
    files = [Path(file) for file in sys.argv[2:]]
    import_files(files, Path(sys.argv[1]), options, workers=2, commit_structures=64)
"""
Tree = Callable[[Path], dict[str, bytes]]
MakeFrames = Callable[..., list[ase.Atoms]]


@pytest.fixture
def files(tmp_path: Path, make_frames: MakeFrames) -> list[Path]:
    """Six files of four kinds, with bad frames, doubled frames and a truncated stream among them."""
    found = []
    for k, name in enumerate(("a.extxyz", "b.extxyz.xz", "c.traj", "d.db", "e.extxyz", "f.extxyz.xz")):
        frames = make_frames(300, seed=k)
        for bad in range(3, 300, 60 + k):
            frames[bad].calc.results["energy"] = float("nan")
        frames[150:152] = make_frames(2, seed=0)
        path = tmp_path / name
        if name.endswith(".db"):
            with ase.db.connect(path) as database:
                for atoms in frames:
                    database.write(atoms)
        else:
            ase.io.write(path, frames)
        found.append(path)
    whole = found[-1].read_bytes()
    found[-1].write_bytes(whole[: len(whole) * 2 // 3])
    return found


@pytest.fixture
def _many_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divides small files as if they were large."""
    small = functools.partial(ReadingOptions, range_bytes=2**14)
    monkeypatch.setattr(importer, "ReadingOptions", small)


def reading_processes(parent: int) -> list[psutil.Process]:
    """The workers of an import: grandchildren, as a fork server starts them."""
    try:
        children = psutil.Process(parent).children()
        return [worker for child in children for worker in child.children()]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.usefixtures("_many_ranges")
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    files: list[Path], tmp_path: Path, tree_bytes: Tree
) -> None:
    whole = import_files(files, tmp_path / "1", OPTIONS).manifest
    for workers in (2, 3):
        import_files(files, tmp_path / str(workers), OPTIONS, workers=workers)
        assert tree_bytes(tmp_path / str(workers)) == tree_bytes(tmp_path / "1")
    assert [source.file for source in whole.sources] == [path.name for path in files]
    for k in (2, 3):  # the .traj and the .db, read by ranges
        assert files[k].stat().st_size > 5 * 2**14
        assert whole.sources[k].frames_read == 300
    Store.open(tmp_path / "3").verify()


@pytest.mark.usefixtures("_many_ranges")
def test_stopped_and_taken_up_again_with_other_numbers_of_processes(
    files: list[Path], tmp_path: Path, tree_bytes: Tree
) -> None:
    import_files(files, tmp_path / "whole", OPTIONS)
    read, out = [0], tmp_path / "parts"
    for workers, stop in ((2, 400), (1, 700), (3, 1200)):
        with pytest.raises(ImportStopped):
            import_files(
                files,
                out,
                OPTIONS,
                workers=workers,
                on_progress=lambda at: read.append(at.read),
                should_stop=lambda stop=stop: read[-1] >= stop,  # type: ignore[misc]
                commit_structures=64,
            )
    assert import_files(files, out, OPTIONS, workers=2).resumed
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_kill_9_of_the_writer_and_of_readers_alone(
    files: list[Path], tmp_path: Path, tree_bytes: Tree
) -> None:
    import_files(files, tmp_path / "whole", OPTIONS)
    out = tmp_path / "killed"
    (tmp_path / "program.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "program.py"), str(out), *map(str, files)]
    positions = out / "shards" / "00000" / "positions.npy"
    kills = 0
    for size in (0, 30_000):
        process = subprocess.Popen(command)
        readers: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            readers = reading_processes(process.pid) or readers
            if positions.exists() and positions.stat().st_size > size:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005)
        kills += process.wait() == -signal.SIGKILL
        assert psutil.wait_procs(readers, timeout=60)[1] == []  # nobody is left reading for a dead writer
    assert kills >= 1
    process = subprocess.Popen(command)
    killed: list[psutil.Process] = []
    while process.poll() is None and not killed:
        killed = reading_processes(process.pid)[:1]
        for reader in killed:
            reader.kill()
        time.sleep(0.0005)
    assert process.wait(timeout=120) == 0
    assert killed
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def pool_of(path: Path, **options: Any) -> ReaderPool:
    rule = GroupRule.parse("frame")
    reading = ReadingOptions(
        read=ReadOptions(), source="", block=BlockOptions(columns=(), rule=rule, frames=8)
    )
    return ReaderPool([path], reading, workers=1, start=(0, 0), **options)


def read_and_kill(path: Path, number: signal.Signals, times: int) -> list[Block]:
    """What a pool reads whose process is killed whenever frames have come from it, so many times."""
    blocks = []
    with pool_of(path, ahead_bytes=1) as pool:
        victims: set[int] = set()
        for each in pool.messages():
            if each is None or not isinstance(each[1], Block):
                continue
            blocks.append(each[1])
            if len(victims) < times and pool.pids[0] not in victims:
                victims.add(pool.pids[0])
                os.kill(pool.pids[0], number)
    return blocks


@pytest.fixture
def large(tmp_path: Path, make_frames: MakeFrames) -> Path:
    """A file too large to lie in a pipe."""
    ase.io.write(tmp_path / "large.extxyz", make_frames(4000, sizes=(8,)))
    return tmp_path / "large.extxyz"


def test_a_reader_that_dies_once_costs_nothing(large: Path) -> None:
    blocks = read_and_kill(large, signal.SIGSEGV, 1)
    frames = np.concatenate([block.structures["frame"] for block in blocks])
    np.testing.assert_array_equal(frames, np.arange(4000))


def test_frames_that_crash_their_reader_twice_are_left_out_and_named(large: Path) -> None:
    *good, last = read_and_kill(large, signal.SIGSEGV, 2)
    frames = np.concatenate([block.structures["frame"] for block in good])
    np.testing.assert_array_equal(frames, np.arange(len(frames)))
    ((rejected),) = last.rejected
    assert rejected.index == len(frames) < 4000
    assert "died twice (SIGSEGV); the rest of the file is lost" in rejected.detail


def test_a_reader_that_is_killed_twice_stops_the_import_and_says_where(large: Path) -> None:
    with pytest.raises(
        DataError, match=r"large\.extxyz: .* died twice \(SIGKILL\), in frames \d+ on; what is"
    ):
        read_and_kill(large, signal.SIGKILL, 2)


def test_no_more_is_held_than_the_limit(tmp_path: Path, make_frames: MakeFrames) -> None:
    files = []
    for k in range(4):
        ase.io.write(tmp_path / f"{k}.extxyz", make_frames(1500, seed=k, sizes=(20,)))
        files.append(tmp_path / f"{k}.extxyz")
    rule = GroupRule.parse("frame")
    reading = ReadingOptions(
        read=ReadOptions(), source="", block=BlockOptions(columns=(), rule=rule, frames=64)
    )
    sizes = []
    with ReaderPool(files, reading, workers=3, start=(0, 0), ahead_bytes=2**15) as pool:
        for each in pool.messages():
            if each is not None and isinstance(each[1], Block):
                sizes.append(len(pickle.dumps(each[1])))
                time.sleep(0.005)  # a writer slower than its readers
    assert sum(sizes) > 20 * pool.most_held
    assert pool.most_held <= 3 * 2**15 + 3 * max(sizes) + 3 * 1000


def test_a_file_that_changes_under_an_unfinished_import_is_refused(
    files: list[Path], tmp_path: Path, tree_bytes: Tree
) -> None:
    out, read = tmp_path / "store", [0]

    def import_(**options: Any) -> Any:
        return import_files(files, out, OPTIONS, commit_structures=64, **options)

    with pytest.raises(ImportStopped):
        import_(on_progress=lambda at: read.append(at.read), should_stop=lambda: read[-1] > 400)
    begun = tree_bytes(out)
    for k in (0, 1):  # read whole; read in part
        whole = files[k].read_bytes()
        other = lzma.compress(lzma.decompress(whole)[:-1]) if k else whole.replace(b"H ", b"C ", 1)
        files[k].write_bytes(other)
        for workers in (1, 2):
            with pytest.raises(DataError, match=rf"{files[k].name}: has changed since its import was begun"):
                import_(workers=workers)
        assert tree_bytes(out) == begun
        files[k].write_bytes(whole)
    import_(workers=2)
    import_files(files, tmp_path / "whole", OPTIONS)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_the_same_file_twice_and_files_that_are_there_already(files: list[Path], tmp_path: Path) -> None:
    twin = tmp_path / "twin.extxyz"
    twin.write_bytes(files[0].read_bytes())
    for workers in (1, 2):
        out = tmp_path / f"store{workers}"
        report = import_files([files[0], twin, files[4]], out, OPTIONS, workers=workers)
        assert report.skipped == ("twin.extxyz",)
        assert [report.manifest.sources[k].file for k in report.added] == ["a.extxyz", "e.extxyz"]
        again = import_files([files[4], twin], out, OPTIONS, workers=workers)
        assert again.added == ()
        assert again.skipped == ("e.extxyz", "twin.extxyz")
        assert not (out / "journal.json").exists()


def test_all_missing_files_are_named_at_once(files: list[Path], tmp_path: Path) -> None:
    given = [files[0], tmp_path / "g.extxyz", files[1], tmp_path / "h.extxyz"]
    with pytest.raises(DataError, match=r"g\.extxyz: no such file; .*h\.extxyz: no such file"):
        import_files(given, tmp_path / "store", OPTIONS)
    assert not (tmp_path / "store").exists()


def test_every_frame_that_is_left_out_is_listed(tmp_path: Path, make_frames: MakeFrames) -> None:
    frames = make_frames(200)
    for k in range(0, 200, 2):
        frames[k].calc.results["energy"] = float("nan")
    ase.io.write(tmp_path / "a.extxyz", frames)
    ase.io.write(tmp_path / "b.extxyz", [*make_frames(3, seed=9), frames[1]])
    out = tmp_path / "store"
    for name in ("a.extxyz", "b.extxyz"):
        manifest = import_files([tmp_path / name], out, OPTIONS, workers=2).manifest
    assert len(manifest.rejected["non-finite label"].examples) == 50
    with (out / "rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["frame"] for row in rows] == [*map(str, range(0, 200, 2)), "3"]
    assert [row["file"] for row in rows] == ["a.extxyz"] * 100 + ["b.extxyz"]
    assert {row["reason"] for row in rows[:100]} == {"non-finite label"}
    assert rows[100]["reason"] == "duplicate"
    assert "structure 0 of the store" in rows[100]["detail"]


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_hostile_and_damaged_files_among_good_ones_lose_nothing_else(
    files: list[Path], tmp_path: Path, make_frames: MakeFrames
) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "hostile"
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as transaction:
        atoms = make_frames(1)[0]
        plain = {"pos": atoms.positions, "atomic_numbers": atoms.numbers, "energy": -3.0}
        for key, value in (("0", Runs(marker)), ("1", plain), ("length", 2)):
            transaction.put(key.encode(), pickle.dumps(value))
    (tmp_path / "noise.db").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.traj").write_bytes(b"")
    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file["x"] = 1
    odd = [tmp_path / name for name in ("noise.db", "empty.traj", "odd.h5")]
    given = [files[0], odd[0], folder, files[4], *odd[1:]]
    manifest = import_files(given, tmp_path / "store", OPTIONS, workers=2).manifest
    assert [source.frames_kept > 0 for source in manifest.sources] == [True, False, True, True, False, False]
    alone = import_files([files[0], files[4]], tmp_path / "alone", OPTIONS).manifest
    assert manifest.structures == alone.structures + 1
    whole = [e[0] for e in manifest.rejected["unreadable"].examples if "the whole file" in e[2]]
    assert whole == [1, 4, 5]
    assert not marker.exists()


def test_progress_is_told_from_the_first_bytes_on_and_ends_at_one(files: list[Path], tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = import_files(files, tmp_path / "store", OPTIONS, on_progress=seen.append)
    assert seen[0].doing == "checksums"
    fractions = [at.fraction for at in seen]
    assert fractions == sorted(fractions)
    assert 0.9 < fractions[-1] <= 1.0
    assert (
        seen[-1].read
        == seen[-1].kept + seen[-1].rejected
        == sum(s.frames_read for s in report.manifest.sources)
    )


def test_small_imports_start_no_process(files: list[Path]) -> None:
    assert reader_pool.default_workers(files) == 1
