"""Importing against reading with ASE and writing an ASE LMDB: frames a second, peak memory; JSON out.

Each round does in turn, so that all meet the same machine: ASE (read with `ase.io.iread`, write with the
`aselmdb` backend of ase-db-backends, in one transaction), an import by one process, and one by all cores. A
compressed release file is decompressed for ASE first, as its users do; that is counted, as it is for the
import. Ratios are of CPU time for the two that are one process, and of wall time for all; medians over
rounds. Then the peak memory of the import's processes together (PSS of the tree, without the mapped pages of
files, which the system takes back when it needs them; and with them) at once and ten times the data.

Give real files, or none for frames like those of the field: molecules of 21 atoms, and slabs of 40 to 90 in
the layout of OC20's S2EF release.

    python benchmarks/import_store.py [--rounds 5] [--molecules FILE.extxyz] [--slabs FOLDER]
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import psutil  # type: ignore[import-untyped]

from equipot.train.importer import ImportOptions, import_files

MOLECULE = np.array([6] * 9 + [8] * 4 + [1] * 8)


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--frames", type=int, default=6000, help="of the made molecules; a quarter of it slabs"
    )
    parser.add_argument("--molecules", type=Path, help="an extended xyz file to take instead")
    parser.add_argument("--slabs", type=Path, help="a folder of N.extxyz.xz and N.txt.xz to take instead")
    parser.add_argument("--without-memory", action="store_true", help="leave that part out")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        molecules = options.molecules or make_molecules(home / "molecules.extxyz", options.frames)
        slabs = options.slabs or make_slabs(home / "slabs", options.frames // 4)
        slab_files = sorted(slabs.glob("*.extxyz.xz"))
        report = {
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "date": time.strftime("%Y-%m-%d"),
            "command": "python " + " ".join(["benchmarks/import_store.py", *sys.argv[1:]]),
            "workers": options.workers,
            "extxyz": compare([molecules], "", home, options),
            "oc20 s2ef": compare(slab_files, "oc20", home, options),
        }
        if not options.without_memory:
            some = make_molecules(home / "some.extxyz", 1000)
            report["memory"] = memory([some], home, options.workers)
    print(json.dumps(report, indent=1))


def compare(files: Sequence[Path], source: str, home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Frames a second of the three ways, and their ratios."""
    ways: dict[str, Callable[[], int]] = {
        "ase": lambda: through_ase(files, home),
        "import, 1 process": lambda: through_import(files, source, home, workers=1),
        f"import, {options.workers} processes": lambda: through_import(
            files, source, home, workers=options.workers
        ),
    }
    wall: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds + 1):
        for way, run in ways.items():
            began, used = time.perf_counter(), time.process_time()
            frames = run()
            wall[way].append(frames / (time.perf_counter() - began))
            cpu[way].append(frames / (time.process_time() - used))
    one, several = list(ways)[1:]
    return {  # the first round warms caches and the server that starts processes
        "frames": frames,
        "frames per second of wall time": {way: round(statistics.median(wall[way][1:])) for way in ways},
        "frames per second of CPU time": {
            way: round(statistics.median(cpu[way][1:])) for way in ("ase", one)
        },
        "1 process to ase, CPU time": _ratio(cpu[one], cpu["ase"]),
        "1 process to ase, wall time": _ratio(wall[one], wall["ase"]),
        f"{options.workers} processes to ase, wall time": _ratio(wall[several], wall["ase"]),
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours[1:], theirs[1:], strict=True)), 2)


def through_ase(files: Sequence[Path], home: Path) -> int:
    """Reads and writes with ASE; returns the number of frames."""
    out = home / "ase.aselmdb"
    count = 0
    with ase.db.connect(str(out), type="aselmdb") as database:
        for file in files:
            plain = file
            if file.suffix == ".xz":
                plain = home / file.stem
                with lzma.open(file) as packed, plain.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 2**20)
            for atoms in ase.io.iread(str(plain), index=":", format="extxyz"):
                database.write(atoms)
                count += 1
    out.unlink()
    return count


def through_import(files: Sequence[Path], source: str, home: Path, *, workers: int) -> int:
    """Imports with all checks; returns the number of frames."""
    out = home / "store"
    options = ImportOptions(
        level_of_theory="PBE", licence="none", name="x", source=source, keep_duplicates=True
    )
    report = import_files(files, out, options, workers=workers)
    shutil.rmtree(out)
    return sum(entry.frames_read for entry in report.manifest.sources)


