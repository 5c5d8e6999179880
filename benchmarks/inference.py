"""Time and memory of energy, forces and stress at inference, by every way, and of neighbour lists.

    OMP_NUM_THREADS=1 python benchmarks/inference.py [--widths 128 256 1024] [--repeats 5] [--out FILE]

Rounds go through all ways in turn, and the least CPU-seconds of each count: on a machine with other work the
ratios hold where times do not. The reference is the plain, PyG-style form with autograd. Memory is the most
bytes alive during a call beyond those at its start. Efficiency is the rate of the products that a way needs,
as if nothing else took time, over one product's alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from messages import (  # type: ignore[import-not-found]  # beside this file when it runs, of no package
    LAYERS,
    cpu_seconds,
    make_batch,
    make_model,
    make_systems,
    peak_bytes,
    product_seconds,
)

from equipot.model.batch import SystemBatch, build_graphs
from equipot.model.inference import FrozenPotential
from equipot.model.kernels import available, kernel_status, pure_torch
from equipot.model.skin import SkinnedNeighbors, follow_all

CUTOFF = 5.0


def ways_of(width: int, batch: SystemBatch) -> dict[str, Callable[[], object]]:
    """Each way's call; the same weights for all."""

    def by_autograd(form: str, forces: str) -> Callable[[], object]:
        model = make_model(width, form, forces, batch).eval().requires_grad_(False)

        def call() -> object:
            with pure_torch():
                return model(batch)

        return call

    calls = {
        "plain, autograd": by_autograd("plain", "conservative"),
        "split, autograd": by_autograd("split", "conservative"),
        "plain, direct forces": by_autograd("plain", "direct"),
    }
    names = ["analytic", "compiled"] if available() else ["analytic"]
    for way in names:
        model = make_model(width, "split", "conservative", batch)
        frozen = FrozenPotential(model, way=way)  # type: ignore[arg-type]
        calls[f"{way}, forces"] = partial(frozen, batch)
        calls[f"{way}, forces and stress"] = partial(frozen, batch, stress=True)
        calls[f"{way}, energy"] = partial(frozen, batch, forces=False)
        calls[f"{way}, one by one"] = partial(one_by_one, frozen, batch)
    direct = FrozenPotential(make_model(width, "split", "direct", batch))
    calls[f"{direct.way}, direct forces"] = partial(direct, batch)
    return calls


def one_by_one(frozen: FrozenPotential, batch: SystemBatch) -> list[object]:
    """Every structure alone, as a library's products need it for bits that do not depend on the batch."""
    return [frozen(one) for one in batch.alone()]


def compare(width: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per way."""
    batch = make_batch(args.systems, args.atoms, torch.float32)
    calls = ways_of(width, batch)
    memory = {name: peak_bytes(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    product = []
    for _ in range(args.repeats):
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
        product.append(product_seconds(batch.n_edges, width, torch.float32))
    plain = min(times["plain, autograd"])
    # Two products on every edge and layer; on atoms ten a layer, but four in the first.
    on_atoms = (10 * LAYERS - 6) * batch.n_atoms / batch.n_edges
    needed = (2 * LAYERS + on_atoms) * min(product)
    return [
        {
            "width": width,
            "edges": batch.n_edges,
            "way": name,
            "cpu_ms": round(1e3 * min(times[name]), 2),
            "time_ratio": round(min(times[name]) / plain, 3),
            "memory_mb": round(memory[name] / 1e6, 1),
            "memory_ratio": round(memory[name] / memory["plain, autograd"], 3),
            "gemm_efficiency": round(needed / min(times[name]), 2) if name.endswith(", forces") else None,
        }
        for name in calls
    ]


def neighbours(args: argparse.Namespace) -> dict[str, Any]:
    """Neighbour lists of 64 molecules over their energies and forces at width 256, built and with a skin."""
    systems = make_systems(64, args.atoms)
    batch = make_batch(64, args.atoms, torch.float32)
    frozen = FrozenPotential(make_model(256, "split", "conservative", batch))
    skinned, rng = [SkinnedNeighbors(CUTOFF) for _ in systems], np.random.default_rng(0)
    calls: dict[str, Callable[[], object]] = {
        "compute": lambda: frozen(batch),
        "build": lambda: build_graphs(systems, CUTOFF),
        "skin": lambda: follow_all(systems, skinned),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(args.repeats, 5)):
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
        for system in systems:
            system.positions[:] += rng.normal(0.0, 0.01, system.positions.shape)
    least = {name: min(values) for name, values in times.items()}
    return {
        "molecules": 64,
        "atoms": args.atoms,
        "width": 256,
        "way": frozen.way,
        "energy_and_forces_ms": round(1e3 * least["compute"], 2),
        "built_over_energy_and_forces": round(least["build"] / least["compute"], 4),
        "with_skin_over_energy_and_forces": round(least["skin"] / least["compute"], 4),
    }


def main() -> None:
    """Prints the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 1024])
    parser.add_argument("--systems", type=int, default=16)
    parser.add_argument("--atoms", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--machine", help="its class and load, for the report")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width in args.widths:
        for row in compare(width, args):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    report = {
        "command": f"python benchmarks/inference.py --widths {' '.join(map(str, args.widths))} "
        f"--systems {args.systems} --atoms {args.atoms} --repeats {args.repeats}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": args.machine or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": "compiled" if available() else kernel_status(),
        "threads": 1,
        "torch": torch.__version__,
        "neighbours": neighbours(args),
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
