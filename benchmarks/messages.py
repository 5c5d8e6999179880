"""Time and memory of a step in each form of the message function, against the plain one, in one process.

    python benchmarks/messages.py [--widths 256 1024] [--only "fast, compiled"] [--repeats 5] [--out FILE]

Rounds go through all variants in turn, and the least CPU-seconds of each count: on a machine with other
work the ratios hold where times do not. Activations are the most bytes alive during a step beyond those
at its start, with the buffers of the parameters' gradients already there. Efficiency is the rate of the
step's matrix products on edges and atoms, as if nothing else took time, over that of one product alone; the
products' own ratio is the time they would take at that rate over plain's: no order of evaluation with as
many products takes less. Narrow widths take little time, so they get twice the rounds.
Rows in bf16 run under autocast and are compared with plain in float32; without a processor that multiplies
bf16 they are left out. A goal is met when the time, or the activations, are at most that share of plain's.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipot.model.batch import System, SystemBatch, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.kernels import available, kernel_status, pure_torch
from equipot.model.potential import Potential, Prediction
from equipot.model.references import References


class Variant(NamedTuple):
    """What a row is about."""

    form: str
    compiled: bool
    bf16: bool = False


VARIANTS = {
    "plain": Variant("plain", compiled=False),
    "split": Variant("split", compiled=False),
    "fast": Variant("fast", compiled=False),
    "balanced": Variant("balanced", compiled=False),
    "lean": Variant("lean", compiled=False),
    "fast, compiled": Variant("fast", compiled=True),
    "balanced, compiled": Variant("balanced", compiled=True),
    "lean, compiled": Variant("lean", compiled=True),
    "fast, bf16": Variant("fast", compiled=False, bf16=True),
    "fast, compiled, bf16": Variant("fast", compiled=True, bf16=True),
}
LAYERS = 3

# Shares of plain: time at widths 256 and 1024, activations at both.
GOALS: dict[tuple[str, str], tuple[float, float, float | None]] = {
    ("direct", "fast"): (0.50, 0.40, 0.25),
    ("direct", "lean"): (0.60, 0.48, 0.06),
    ("direct", "fast, compiled"): (0.32, 0.33, 0.22),
    ("direct", "lean, compiled"): (0.40, 0.40, 0.05),
    ("direct", "fast, bf16"): (0.35, 0.22, None),
    ("direct", "fast, compiled, bf16"): (0.30, 0.20, None),
    ("conservative", "fast"): (0.60, 0.45, 0.25),
    ("conservative", "lean"): (0.90, 0.62, 0.06),
    ("conservative", "fast, compiled"): (0.30, 0.32, 0.22),
    ("conservative", "lean, compiled"): (0.40, 0.42, 0.10),
    ("conservative", "balanced, compiled"): (0.40, 0.42, 0.10),
    ("conservative", "fast, bf16"): (0.35, 0.22, None),
    ("conservative", "fast, compiled, bf16"): (0.30, 0.20, None),
}

# Products (E, H) × (H, H) per layer of one step: forward, gradients by inputs, by weights, and second order.
# The plain form's first product counts twice, as its rows are twice as long.
EDGE_PRODUCTS = {
    "direct": {"plain": 9, "split": 3, "fast": 3, "balanced": 3, "lean": 4},
    "conservative": {"plain": 18, "split": 6, "fast": 6, "balanced": 8, "lean": 11},
    "inference": {"plain": 6, "split": 2, "fast": 2, "balanced": 2, "lean": 3},
}
# The plain form's direct head multiplies on edges once, with rows twice as long.
HEAD_PRODUCTS = {"direct": 6, "conservative": 0, "inference": 0}
# Products (N, H) × (H, H): five per layer and pass, of which the plain form does two on edges.
ATOM_PASSES = {"direct": 3, "conservative": 6, "inference": 2}
# The first layer's features do not depend on positions: passes by those leave out what reads them.
LEFT_OUT_PASSES = {"direct": 0, "conservative": 3, "inference": 1}


def make_systems(n_systems: int, n_atoms: int) -> list[System]:
    """Clusters of atoms at a molecule's density: about 19 neighbours within 5 Å for 20 atoms."""
    rng = np.random.default_rng(0)
    systems = []
    for _ in range(n_systems):
        # A jittered grid has no two atoms on one spot.
        side = int(np.ceil(n_atoms ** (1 / 3)))
        grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:n_atoms]
        positions = 1.7 * grid + rng.uniform(-0.3, 0.3, (n_atoms, 3))
        numbers = rng.choice([1, 6, 7, 8], n_atoms)
        systems.append(System(numbers, positions, np.zeros((3, 3)), np.zeros(3, dtype=bool)))
    return systems


def make_batch(n_systems: int, n_atoms: int, dtype: torch.dtype) -> SystemBatch:
    """Such clusters with their edges."""
    return collate([build_graph(system, 5.0) for system in make_systems(n_systems, n_atoms)], dtype=dtype)


def make_model(width: int, form: str, forces: str, batch: SystemBatch) -> Potential:
    """The same weights whatever the form."""
    config = ModelConfig(
        width=width,
        layers=LAYERS,
        forces=forces,  # type: ignore[arg-type]
        messages=form,  # type: ignore[arg-type]
        elements=(1, 6, 7, 8),
        levels_of_theory=("none",),
        mean_neighbors=batch.n_edges / batch.n_atoms,
    )
    torch.manual_seed(0)
    references = References(energy=np.zeros((1, 4)), scale=np.ones(1))
    return Potential(config, references).to(batch.positions.dtype)


