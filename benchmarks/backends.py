"""Random access to structures where a store's arrays may lie, against the memory map, in one process.

    OMP_NUM_THREADS=1 python benchmarks/backends.py [--store STORE] [--rounds 5] [--out FILE]

The store, by default the demo's molecules, is repeated to --megabytes. Rounds go
through all ways in turn, each reading the same batches of structures drawn at random, and the least seconds
of each count: on a machine with other work the ratios hold where times do not. Ray's nodes, two of them, are
real ones on this machine: a network between them is not measured, and they share its cores with the reader.
They are measured with the store within their memory, and with one that is beyond it by --beyond times, most
of which lies on their disks. Needs the extras [adios] and [ray].
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from equipot.train.arrays import OFFSETS, append_rows, per_atom, per_structure
from equipot.train.convert import to_bp
from equipot.train.importer import ImportOptions, import_files
from equipot.train.store import Store
from equipot.train.structures import NAMES

ROOT = Path(__file__).parents[1]
BATCH = 32
REFERENCE = "npy, batches"
NODE_BYTES = 80 * 2**20  # Ray takes no less
Read = Callable[[np.ndarray[Any, np.dtype[np.int64]]], object]
Ways = dict[str, tuple[Store, Read]]


def demo_store(folder: Path) -> Path:
    """The demo's molecules, imported."""
    options = ImportOptions(level_of_theory="PBE/def2-SVP", licence="see examples/data", name="demo")
    import_files([ROOT / "examples" / "data" / "ethanol-methanol.extxyz"], folder / "demo", options)
    return folder / "demo"


def repeated(store: Path, out: Path, size: float) -> Path:
    """The store so many times over, in one shard, that its arrays take `size` bytes."""
    opened = Store.open(store)
    whole = list(opened.chunks())
    counts = np.concatenate([counts for _, counts, _ in whole])
    arrays = {name: np.concatenate([arrays[name] for _, _, arrays in whole]) for name in whole[0][2]}
    times = max(1, round(size / sum(array.nbytes for array in arrays.values())))
    folder = out / "shards" / "00000"
    folder.mkdir(parents=True)
    offsets = np.concatenate([[0], np.cumsum(np.tile(counts, times))])
    append_rows(folder / "atom_offsets.npy", OFFSETS, 0, offsets)
    columns = opened.manifest.columns
    for name, field in (per_structure(columns) | per_atom(columns)).items():
        append_rows(folder / f"{name}.npy", field, 0, np.concatenate([arrays[name]] * times))
    body = opened.manifest.to_json()
    body["structures"] *= times
    body["atoms"] *= times
    body["shards"] = [{"name": "00000", "structures": body["structures"], "atoms": body["atoms"]}]
    body["digest"] = f"repeated:{times}:{body['digest']}"
    (out / "manifest.json").write_text(json.dumps(body))
    return out


def one_by_one(store: Store) -> Read:
    """As `equipot data frames` and a user's script read."""
    return lambda indices: [(store.system(i), store.labels(i)) for i in indices]


def anonymous_mb() -> float:
    """Memory of this process that is its own, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def compare(ways: Ways, n: int, *, rounds: int, batches: int) -> list[dict[str, Any]]:
    """Least seconds of each way, wall clock and this process's own CPU, for the same structures."""
    wall = dict.fromkeys(ways, float("inf"))
    cpu, memory = dict(wall), dict.fromkeys(ways, 0.0)
    for turn in range(rounds):
        drawn = np.random.default_rng(turn).integers(0, n, (batches, BATCH))
        for name, (_, read) in ways.items():
            before = anonymous_mb()
            began, own = time.perf_counter(), time.process_time()
            for indices in drawn:
                read(indices)
            wall[name] = min(wall[name], time.perf_counter() - began)
            cpu[name] = min(cpu[name], time.process_time() - own)
            memory[name] = max(memory[name], anonymous_mb() - before)
    return [
        {
            "way": name,
            "structures_per_s": round(batches * BATCH / wall[name]),
            "ratio_to_npy": round(wall[REFERENCE] / wall[name], 4),
            "cpu_us_per_structure": round(cpu[name] / batches / BATCH * 1e6, 1),
            "memory_grown_mb": round(memory[name], 1),
        }
        for name in ways
    ]


def check(ways: Ways, reference: Store) -> None:
    """What is compared must give the same, to the last bit."""
    indices = np.random.default_rng(99).integers(0, len(reference), 2 * BATCH)
    expected = reference.read(indices)
    for name, (store, _) in ways.items():
        found = store.read(indices)
        for field in NAMES:
            np.testing.assert_array_equal(getattr(found, field), getattr(expected, field), err_msg=name)


def measure(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Within Ray's memory, and beyond it."""
    source = options.store or demo_store(home)
    reports = {}
    for title, size, batches in (
        ("within", options.megabytes * 2**20, 40),
        ("beyond", options.beyond * 2 * NODE_BYTES, 20),
    ):
        folder = repeated(source, home / title, size)
        npy = Store.open(folder)
        ways: Ways = {
            REFERENCE: (npy, npy.read),
            "npy, one by one": (npy, one_by_one(npy)),
        }
        if title == "within":
            to_bp(npy, home / "a.bp", on_progress=lambda _: None)
            bp = Store.open(home / "a.bp")
            ways |= {"bp, batches": (bp, bp.read), "bp, one by one": (bp, one_by_one(bp))}
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": NODE_BYTES, "include_dashboard": False},
        )
        cluster.add_node(num_cpus=1, object_store_memory=NODE_BYTES)
        os.environ["RAY_ADDRESS"] = cluster.address
        try:
            held = Store.open(f"ray:{folder}")
            ways["ray, batches"] = (held, held.read)
            if title == "within":
                ways["ray, one by one"] = (held, one_by_one(held))
            check(ways, npy)
            for start in range(0, len(npy), len(npy) // 200):  # until every block is held
                held.read([start])
            rows = compare(ways, len(npy), rounds=options.rounds, batches=batches)
        finally:
            ray.shutdown()
            cluster.shutdown()
        reports[title] = {
            "store_mb": round(sum(path.stat().st_size for path in folder.rglob("*.npy")) / 2**20),
            "ray_memory_mb": 2 * NODE_BYTES // 2**20,
            "structures": len(npy),
            "atoms_per_structure": round(float(npy.n_atoms.mean()), 1),
            "rows": rows,
        }
    return reports


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("Model name")), "unknown")


def main() -> int:
    """Measure and print, or write, the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path)
    parser.add_argument("--megabytes", type=float, default=40.0)
    parser.add_argument("--beyond", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        reports = measure(options, Path(home))
    arguments = f"--megabytes {options.megabytes:g} --beyond {options.beyond:g} --rounds {options.rounds}"
    body = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/backends.py {arguments}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "batch": BATCH,
        "ray": ray.__version__,
        "rounds": options.rounds,
        **reports,
    }
    text = json.dumps(body, indent=1, ensure_ascii=False)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
