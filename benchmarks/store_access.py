"""Random access to a store beside ASE's database and pickled LMDB records; and opening 40 million structures.

    python benchmarks/store_access.py            # prints JSON; some 2 minutes, 2 GB of sparse files
    python benchmarks/store_access.py --store S  # the structures of a store of yours

Access: the same structures in the same random order, from the page cache, in rounds in which all ways take
turns; reading one means to have atomic numbers, positions, cell, pbc, energy and forces as arrays. Times are
of the processor. The pickled records are of two kinds: `torch_geometric.data.Data`, as OC20 and OC22 are
published, and plain dictionaries of numpy arrays, the least that a pickle can be.

Opening: a manifest of 40 million structures in 30,000 files, with arrays that are holes of the right size;
each time in a new process, whose growth of resident memory is measured. On a machine that is busy with other
things the seconds on the clock are theirs too; those of the processor are not.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ase
import ase.db
import ase.io
import lmdb
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from numpy.typing import NDArray
from torch_geometric.data import Data

from equipot.train.arrays import OFFSETS, Field, array_bytes, header, per_atom, per_structure
from equipot.train.importer import ImportOptions, import_files
from equipot.train.manifest import Manifest, ShardEntry, SourceEntry, Tally, content_digest, write_json
from equipot.train.storage.memory_map import SHARDS
from equipot.train.storage.opening import MANIFEST
from equipot.train.store import Store
from equipot.train.store_writer import SHARD_ATOMS, SHARD_STRUCTURES

BATCH = 32
REFERENCES = ("ase_db", "lmdb_pickled_pyg", "lmdb_pickled_dict")

_OPEN = """
import json, sys, time
import psutil
from equipot.train.store import Store
process = psutil.Process()
before = process.memory_info().rss
begun, worked = time.perf_counter(), time.process_time()
store = Store.open(sys.argv[1])
seconds, cpu = time.perf_counter() - begun, time.process_time() - worked
growth = process.memory_info().rss - before
print(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": growth, "structures": len(store)}))
"""

Reader = Callable[[NDArray[np.int64]], None]


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, help="use the structures of this store")
    parser.add_argument("--structures", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--opened", type=int, default=40_000_000, help="structures of the manifest")
    parser.add_argument("--files", type=int, default=30_000, help="source files of the manifest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        store = Store.open(options.store or made_store(home, options.structures))
        access = measure_access(home, store, min(len(store), options.structures), options.rounds)
        opening = measure_opening(home / "large", options.opened, options.files, options.rounds)
    report = {
        "what": "store_access",
        "command": " ".join(["python", "benchmarks/store_access.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, "
        f"ASE {ase.__version__}",
        "access": access,
        "opening": opening,
    }
    print(json.dumps(report, indent=1))


def made_store(home: Path, count: int) -> Path:
    """Crystals of the sizes that MPtrj has: 31 atoms on average, some hundreds at most."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(count):
        n = int(np.clip(rng.lognormal(3.0, 0.9), 1, 400))
        atoms = ase.Atoms(rng.integers(1, 90, n), rng.uniform(0, 10, (n, 3)), cell=np.eye(3) * 10, pbc=True)
        atoms.calc = SinglePointCalculator(atoms, energy=float(-5.0 * n), forces=rng.normal(size=(n, 3)))
        frames.append(atoms)
    ase.io.write(home / "frames.extxyz", frames)
    options = ImportOptions(level_of_theory="none", licence="none", name="made", group_by="frame")
    return import_files([home / "frames.extxyz"], home / "store", options).store


def measure_access(home: Path, store: Store, count: int, rounds: int) -> dict[str, object]:
    """Structures a second of each way, and of ours as multiples of the others in the same round."""
    readers = {
        "one_by_one": lambda order: _one_by_one(store, order),
        f"batches_of_{BATCH}": lambda order: _batches(store, order),
        "ase_db": _ase_db(home, store, count),
        "lmdb_pickled_pyg": _pickled(home / "pyg.lmdb", store, count, _as_data),
        "lmdb_pickled_dict": _pickled(home / "dict.lmdb", store, count, _as_dict),
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds):
        order = np.random.default_rng(number).permutation(count)
        turn = list(readers)[number % len(readers) :] + list(readers)[: number % len(readers)]
        for name in turn:
            begun = time.process_time()
            readers[name](order)
            seconds[name].append(time.process_time() - begun)
    ours = [name for name in readers if name not in REFERENCES]
    return {
        "structures": count,
        "atoms_per_structure": round(float(store.n_atoms[:count].mean()), 1),
        "rounds": rounds,
        "structures_per_second": {
            name: round(count / statistics.median(times)) for name, times in seconds.items()
        },
        "times_faster": {
            name: {reference: _ratio(seconds[reference], seconds[name]) for reference in REFERENCES}
            for name in ours
        },
    }


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 1)


def _one_by_one(store: Store, order: NDArray[np.int64]) -> None:
    for i in order.tolist():
        store.system(i)
        store.labels(i)


def _batches(store: Store, order: NDArray[np.int64]) -> None:
    for at in range(0, len(order), BATCH):
        store.read(order[at : at + BATCH])


