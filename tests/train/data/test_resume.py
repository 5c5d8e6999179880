"""An import that is killed, at whatever moment, ends with the bytes of one that was not."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ase
import pytest

from equipot.train.errors import DataError, ImportStopped
from equipot.train.importer import ImportOptions, Progress, import_files
from equipot.train.manifest import Manifest
from equipot.train.store import Store
from equipot.train.store_writer import StoreWriter

OPTIONS = ImportOptions(level_of_theory="PBE", licence="MIT", name="killed")
SCRIPT = """
import sys
from pathlib import Path
from equipot.train.importer import ImportOptions, import_files
options = ImportOptions(level_of_theory="PBE", licence="MIT", name="killed")
import_files([Path(f) for f in sys.argv[2:]], Path(sys.argv[1]), options, commit_structures=8)
"""

Tree = Callable[[Path], dict[str, bytes]]


class Killed(BaseException):
    """Stands for the end of the process between two frames."""


@pytest.fixture
def files(make_frames: Callable[..., list[ase.Atoms]], write_frames_to: Callable[..., Path]) -> list[Path]:
    first = make_frames(37, seed=1)
    first[20].calc.results["energy"] = float("nan")
    return [write_frames_to(first, "a.extxyz"), write_frames_to(make_frames(29, seed=2), "b.extxyz")]


def import_until(frame: int, files: list[Path], out: Path) -> None:
    seen = 0

    def count(progress: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == frame:
            raise Killed

    with pytest.raises(Killed):
        import_files(files, out, OPTIONS, on_progress=count, commit_structures=8)


@pytest.mark.parametrize("frame", [1, 7, 8, 9, 21, 36, 37, 38, 50, 66])
def test_the_end_of_the_process_at_any_frame(
    files: list[Path], tmp_path: Path, tree_bytes: Tree, frame: int
) -> None:
    import_files(files, tmp_path / "whole", OPTIONS)
    out = tmp_path / "killed"
    import_until(frame, files, out)
    with pytest.raises(DataError, match="its import is not finished; run the same import command again"):
        Store.open(out)
    report = import_files(files, out, OPTIONS, commit_structures=8)
    assert report.resumed
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")
    assert [entry.frames_read for entry in report.manifest.sources] == [37, 29]
    assert report.manifest.rejected["non-finite label"].count == 1


def test_half_written_rows_are_cut_off(files: list[Path], tmp_path: Path, tree_bytes: Tree) -> None:
    import_files(files, tmp_path / "whole", OPTIONS)
    out = tmp_path / "killed"
    import_until(30, files, out)
    for array in (out / "shards").rglob("*.npy"):
        array.write_bytes(array.read_bytes() + b"half a row")
    (out / "journal.json.part").write_text('{"half a jour')
    import_files(files, out, OPTIONS)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_killed_in_the_very_first_step(files: list[Path], tmp_path: Path, tree_bytes: Tree) -> None:
    import_files(files, tmp_path / "whole", OPTIONS)
    out = tmp_path / "killed"
    out.mkdir()
    (out / "journal.json.part").write_text('{"half a jour')
    import_files(files, out, OPTIONS)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_killed_while_adding_to_a_store(files: list[Path], tmp_path: Path, tree_bytes: Tree) -> None:
    import_files(files, tmp_path / "whole", OPTIONS)
    out = tmp_path / "killed"
    import_files(files[:1], out, OPTIONS)
    import_until(13, files, out)
    assert len(Store.open(out)) == 36
    Store.open(out).verify()
    import_files(files, out, OPTIONS)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_killed_between_the_last_two_steps(files: list[Path], tmp_path: Path, tree_bytes: Tree) -> None:
    out = tmp_path / "killed"
    read = [0]
    with pytest.raises(ImportStopped):  # stopped after the last frame: the journal holds everything
        import_files(
            files,
            out,
            OPTIONS,
            on_progress=lambda progress: read.append(progress.read),
            should_stop=lambda: read[-1] == 66,
        )
    journal = (out / "journal.json").read_bytes()
    import_files(files, out, OPTIONS)
    done = tree_bytes(out)
    (out / "journal.json").write_bytes(journal)
    report = import_files(files, out, OPTIONS)
    assert report.skipped == ("a.extxyz", "b.extxyz")
    assert tree_bytes(out) == done


def test_kill_9_again_and_again(files: list[Path], tmp_path: Path, tree_bytes: Tree) -> None:
    import_files(files, tmp_path / "whole", OPTIONS)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(out), *map(str, files)]
    kills = 0
    for size in (0, 1800):  # bytes of positions on disk at which the process is killed
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        positions = out / "shards" / "00000" / "positions.npy"
        while process.poll() is None and time.monotonic() < deadline:
            if positions.exists() and positions.stat().st_size > size:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    import_files(files, out, OPTIONS, commit_structures=8)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_sigterm_stops_cleanly_and_says_how_to_go_on(
    alcohols: Path, tmp_path: Path, tree_bytes: Tree
) -> None:
    arguments = ["--level-of-theory", "PBE", "--licence", "MIT", "--name", "x"]
    out = tmp_path / "stopped"
    command = [
        sys.executable,
        "-m",
        "equipot.cli",
        "data",
        "import",
        str(alcohols),
        "--out",
        str(out),
        *arguments,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "journal.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: stopped " in errors
    assert "run the same command again" in errors.replace("\n", " ")
    assert "Traceback" not in errors
    options = ImportOptions(level_of_theory="PBE", licence="MIT", name="x")
    assert import_files([alcohols], out, options).resumed
    import_files([alcohols], tmp_path / "whole", options)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_a_stop_commits_what_it_has(files: list[Path], tmp_path: Path, tree_bytes: Tree) -> None:
    import_files(files, tmp_path / "whole", OPTIONS)
    out, read = tmp_path / "stopped", [0]
    with pytest.raises(ImportStopped, match=r"after frame 3 of b\.extxyz"):
        import_files(
            files,
            out,
            OPTIONS,
            on_progress=lambda progress: read.append(progress.read),
            should_stop=lambda: read[-1] == 41,
            commit_structures=8,
        )
    seen: list[Progress] = []
    import_files(files, out, OPTIONS, on_progress=seen.append, commit_structures=8)
    assert sum(progress.doing == "" for progress in seen) == 66 - 41
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_an_unfinished_import_is_not_mixed_with_another(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    import_until(20, files, out)
    with pytest.raises(DataError, match=r"an import of a\.extxyz, b\.extxyz lies unfinished"):
        import_files(files[:1], out, OPTIONS)
    other = ImportOptions(level_of_theory="PBE", licence="MIT", name="killed", group_by="frame")
    with pytest.raises(DataError, match="lies unfinished"):
        import_files(files, out, other)


def test_two_imports_at_once_are_refused(files: list[Path], tmp_path: Path) -> None:
    fresh = Manifest(name="x", level_of_theory="PBE", licence="MIT")
    with (
        StoreWriter(tmp_path / "store", fresh),
        pytest.raises(DataError, match="another import into this store is running"),
    ):
        import_files(files, tmp_path / "store", OPTIONS)
    assert len(import_files(files, tmp_path / "store", OPTIONS).added) == 2


def test_a_full_disk_is_said_and_nothing_is_lost(files: list[Path], tmp_path: Path, tree_bytes: Tree) -> None:
    import_files(files, tmp_path / "whole", OPTIONS)
    out = tmp_path / "full"
    import_until(20, files, out)
    positions = out / "shards" / "00000" / "positions.npy"
    kept = positions.read_bytes()
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + SCRIPT
    )
    command = [sys.executable, "-c", script, str(out), *map(str, files)]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert "cannot be written (File too large); what is committed stays" in failed.stderr
    assert positions.read_bytes()[128 : len(kept)] == kept[128:]
    import_files(files, out, OPTIONS)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")