def memory(files: Sequence[Path], home: Path, workers: int) -> dict[str, Any]:
    """Peak megabytes of an import's processes, each import in a process of its own."""
    found: dict[str, Any] = {}
    for times in (1, 10):
        copies = []
        for k in range(2 * times):  # files that differ, as one that comes twice is not read
            copies.append(home / f"copy{k}.extxyz")
            copies[-1].write_bytes(b"\n" * k + files[0].read_bytes())
        for count in (1, workers):
            program = multiprocessing.get_context("spawn").Process(
                target=through_import, args=(copies, "", home), kwargs={"workers": count}
            )
            with peak_of(program) as peak:
                program.start()
                program.join()
            found[f"{count} process(es), {times}x"] = peak
    for count in (1, workers):
        one, ten = found[f"{count} process(es), 1x"], found[f"{count} process(es), 10x"]
        found[f"{count} process(es), 10x to 1x"] = {key: round(ten[key] / one[key], 2) for key in one}
    return found


@contextmanager
def peak_of(program: Any) -> Iterator[dict[str, float]]:  # noqa: ANN401 - any kind of Process
    """Fills in the peak of a process and its descendants, looked at every 50 ms, when left."""
    peak = {"own MB": 0.0, "with mapped files MB": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            if program.pid is None:
                continue
            own = mapped = 0
            try:
                root = psutil.Process(program.pid)
                for process in [root, *root.children(recursive=True)]:
                    sizes = _rollup(process.pid)
                    own += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
                    mapped += sizes["Pss"]
            except (psutil.Error, OSError, KeyError):
                continue  # it ended while it was looked at
            peak["own MB"] = max(peak["own MB"], round(own / 1e3, 1))
            peak["with mapped files MB"] = max(peak["with mapped files MB"], round(mapped / 1e3, 1))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _rollup(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


def make_molecules(path: Path, count: int) -> Path:
    """Vibrating molecules of 21 atoms with random forces."""
    rng = np.random.default_rng(0)
    grid = np.argwhere(np.ones((3, 3, 3)))[: len(MOLECULE)] * 1.4
    write_frames(path.open("w"), count, rng, lambda: (MOLECULE, grid, None))
    return path


def make_slabs(folder: Path, count: int) -> Path:
    """Slabs of 40 to 90 atoms with tags, in two compressed files with their lists."""
    folder.mkdir()
    rng = np.random.default_rng(1)

    def slab() -> tuple[Any, Any, Any]:
        n = int(rng.integers(40, 91))
        numbers = rng.choice([29, 78, 28], n)
        grid = np.argwhere(np.ones((5, 5, 4)))[:n] * 2.6
        return numbers, grid, np.diag([13.0, 13.0, 35.0])

    for k in range(2):
        with lzma.open(folder / f"{k}.extxyz.xz", "wt", preset=1) as file:
            write_frames(file, count // 2, rng, slab)
        lines = "".join(f"random{k}{frame},frame{frame},-100.0\n" for frame in range(count // 2))
        (folder / f"{k}.txt.xz").write_bytes(lzma.compress(lines.encode()))
    return folder


def write_frames(file: Any, count: int, rng: Any, make: Callable[[], tuple[Any, Any, Any]]) -> None:  # noqa: ANN401
    """Extended xyz as the releases write it; with a cell: the columns of OC20."""
    from ase.data import chemical_symbols

    with file:
        for _ in range(count):
            numbers, grid, cell = make()
            n = len(numbers)
            positions, forces = grid + rng.normal(0, 0.05, (n, 3)), rng.normal(0, 1, (n, 3))
            lattice = "" if cell is None else f'Lattice="{" ".join(map(str, cell.ravel()))}" '
            middle = "" if cell is None else ":move_mask:L:1:tags:I:1"
            pbc = "F F F" if cell is None else "T T T"
            energy = float(-5.0 * n + rng.normal())
            columns = f"species:S:1:pos:R:3{middle}:forces:R:3"
            lines = [str(n), f'{lattice}Properties={columns} energy={energy:.8f} pbc="{pbc}"']
            for z, r, f in zip(numbers, positions, forces, strict=True):
                at = f"{chemical_symbols[z]:2s} {r[0]:15.8f} {r[1]:15.8f} {r[2]:15.8f}"
                at += "" if cell is None else f" {'F' if r[2] < 4 else 'T'} {0 if r[2] < 4 else 1}"
                lines.append(f"{at} {f[0]:15.8f} {f[1]:15.8f} {f[2]:15.8f}")
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