def _ase_db(home: Path, store: Store, count: int) -> Reader:
    with ase.db.connect(home / "ase.db", type="db") as writing:
        for i in range(count):
            system, labels = store.system(i), store.labels(i)
            atoms = ase.Atoms(system.atomic_numbers, system.positions, cell=system.cell, pbc=system.pbc)
            atoms.calc = SinglePointCalculator(atoms, energy=labels.energy, forces=labels.forces)
            writing.write(atoms)
    database = ase.db.connect(home / "ase.db", type="db")

    def read(order: NDArray[np.int64]) -> None:
        for i in order.tolist():
            row = database.get(i + 1)
            _ = row.numbers, row.positions, row.cell, row.pbc, row.energy, row.forces

    return read


def _pickled(path: Path, store: Store, count: int, record: Callable[[Store, int], object]) -> Reader:
    environment = lmdb.open(str(path), map_size=2**36)
    with environment.begin(write=True) as writing:
        for i in range(count):
            writing.put(str(i).encode(), pickle.dumps(record(store, i), protocol=pickle.HIGHEST_PROTOCOL))

    def read(order: NDArray[np.int64]) -> None:
        with environment.begin() as reading:
            for i in order.tolist():
                found = reading.get(str(i).encode())
                pickle.loads(found or b"")

    return read


def _as_dict(store: Store, i: int) -> object:
    system, labels = store.system(i), store.labels(i)
    return {
        "atomic_numbers": system.atomic_numbers.astype(np.uint8),
        "positions": system.positions,
        "cell": system.cell,
        "pbc": system.pbc,
        "energy": labels.energy,
        "forces": labels.forces,
    }


def _as_data(store: Store, i: int) -> object:
    system, labels = store.system(i), store.labels(i)
    return Data(
        atomic_numbers=torch.from_numpy(system.atomic_numbers),
        pos=torch.from_numpy(system.positions),
        cell=torch.from_numpy(system.cell)[None],
        pbc=torch.from_numpy(system.pbc),
        y=labels.energy,
        force=torch.from_numpy(labels.forces),
    )


def measure_opening(path: Path, structures: int, files: int, rounds: int) -> dict[str, object]:
    """Seconds and growth of memory of opening a store of that size, each time in a new process."""
    write_hollow_store(path, structures, files)
    found = []
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", _OPEN, str(path)], capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout))
    if any(each["structures"] != structures for each in found):
        sys.exit("the store that was opened is not the one that was written")
    return {
        "structures": structures,
        "source_files": files,
        "shards": len(list((path / SHARDS).iterdir())),
        "manifest_bytes": (path / MANIFEST).stat().st_size,
        "rounds": rounds,
        "seconds": round(statistics.median(each["seconds"] for each in found), 3),
        "cpu_seconds": round(statistics.median(each["cpu"] for each in found), 3),
        "seconds_at_most": round(max(each["seconds"] for each in found), 3),
        "memory_growth_mb": round(max(each["bytes"] for each in found) / 1e6, 1),
    }


def write_hollow_store(path: Path, structures: int, files: int, atoms_each: int = 70) -> None:
    """A store as large as a release's, whose arrays are holes: sizes and manifest are as of a real one."""
    columns = ["fingerprint", "name", "fixed", "tags"]
    manifest = Manifest(name="hollow", level_of_theory="none", licence="none", columns=columns)
    each = min(SHARD_STRUCTURES, SHARD_ATOMS // atoms_each)
    for k, start in enumerate(range(0, structures, each)):
        count = min(each, structures - start)
        entry = ShardEntry(name=f"{k:05d}", structures=count, atoms=count * atoms_each)
        manifest.shards.append(entry)
        folder = path / SHARDS / entry.name
        folder.mkdir(parents=True)
        _hole(folder / "atom_offsets.npy", OFFSETS, count + 1)
        for name, field in per_structure(columns).items():
            _hole(folder / f"{name}.npy", field, count)
        for name, field in per_atom(columns).items():
            _hole(folder / f"{name}.npy", field, entry.atoms)
    read, more = divmod(structures, files)
    manifest.sources = [
        SourceEntry(
            file=f"s2ef_train_{k:06d}.extxyz.xz",
            sha256=hashlib.sha256(str(k).encode()).hexdigest(),
            bytes=10**7 + k,
            format="oc20",
            frames_read=read + (k < more) + 3,
            frames_kept=read + (k < more),
        )
        for k in range(files)
    ]
    for reason in ("non-finite label", "duplicate", "force above the limit"):
        examples: list[list[object]] = [
            [k, 17, f"randomID {k}: a sentence on what was wrong"] for k in range(50)
        ]
        manifest.rejected[reason] = Tally(count=files, examples=examples)
    manifest.structures, manifest.atoms = structures, structures * atoms_each
    manifest.with_energy = manifest.with_forces = manifest.periodic = structures
    manifest.elements = {str(z): manifest.atoms // 55 for z in range(1, 56)}
    manifest.charges, manifest.spin_multiplicities = {"0": structures}, {"0": structures}
    manifest.chain = hashlib.sha256(b"hollow").hexdigest()
    manifest.digest = content_digest(manifest.level_of_theory, manifest.chain)
    write_json(path / MANIFEST, manifest.to_json())


def _hole(path: Path, field: Field, rows: int) -> None:
    with path.open("wb") as file:
        file.write(header(field, rows))
        file.truncate(array_bytes(field, rows))


if __name__ == "__main__":
    main()
