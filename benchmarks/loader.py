"""What the loader adds to a training step of the demo's model, as JSON.

    python benchmarks/loader.py [--data ../shared/data] [--pairs 200]

Each round trains on one batch three times: kept ready in memory, made by the loader from a store, and from
memory once more, which adds nothing and so tells what the machine's noise is. In the store's turn nothing
is kept between batches (`cold`, as in a first epoch) or edge lists are (`kept`, as later). The order
changes from round to round; one thread of torch, as each of two ranks on two cores has. CPU time is of the
whole process, the loader's threads included. The parts of a batch are measured one by one, and beside them
the ways to get at edges that were considered. The demo's data is always measured; of the samples of other
structures those that lie under --data.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from equipot.train.assemble import Parts, assemble
from equipot.train.columns import Column
from equipot.train.dataset import Batch, Dataset, Sizes
from equipot.train.divide import divide
from equipot.train.edge_lists import EdgeList, edge_lists, edges_of, join
from equipot.train.engine import start_world
from equipot.train.launch import free_port, rank_environment
from equipot.train.loader import Loader
from equipot.train.loss import Counts
from equipot.train.prepare import prepare
from equipot.train.recipe import load_recipe
from equipot.train.run_directory import RunDirectory
from equipot.train.sampler import Sampler
from equipot.train.store import Store
from equipot.train.structures import flat_index
from equipot.train.world import World

ROOT = Path(__file__).parents[1]
LEVEL = ["--level-of-theory", "PBE/def2-SVP", "--licence", "MIT", "--group-by", "block:10"]
# name: words of `equipot data import`, and structures of a batch
CASES: dict[str, tuple[list[str], int]] = {
    "demo": ([str(ROOT / "examples/data/ethanol-methanol.extxyz"), *LEVEL], 32),
    "oc20": (["oc20", "{data}/oc20/s2ef_train_sample"], 8),
    "mptrj": (["mptrj", "{data}/mptrj/MPtrj_2022.9_sample.json"], 16),
    "qm7x": (["qm7x", "{data}/qm7x/1000.hdf5"], 8),
}
BATCHES = 10
T = TypeVar("T")


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--pairs", type=int, default=200, help="of steps; a quarter for larger structures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(rank_environment(0, 1, free_port()))
    world = start_world()
    cases, stores = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (words, structures) in CASES.items():
            source = [word.format(data=options.data) for word in words]
            if name != "demo" and not Path(source[-1]).exists():
                continue
            stores[name] = store = imported(source, Path(folder) / name)
            parts = assembled(store, structures, Path(folder) / f"{name}-run", world)
            pairs = options.pairs if name == "demo" else max(5, options.pairs // 4)
            cases[name] = measure(parts, store, world, pairs)
        report: dict[str, object] = {
            "what": "loader",
            "command": f"python benchmarks/loader.py --pairs {options.pairs}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "model": "examples/demo.toml",
            "cases": cases,
            "order_of_40_million": order_of_many(),
        }
        if {"qm7x", "oc20"} <= set(stores):
            report["dearest_rank_over_mean"] = balance(stores["qm7x"], stores["oc20"])
    print(json.dumps(report, indent=1))


def imported(words: Sequence[str], out: Path) -> Store:
    """A store made as a user makes it."""
    command = [sys.executable, "-m", "equipot.cli", "data", "import", *words, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Store.open(out)


def assembled(store: Store, structures: int, out: Path, world: World) -> Parts:
    """The parts of a run of the demo's recipe on that store, everything of it for training."""
    changes = [f'data.stores=["{store.path}"]', f"batch.structures={structures}", "data.fractions=[1,0,0]"]
    recipe, run = load_recipe(ROOT / "examples" / "demo.toml", changes), RunDirectory(out)
    prepare(recipe, run, resume=False)
    return assemble(recipe, run, world)


def measure(parts: Parts, store: Store, world: World, pairs: int) -> dict[str, object]:
    """One kind of structures: what the loader adds, and where its time goes."""
    sampler, config = parts.sampler, parts.potential.config
    cold = Dataset([store], config)
    sizes = [len(batch.keys) for batch in sampler.micro_batches(0, rank=0, ranks=1, accumulation=1)]
    ready = [
        cold.batch(sampler.micro_batches(step, rank=0, ranks=1, accumulation=1)[0].keys)
        for step in range(min(BATCHES, sampler.steps_per_epoch))
    ]
    kept = Dataset([store], config, cache_mib=512)
    for step in range(sampler.steps_per_epoch):
        for part in sampler.micro_batches(step, rank=0, ranks=1, accumulation=1):
            kept.batch(part.keys)
    return {
        "structures": sizes[0],
        "atoms": round(statistics.mean(batch.systems.n_atoms for batch in ready)),
        "edges": round(statistics.mean(batch.systems.n_edges for batch in ready)),
        "cold": compare(parts, cold, ready, world, pairs, workers=0),
        "kept": compare(parts, kept, ready, world, pairs, workers=0),
        "cold_by_a_thread": compare(parts, cold, ready, world, pairs, workers=1),
        "loader_cpu_ms": loader_parts(parts, cold, kept, ready),
        "edges_cpu_ms": ways_to_edges(store, config.cutoff, ready),
    }


