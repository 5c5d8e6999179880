"""Stores as ADIOS2 files: the same to the last bit, read by the row, and safe from damaged files."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import adios2
import numpy as np
import pytest

from equipot.cli.main import main
from equipot.train import convert as module
from equipot.train.errors import DataError
from equipot.train.storage import bp_layout
from equipot.train.store import Store

Compare = Callable[[Store, Store], None]


def convert(store: Path, out: Path, to: str = "bp") -> Path:
    assert main(["data", "convert", str(store), "--to", to, "--out", str(out)]) == 0
    return out


@pytest.fixture
def bp(stores: dict[str, Path], tmp_path: Path) -> Path:
    return convert(stores["molecules"], tmp_path / "molecules.bp")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.is_file()}


@pytest.mark.usefixtures("small_chunks")
def test_there_and_back_are_the_same_bytes(store: Path, tmp_path: Path, assert_same: Compare) -> None:
    assert len(Store.open(store).manifest.shards) > 1
    there = Store.open(convert(store, tmp_path / "a.bp"))
    there.verify()
    assert_same(Store.open(store), there)
    back = convert(tmp_path / "a.bp", tmp_path / "back", to="npy")
    assert files(back) == files(store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bp", "back"]


def test_info_looks_into_the_file(bp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["data", "info", str(bp), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "(verified)" in out
    assert "1300 structures" in out.replace(",", "") or "1300, 10800 atoms" in out


def test_tools_that_know_only_the_layout_find_every_structure(stores: dict[str, Path], bp: Path) -> None:
    """As HydraGNN's AdiosDataset reads: keys, counts and offsets, a selection along the first dimension."""
    store = Store.open(stores["molecules"])
    names = {"pos": "positions"}
    with adios2.FileReader(str(bp)) as file:
        assert file.read_attribute("dataset/ndata") == len(store)
        assert file.read_attribute_string("level_of_theory") == store.manifest.level_of_theory
        assert file.read_attribute_string("digest") == store.manifest.digest
        assert file.read_attribute_string("dataset/forces/unit") == "eV/Å"
        keys = file.read_attribute_string("dataset/keys")
        assert set(keys) >= {"pos", "atomic_numbers", "energy", "forces", "cell", "pbc"}
        variables = file.available_variables()
        for key in keys:
            assert file.read_attribute(f"dataset/{key}/variable_dim") == 0
            assert variables[f"dataset/{key}"]["Type"] in ("double", "float", "int32_t", "int64_t")
            counts = file.read(f"dataset/{key}/variable_count")
            offsets = file.read(f"dataset/{key}/variable_offset")
            shape = [int(n) for n in variables[f"dataset/{key}"]["Shape"].split(",")]
            for i in (0, 1, 299, 300, 777, len(store) - 1):
                start = [int(offsets[i]), *[0] * (len(shape) - 1)]
                value = file.read(f"dataset/{key}", start, [int(counts[i]), *shape[1:]])
                expected = getattr(store.read([i]), names.get(key, key))
                np.testing.assert_array_equal(value.reshape(expected.shape), expected)


def test_one_structure_reads_little_of_the_file(bp: Path) -> None:
    """In a process of its own, whose reads from files the kernel counts."""
    program = f"""
import numpy as np
from equipot.train.store import Store
store = Store.open({str(bp)!r})
store.read([0])
def read_so_far():
    return int(open("/proc/self/io").read().split()[1])
wanted = np.random.default_rng(0).integers(0, len(store), 50)
before = read_so_far()
for i in wanted:
    store.read([i])
print((read_so_far() - before) / len(wanted), store.n_atoms.mean())
"""
    if not Path("/proc/self/io").exists():
        pytest.skip("the kernel does not count reads")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    bytes_each, n_atoms = map(float, done.stdout.split())
    of_a_structure = n_atoms * (24 + 24 + 4) + 2 * 72 + 12 + 8 + 8 + 16  # atoms; cell, stress; the rest
    assert bytes_each < 1.5 * of_a_structure
    assert bytes_each < (bp / "data.0").stat().st_size / 100