def make_step(
    model: Potential, batch: SystemBatch, task: str, *, compiled: bool, bf16: bool = False
) -> Callable[[], Tensor]:
    """One training step up to the gradients, or one prediction."""
    target = torch.randn_like(batch.positions)

    def train() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction: Prediction = model(batch)
        assert prediction.forces is not None
        loss = prediction.energy.square().mean() + (prediction.forces - target).square().mean()
        model.zero_grad(set_to_none=False)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def predict() -> Tensor:
        prediction: Prediction = model(batch)
        assert prediction.forces is not None
        return prediction.forces

    model.train(task != "inference")
    step = predict if task == "inference" else train

    def in_pure_torch() -> Tensor:
        with pure_torch():
            return step()

    return step if compiled else in_pure_torch


def peak_bytes(step: Callable[[], Tensor]) -> int:
    """The most bytes alive during a step beyond those at its start, as the allocator saw it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(max(np.cumsum([0, *changes])))


def cpu_seconds(step: Callable[[], Tensor]) -> float:
    """CPU-seconds of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def product_seconds(edges: int, width: int, dtype: torch.dtype) -> float:
    """CPU-seconds of one product (E, H) × (H, H), by the quickest library and cut of the rows."""
    weight = torch.randn(width, width).to(dtype)
    best = float("inf")
    for rows in (256, 512, 1024):
        x, out = torch.randn(rows, width).to(dtype), torch.empty(rows, width, dtype=dtype)
        products: list[Callable[[], object]] = [partial(torch.mm, x, weight, out=out)]
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            products.append(partial(torch.ops.mkldnn._linear_pointwise, x, weight, None, "none", [], ""))
        count = max(3, int(2e9 / (2 * rows * width * width)))
        for product in products:
            product()
            start = time.process_time()
            for _ in range(count):
                product()
            best = min(best, (time.process_time() - start) / count / rows)
    return best * edges


def has_bf16() -> bool:
    """Whether the processor multiplies bf16, and not this program for it."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compare(width: int, task: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant."""
    batch = make_batch(args.systems, args.atoms, torch.float32)
    forces = "direct" if task == "direct" else "conservative"
    variants = {
        name: variant
        for name, variant in VARIANTS.items()
        # First derivatives have no use for more than one edge tensor: there, balanced is fast.
        if not (task == "direct" and variant.form == "balanced")
        and (not args.only or name in args.only or name == "plain")
        and (available() or not variant.compiled)
        and ((has_bf16() and task != "inference") or not variant.bf16)
    }
    steps = {
        name: make_step(make_model(width, form, forces, batch), batch, task, compiled=compiled, bf16=bf16)
        for name, (form, compiled, bf16) in variants.items()
    }
    memory = {}
    for name, step in steps.items():
        step()
        memory[name] = peak_bytes(step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    product: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(args.repeats * (2 if width <= 256 else 1)):
        for name, step in steps.items():
            times[name].append(cpu_seconds(step))
        for bf16, found in product.items():
            found.append(
                product_seconds(batch.n_edges, width, torch.bfloat16 if bf16 else torch.float32)
                if has_bf16() or not bf16
                else 0.0
            )
    rows = []
    for name, (form, _, bf16) in variants.items():
        seconds = min(times[name])
        on_atoms = (3 if form == "plain" else 5) * ATOM_PASSES[task] * LAYERS
        on_atoms -= (1 if form == "plain" else 3) * LEFT_OUT_PASSES[task]
        products = float(EDGE_PRODUCTS[task][form] * LAYERS) + HEAD_PRODUCTS[task] * (form == "plain")
        products += on_atoms * batch.n_atoms / batch.n_edges
        row = {
            "task": task,
            "width": width,
            "edges": batch.n_edges,
            "atoms": batch.n_atoms,
            "variant": name,
            "cpu_ms": round(1e3 * seconds, 1),
            "time_ratio": round(seconds / min(times["plain"]), 3),
            "activations_mb": round(memory[name] / 1e6, 1),
            "activations_ratio": round(memory[name] / memory["plain"], 3),
            "gemm_efficiency": round(products * min(product[bf16]) / seconds, 2),
            "products_ratio": round(products * min(product[bf16]) / min(times["plain"]), 3),
        }
        rows.append(row | goals_of(row))
    return rows


def goals_of(row: dict[str, Any]) -> dict[str, Any]:
    """The row's goals, and whether they are met."""
    goals = GOALS.get((row["task"], row["variant"]))
    if goals is None or row["width"] not in (256, 1024):
        return {}
    time_goal, activations_goal = goals[0 if row["width"] == 256 else 1], goals[2]
    found = {"time_goal": time_goal, "time_met": row["time_ratio"] <= time_goal}
    if activations_goal is None:
        return found
    return found | {
        "activations_goal": activations_goal,
        "activations_met": row["activations_ratio"] <= activations_goal,
    }


def main() -> None:
    """Prints the report as JSON, one row per variant, width and task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument(
        "--tasks", nargs="+", default=["direct", "conservative"], help="and inference; what a step does"
    )
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="these beside plain; default all")
    parser.add_argument("--systems", type=int, default=16)
    parser.add_argument("--atoms", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", help="its class and load, for the report")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for width in args.widths:
        for task in args.tasks:
            for row in compare(width, task, args):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
    report = {
        "command": "python benchmarks/messages.py "
        + f"--widths {' '.join(map(str, args.widths))} --tasks {' '.join(args.tasks)} "
        + (f"--only {' '.join(map(repr, args.only))} " if args.only else "")
        + f"--systems {args.systems} --atoms {args.atoms} --repeats {args.repeats} --threads {args.threads}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": args.machine or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": "compiled" if available() else kernel_status(),
        "threads": args.threads,
        "bf16": "in hardware" if has_bf16() else "not in hardware, so its rows are left out",
        "torch": torch.__version__,
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