def compare(
    parts: Parts, dataset: Dataset, ready: list[Batch], world: World, pairs: int, *, workers: int
) -> dict[str, float]:
    """Steps on batches from memory and from the loader, in turn."""
    arms = ("memory", "loader", "memory again")  # what the last adds is how finely this machine can tell
    cpu: dict[str, list[float]] = {arm: [] for arm in arms}
    wall: dict[str, list[float]] = {arm: [] for arm in arms}
    waits = []
    period = len(ready)
    with Loader(
        dataset,
        _Cycle(parts.sampler, period),
        world,
        accumulation=1,
        first_step=0,
        steps=pairs,
        workers=workers,
    ) as loader:
        steps = iter(loader)
        for number in range(pairs):
            for arm in arms[number % 3 :] + arms[: number % 3]:
                began, began_cpu = time.perf_counter(), time.process_time()
                batch = next(steps).batches[0] if arm == "loader" else ready[number % period]
                if arm == "loader":
                    waits.append(time.perf_counter() - began)
                train(parts, batch)
                cpu[arm].append(time.process_time() - began_cpu)
                wall[arm].append(time.perf_counter() - began)

    def best(seconds: list[float]) -> float:
        # of each batch the quickest step: what other processes take from a step is not the loader's
        return sum(min(seconds[k::period]) for k in range(min(period, pairs)))

    def added(times: dict[str, list[float]], arm: str) -> float:
        return round(100 * (best(times[arm]) / best(times["memory"]) - 1), 2)

    return {
        "step_cpu_ms": round(1e3 * best(cpu["memory"]) / min(period, pairs), 3),
        "added_cpu_percent": added(cpu, "loader"),
        "added_wall_percent": added(wall, "loader"),
        "added_by_nothing_cpu_percent": added(cpu, "memory again"),
        "added_by_nothing_wall_percent": added(wall, "memory again"),
        "wait_ms": milliseconds(waits),
    }


class _Cycle(Sampler):
    """The first steps of a sampler, again and again."""

    def __init__(self, sampler: Sampler, period: int) -> None:
        self.__dict__.update(sampler.__dict__)
        self._period = period

    def global_batch(self, step: int) -> NDArray[np.int64]:
        return super().global_batch(step % self._period)


def train(parts: Parts, batch: Batch) -> None:
    """One step as the trainer does it."""
    counts = Counts(*Counts.of(batch.targets))
    parts.engine.module.train()
    parts.engine.forward_backward(batch.systems, batch.targets, counts, 1, last=True)
    parts.engine.step(1e-5)
    parts.ema.update(1)


def loader_parts(parts: Parts, cold: Dataset, kept: Dataset, ready: list[Batch]) -> dict[str, float]:
    """CPU time of each part of making a batch, one by one."""
    keys = [batch.keys for batch in ready]
    read = [cold._read(some) for some in keys]
    both = list(zip(keys, read, strict=True))
    whole = cpu_ms(cold.batch, keys)
    times = {
        "order": cpu_ms(lambda k: parts.sampler.micro_batches(k, rank=0, ranks=1, accumulation=1), range(20)),
        "read": cpu_ms(cold._read, keys),
        "neighbours": cpu_ms(lambda pair: cold._edges(*pair), both),
    }
    times["collate"] = max(0.0, whole - times["read"] - times["neighbours"])
    times["batch"] = whole
    times["batch_kept"] = cpu_ms(kept.batch, keys)
    times["to_another_process"] = cpu_ms(carried, ready)
    return {name: round(value, 3) for name, value in times.items()}


def carried(batch: Batch) -> object:
    """A batch through a pipe, at the least: pickled and unpickled."""
    return pickle.loads(pickle.dumps(batch, protocol=5))


def ways_to_edges(store: Store, cutoff: float, ready: list[Batch]) -> dict[str, float]:
    """CPU time of a batch's edges computed, kept in memory, and read from a mapped file beside the store."""
    structures = [store.read(batch.keys[:, 1]) for batch in ready]
    lists = [edge_lists(some, cutoff) for some in structures]
    n_edges = sum(len(edges.senders) for some in lists for edges in some)
    n_structures = sum(map(len, lists))
    mapped = MappedEdges(store, cutoff)
    times = {
        "computed": cpu_ms(lambda some: edges_of(some, cutoff), structures),
        "kept_in_memory": cpu_ms(lambda k: join(lists[k], structures[k].n_atoms), range(len(structures))),
        "read_from_mapped_file": cpu_ms(lambda batch: mapped.read(batch.keys[:, 1]), ready),
        "file_bytes_per_structure": mapped.nbytes / len(store),
        "store_bytes_per_structure": sum(path.stat().st_size for path in store.path.glob("shards/*/*.npy"))
        / len(store),
        "bytes_per_edge": sum(edges.nbytes for some in lists for edges in some) / max(1, n_edges),
        "edges_per_structure": n_edges / n_structures,
    }
    return {name: round(value, 3) for name, value in times.items()}