def test_threads_forked_processes_and_pickles_read_for_themselves(
    stores: dict[str, Path], bp: Path, assert_same: Compare
) -> None:
    whole, other = Store.open(stores["molecules"]), Store.open(bp)
    other.read([0])  # the file is open before anybody shares it

    def look(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(len(whole))
        return all(
            np.array_equal(other.system(i).positions, whole.system(i).positions)
            and np.array_equal(other.read([i, 7]).forces, whole.read([i, 7]).forces)
            for i in order[:150]
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(4)))
    child = os.fork()
    if child == 0:
        os._exit(0 if look(9) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert look(10)
    assert_same(pickle.loads(pickle.dumps(other)), whole)


@pytest.mark.parametrize("name", ["data.0", "md.0", "md.idx", "mmd.0", "equipot.json"])
@pytest.mark.parametrize("damage", ["absent", "empty", "half", "one byte"])
def test_a_damaged_file_is_refused_and_named(bp: Path, name: str, damage: str) -> None:
    """The library itself would wait for ever for the rest of a truncated file."""
    path = bp / name
    data = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "one byte":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :])
    else:
        path.write_bytes(data[: len(data) // 2 * (damage == "half")])
    if damage == "one byte" and name in ("data.0", "equipot.json"):
        # within the data nothing is looked at when a store is opened, as in a folder of mapped files
        with pytest.raises(DataError, match=r"has changed|damaged|is no ADIOS2 file|reads up to"):
            Store.open(bp).verify()
    else:
        with pytest.raises(DataError, match=str(bp)) as refused:
            Store.open(bp)
        assert "\n" not in str(refused.value)
        assert name in str(refused.value)


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such ADIOS2 file"):
        Store.open(tmp_path / "absent.bp")
    (tmp_path / "text.bp").write_text("no folder")
    with pytest.raises(DataError, match="is no ADIOS2 BP5 file, which is a folder"):
        Store.open(tmp_path / "text.bp")
    with adios2.Stream(str(tmp_path / "foreign.bp"), "w") as file:
        file.write("x", np.arange(3.0), [3], [0], [3])
    with pytest.raises(DataError, match=r"no ADIOS2 file that equipot wrote \(no equipot.json\)"):
        Store.open(tmp_path / "foreign.bp")


def test_a_newer_layout_is_refused(bp: Path) -> None:
    guard = bp / bp_layout.GUARD
    guard.write_text(guard.read_text().replace('"version": 1', '"version": 2', 1))
    with pytest.raises(DataError, match="this equipot reads up to 1; upgrade equipot"):
        Store.open(bp)


def test_what_exists_is_not_written_over(
    stores: dict[str, Path], bp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(bp)
    assert main(["data", "convert", str(stores["molecules"]), "--to", "bp", "--out", str(bp)]) == 2
    assert f"{bp}: exists; give the name of a new one as --out" in capsys.readouterr().err
    assert files(bp) == before


@pytest.mark.parametrize("to", ["bp", "npy"])
def test_a_killed_conversion_leaves_no_store_and_is_begun_again(
    stores: dict[str, Path], tmp_path: Path, to: str
) -> None:
    out = tmp_path / ("a.bp" if to == "bp" else "a")
    program = f"""
import time
from pathlib import Path
from equipot.train import convert
from equipot.train.storage import base
from equipot.train.store import Store
base.CHUNK_STRUCTURES = 50
def slowly(written):
    print(written, flush=True)
    time.sleep(0.5)
convert.to_{to}(Store.open({str(stores["molecules"])!r}), Path({str(out)!r}), on_progress=slowly)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "50"
        with pytest.raises(DataError, match="another conversion to it is running"):
            module.to_npy(Store.open(stores["molecules"]), out, on_progress=lambda _: None)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == [f".{out.name}.part"]
    convert(stores["molecules"], out, to=to)
    Store.open(out).verify()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_an_interrupted_conversion_leaves_nothing(stores: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    for write, name in ((module.to_bp, "a.bp"), (module.to_npy, "a")):
        with pytest.raises(KeyboardInterrupt):
            write(Store.open(stores["molecules"]), tmp_path / name, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_data(stores: dict[str, Path], tmp_path: Path) -> None:
    """Ten times the data (its shards ten times, as links) is converted in the same memory."""
    program = """
import json, os, resource, sys
from pathlib import Path
from equipot.train import convert
from equipot.train.storage import base
from equipot.train.store import Store
source, times, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
base.CHUNK_ATOMS = 20000
body = json.loads((source / "manifest.json").read_text())
shards, body["shards"] = body["shards"], []
for k in range(times):
    for entry in shards:
        name = f"{k}-{entry['name']}"
        (out / "made/shards").mkdir(parents=True, exist_ok=True)
        os.symlink(source / "shards" / entry["name"], out / "made/shards" / name)
        body["shards"].append({**entry, "name": name})
body["structures"] *= times
body["atoms"] *= times
(out / "made/manifest.json").write_text(json.dumps(body))
store = Store.open(out / "made")
convert.to_bp(store, out / "a.bp", on_progress=lambda _: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, (out / "a.bp/data.0").stat().st_size)
"""
    peaks, sizes = [], []
    for times in (2, 24):
        command = [
            sys.executable,
            "-c",
            program,
            str(stores["molecules"]),
            str(times),
            str(tmp_path / str(times)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kib, size = map(int, done.stdout.split())
        peaks.append(kib * 1024)
        sizes.append(size)
    mapped = sizes[1] - sizes[0]  # the pages of the source that were read count as memory while there is some
    assert sizes[1] > 9 * sizes[0]
    assert peaks[1] - peaks[0] < 0.5 * mapped, (peaks, sizes)


@pytest.mark.parametrize("package", ["adios2", "ray"])
def test_a_missing_package_simulated_by_a_blocked_import_is_named_with_its_extra(
    package: str, bp: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    whole = str(stores["molecules"])
    calls = {
        "adios2": [["info", str(bp)], ["convert", whole, "--to", "bp", "--out", str(tmp_path / "b.bp")]],
        "ray": [["info", f"ray:{whole}"]],
    }[package]
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from equipot.cli.main import main
assert all(main(["data", *call]) == 2 for call in {calls!r})
assert main(["data", "info", {whole!r}]) == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extra = {"adios2": "adios", "ray": "ray"}[package]
    assert done.stderr.count(f"needs {package}: pip install 'equipot[{extra}]'") == len(calls)
    assert len(done.stderr.splitlines()) == len(calls)


def test_a_full_disk_is_an_error_and_leaves_nothing(stores: dict[str, Path], tmp_path: Path) -> None:
    """Simulated by the limit on a file's size, beyond which writing fails as on a full disk."""
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from equipot.cli.main import main
sys.exit(main(["data", "convert", {str(stores["molecules"])!r}, "--to", sys.argv[1], "--out", sys.argv[2]]))
"""
    for to, name in (("bp", "a.bp"), ("npy", "a")):
        command = [sys.executable, "-c", program, to, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, (to, done.returncode, done.stderr)
        assert f"{tmp_path / name}: cannot be written" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_copy_is_as_good(bp: Path, stores: dict[str, Path], tmp_path: Path, assert_same: Compare) -> None:
    shutil.copytree(bp, tmp_path / "elsewhere" / "copy.bp")
    assert_same(Store.open(tmp_path / "elsewhere" / "copy.bp"), Store.open(stores["molecules"]))
