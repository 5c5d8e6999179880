"""What activation checkpointing saves and costs with each form of the messages, in one process.

    OMP_NUM_THREADS=1 python benchmarks/checkpointing.py [--width 256] [--rounds 3] [--out FILE]

One training step up to the gradients. Figures are ratios to the plain form without checkpointing; rounds go
through all variants in turn and the least CPU-seconds of each count, so that other work on the machine hardly
matters. Activations are the most bytes alive during a step beyond those at its start, with the buffers of the
parameters' gradients already there. "two passes" is the way of ZeRO stage 3 with conservative forces.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from equipot.model.batch import System, SystemBatch, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.kernels import kernel_status
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.train.dataset import Targets
from equipot.train.loss import Counts, LossModule
from equipot.train.recipe import LossSection
from equipot.train.recompute import recomputed

FORMS = ("plain", "split", "fast", "lean")
Step = Callable[[], None]


def make_batch(n_systems: int, n_atoms: int) -> SystemBatch:
    """Clusters of atoms at a molecule's density: about 19 neighbours within 5 Å for 20 atoms."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(n_atoms ** (1 / 3)))
    grid = 1.7 * np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:n_atoms]
    graphs = []
    for _ in range(n_systems):
        positions = grid + rng.uniform(-0.3, 0.3, (n_atoms, 3))  # jittered: no two atoms on one spot
        numbers = rng.choice([1, 6, 7, 8], n_atoms)
        graphs.append(build_graph(System(numbers, positions, np.zeros((3, 3)), np.zeros(3, bool)), 5.0))
    return collate(graphs, dtype=torch.float32)


def make_step(batch: SystemBatch, width: int, form: str, forces: str, variant: str) -> Step:
    """A step of the real loss module; the weights are the same whatever the form."""
    config = ModelConfig.from_json(
        {
            "width": width,
            "forces": forces,
            "messages": form,
            "elements": (1, 6, 7, 8),
            "levels_of_theory": ("none",),
            "mean_neighbors": batch.n_edges / batch.n_atoms,
        }
    )
    torch.manual_seed(0)
    potential = Potential(config, References(energy=np.zeros((1, 4)), scale=np.ones(1))).train()
    if "checkpointed" in variant:
        potential.backbone.run_layer = recomputed
    module = LossModule(potential, LossSection(), two_passes="two passes" in variant)
    targets = Targets(
        torch.zeros(batch.n_systems, dtype=torch.float64),
        torch.randn(batch.n_atoms, 3),
        torch.full((batch.n_systems, 3, 3), torch.nan),
    )
    counts = Counts(*Counts.of(targets))

    def step() -> None:
        module.zero_grad(set_to_none=False)
        module(batch, targets, counts, 1)[0].backward()

    return step


def cpu_seconds(step: Step) -> float:
    """CPU-seconds of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def peak_bytes(step: Step) -> int:
    """The most bytes alive during a step beyond those at its start, as the allocator saw it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(max(np.cumsum([0, *changes])))


def compare(forces: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per form and variant, the plain form as it is first."""
    batch = make_batch(args.systems, args.atoms)
    variants = ["", "checkpointed"]
    if forces == "conservative":
        variants += ["two passes", "two passes, checkpointed"]
    steps = {
        (form, variant): make_step(batch, args.width, form, forces, variant)
        for form in FORMS
        for variant in variants
    }
    for step in steps.values():
        step()
    seconds = {key: float("inf") for key in steps}
    for _ in range(args.rounds):
        for key, step in steps.items():
            seconds[key] = min(seconds[key], cpu_seconds(step))
    memory = {key: peak_bytes(step) for key, step in steps.items()}
    plain = ("plain", "")
    return [
        {
            "forces": forces,
            "messages": form,
            "variant": variant or "as it is",
            "time_over_plain": round(seconds[form, variant] / seconds[plain], 3),
            "activations_over_plain": round(memory[form, variant] / memory[plain], 3),
        }
        for form, variant in steps
    ]


def main() -> None:
    """Run all and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--systems", type=int, default=8)
    parser.add_argument("--atoms", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}, one thread",
        "kernel": kernel_status().partition(" (")[0],
        "width": args.width,
        "rows": [row for forces in ("direct", "conservative") for row in compare(forces, args)],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
