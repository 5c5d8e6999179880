"""Predicted memory and time of training beside what real ranks take, over a grid of settings.

    python benchmarks/memory.py [--structures 8] [--only N] [--out FILE]

Trains a few steps of each setting on crystals of copper and nickel, labelled by a pair potential, in ranks of
their own, and prints JSON: predicted and measured bytes of all ranks, seconds a step, their ratios. Memory is
sampled from outside; times are what a thread computed, as the machine may be doing other things. Needs 3 GB
and some minutes. Sizes are chosen so that the model and its activations stand out over an empty process.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write

from equipot.model.kernels import kernel_status
from equipot.train.importer import ImportOptions, import_files
from equipot.train.memory.machine import measure_baseline
from equipot.train.memory.planning import measure_machine
from equipot.train.memory.profile import Profile, profile
from equipot.train.memory.report import as_json
from equipot.train.recipe import load_recipe

WIDE = ("model.width=1024", "batch.structures=4")
NVME = ("zero.offload_optimizer=nvme", "zero.nvme_path={home}/nvme", *WIDE)
# ranks, and what differs from the recipe below
GRID: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("zero.stage=0", "model.messages=fast")),
    (1, ("zero.stage=1", "model.messages=split")),
    (1, ("zero.stage=2", "model.messages=plain")),
    (1, ("zero.stage=0", "model.messages=plain", "activation_checkpointing=true")),
    (1, ("zero.stage=0", "model.messages=lean", "model.width=1536", "batch.structures=2")),
    (1, ("zero.stage=2", "model.messages=balanced", "model.forces=direct")),
    (1, ("zero.stage=1", "model.messages=split", "model.forces=direct", "activation_checkpointing=true")),
    (1, ("zero.stage=1", "model.messages=fast", "precision=bf16", "model.width=1024")),
    (1, ("zero.stage=3", "model.messages=fast")),
    (1, ("zero.stage=2", "model.messages=fast", "batch.accumulation=2", "model.width=1024")),
    (2, ("zero.stage=0", "model.messages=fast", "model.width=1024")),
    (2, ("zero.stage=1", "model.messages=fast", "model.width=1024", "activation_checkpointing=true")),
    (2, ("zero.stage=2", "model.messages=plain", "batch.structures=4")),
    (2, ("zero.stage=3", "model.messages=fast", "model.forces=direct", "model.width=1024")),
    (2, ("zero.stage=2", "model.messages=fast", "precision=bf16", "model.width=1024")),
    # other widths, batches and ranks than those above
    (3, ("zero.stage=1", "model.messages=balanced", "model.width=640", "batch.structures=6")),
    (2, ("zero.stage=0", "model.messages=lean", "model.width=896", "batch.structures=16")),
    (2, ("zero.stage=1", "model.messages=lean", "model.forces=direct", "batch.structures=12")),
    (3, ("zero.stage=3", "model.messages=balanced", "model.width=960", "batch.structures=6")),
    (2, ("zero.stage=2", "model.messages=balanced", "model.forces=direct", "precision=bf16", *WIDE)),
    # what is offloaded, and what is left out
    (2, ("zero.stage=2", "zero.offload_optimizer=cpu", "ema.decay=0", *WIDE)),
    (2, ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_parameters=cpu", *WIDE)),
    (1, ("zero.stage=3", *NVME)),
    (1, ("zero.stage=3", *NVME, "precision=bf16", "zero.offload_parameters=cpu")),
    (2, ("zero.stage=3", *NVME, "model.forces=direct", "checkpoint.asynchronous=false")),
)

RECIPE = """
[data]
stores = ["{store}"]
[model]
width = 768
layers = 3
cutoff = 5.0
[batch]
structures = {structures}
[optimizer]
steps = 10
"""


def make_store(home: Path) -> Path:
    """Rattled crystals of 16 and 32 atoms."""
    random = np.random.default_rng(0)
    frames = []
    for number in range(120):
        atoms = bulk("Cu" if number % 2 else "Ni", cubic=True).repeat((2, 2, 1 + number % 2))
        atoms.positions += random.normal(scale=0.08, size=(len(atoms), 3))
        atoms.calc = EMT()
        atoms.get_potential_energy()
        atoms.get_forces()
        frames.append(atoms)
    write(home / "emt.extxyz", frames)
    options = ImportOptions(level_of_theory="EMT", licence="CC0-1.0", name="emt", group_by="frame")
    import_files([home / "emt.extxyz"], home / "store", options)
    return home / "store"


def main() -> None:
    """Run the grid and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--structures", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", type=int, nargs="*", help="rows of the grid, from 0")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    done: list[Profile] = []
    with tempfile.TemporaryDirectory(prefix="equipot-bench-") as scratch:
        home = Path(scratch)
        recipe = home / "recipe.toml"
        recipe.write_text(RECIPE.format(store=make_store(home), structures=args.structures))
        baseline = measure_baseline()
        for number, (ranks, changes) in enumerate(GRID):
            if args.only is not None and number not in args.only:
                continue
            settings = load_recipe(recipe, [change.format(home=home) for change in changes])
            machine = measure_machine(settings, ranks, lambda text: None, baseline=baseline)
            name = f"{ranks} rank(s): {', '.join(changes)}"
            found = profile(
                settings, ranks, name=name, steps=args.steps, machine=machine, say=lambda text: None
            )
            done.append(found)
            print(
                f"{name}: predicted {found.predicted_bytes / 2**20:.0f} MiB, measured "
                f"{found.measured.peak / 2**20:.0f}, {found.memory_error:+.1%}; time {found.time_error:+.0%}",
                file=sys.stderr,
                flush=True,
            )
    report = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, torch {torch.__version__}, busy with other work",
        "kernel": kernel_status().partition(" (")[0],
        "largest_memory_error": max(abs(each.memory_error) for each in done),
        "largest_time_error": max(abs(each.time_error) for each in done),
        "median_time_error": float(np.median([abs(each.time_error) for each in done])),
        "runs": as_json(done),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