class MappedEdges:
    """Edge lists of a whole store in flat files, the way that was not taken."""

    def __init__(self, store: Store, cutoff: float) -> None:
        lists: list[EdgeList] = []
        atoms = []
        for at in range(0, len(store), 64):
            structures = store.read(np.arange(at, min(at + 64, len(store))))
            lists += edge_lists(structures, cutoff)
            atoms.append(structures.n_atoms)
        self._atoms = np.concatenate(atoms)
        self._edges = np.array([len(edges.senders) for edges in lists])
        self._folder = store.path / "edges"
        self._folder.mkdir()
        flat = {
            "senders": np.concatenate([edges.senders for edges in lists]),
            "degrees": np.concatenate([edges.degrees for edges in lists]),
            "shifts": np.concatenate(
                [np.zeros((0, 3), np.int8)]
                + [edges.cell_shifts for edges in lists if edges.cell_shifts is not None]
            ),
        }
        self.nbytes = sum(array.nbytes for array in flat.values()) + 16 * len(store)
        self._maps = {}
        for name, array in flat.items():
            np.save(self._folder / f"{name}.npy", array)
            self._maps[name] = np.asarray(
                np.load(self._folder / f"{name}.npy", mmap_mode="r" if len(array) else None)
            )
        self._first_atom = np.cumsum(self._atoms) - self._atoms
        self._first_edge = np.cumsum(self._edges) - self._edges

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Senders, receivers and shifts of these structures, joined."""
        atoms = flat_index(self._first_atom[indices], self._atoms[indices])
        edges = flat_index(self._first_edge[indices], self._edges[indices])
        n = self._atoms[indices]
        senders = np.repeat(np.cumsum(n) - n, self._edges[indices]) + self._maps["senders"][edges]
        receivers = np.repeat(np.arange(len(atoms)), self._maps["degrees"][atoms])
        shifts = self._maps["shifts"]
        return senders, receivers, shifts[edges] if len(shifts) else np.zeros((len(edges), 3), np.int8)


def order_of_many() -> dict[str, float]:
    """The first step of an epoch of 40 million structures: time, and memory besides what is mapped."""

    class Keys:
        def __len__(self) -> int:
            return 40_000_000

        def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint32]:
            return np.stack([rows % 5, rows], axis=1).astype(np.uint32)

    class Costs(Keys):
        def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint32]:
            return (rows % 977).astype(np.uint32)

    keys: Column = Keys()
    costs: Column = Costs()
    began = time.process_time()
    sampler = Sampler(keys, costs, structures=4096, seed=0)
    sampler.micro_batches(777, rank=3, ranks=8, accumulation=1)
    return {"first_step_cpu_ms": round(1e3 * (time.process_time() - began), 1)}


def balance(molecules: Store, slabs: Store) -> list[dict[str, float]]:
    """Over an epoch of as many molecules as slabs: sum of each step's dearest rank over that of the means."""
    rng = np.random.default_rng(0)
    of_slabs = all_costs(slabs)
    costs = np.concatenate([rng.choice(all_costs(molecules), len(of_slabs)), of_slabs])
    found = []
    for structures in (32, 64, 256):
        for ranks in (1, 2, 3, 8):
            order = rng.permutation(len(costs))
            dearest = mean = least = 0.0
            for at in range(0, len(costs) - structures + 1, structures):
                some = costs[order[at : at + structures]]
                loads = [some[part].sum() for part in divide(some, ranks)]
                dearest, mean = dearest + max(loads), mean + sum(loads) / ranks
                least += max(sum(loads) / ranks, some.max())
            row = {"structures": structures, "ranks": ranks, "found": dearest / mean, "bound": least / mean}
            found.append({name: round(value, 4) for name, value in row.items()})
    return found


def all_costs(store: Store) -> NDArray[np.int64]:
    """Of every structure."""
    keys = np.stack([np.zeros(len(store), np.int64), np.arange(len(store))], axis=1)
    return Sizes.of([store], 5.0, progress=False).costs(keys)


def cpu_ms(work: Callable[[T], object], inputs: Sequence[T]) -> float:
    """CPU time of one call, the best of five rounds over the inputs."""
    return 1e3 * min(_rounds(work, inputs))


def _rounds(work: Callable[[T], object], inputs: Sequence[T]) -> Iterator[float]:
    for _ in range(5):
        began = time.thread_time()
        for value in inputs:
            work(value)
        yield (time.thread_time() - began) / len(inputs)


def milliseconds(seconds: Sequence[float]) -> float:
    """The median."""
    return round(1e3 * statistics.median(seconds), 3)


if __name__ == "__main__":
    main()
