"""How much of a training step's time and memory is won back, at two ranks, against the plain form.

    python benchmarks/latency.py [--width 512] [--structures 12] [--rounds 2] [--out FILE]

The paper (arXiv 2504.08112) divides memory by activation checkpointing and ZeRO, and pays with time: 27 %
of the peak memory at 133 % of the time. Here the same three settings of the plain form are trained on two
ranks, and beside them ours: other orders of evaluation of the same function, divided by ZeRO, no layer
computed twice. Every round trains all settings in turn, each in ranks of its own, so that they meet the
same machine.

`memory` is the paper's: the peak of a training process beyond what it has before training, here beyond a
rank that has imported everything and holds a model of 64 × 64 numbers. `whole` is the peak with that
included. Both are sampled from outside: the mean of the ranks, the most of all rounds. `time` is what a
rank's thread computes in a step, the median of a run, the least of all rounds, as other work on the machine
does not lengthen it; `wall` is the clock's. The batch is large against the model, so that activations are
most of the memory, as in the paper's runs; with few `--structures` they are not. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from memory import make_store  # type: ignore[import-not-found]  # beside this file

from equipot.model.kernels import kernel_status
from equipot.train.memory.machine import Baseline, measure_baseline
from equipot.train.memory.planning import measure_machine
from equipot.train.memory.profile import Measured, profile
from equipot.train.recipe import load_recipe

RANKS = 2
REFERENCE = "plain"
SETTINGS: dict[str, tuple[str, ...]] = {
    REFERENCE: ("model.messages=plain", "zero.stage=0"),
    "plain, checkpointing": ("model.messages=plain", "zero.stage=0", "activation_checkpointing=true"),
    "plain, checkpointing, ZeRO 2": (
        "model.messages=plain",
        "zero.stage=2",
        "activation_checkpointing=true",
    ),
    "fast": ("model.messages=fast", "zero.stage=0"),
    "fast, ZeRO 2": ("model.messages=fast", "zero.stage=2"),
    "fast, ZeRO 2, 2 micro-batches": ("model.messages=fast", "zero.stage=2", "batch.accumulation=2"),
    "balanced, ZeRO 2": ("model.messages=balanced", "zero.stage=2"),
    "lean, ZeRO 2": ("model.messages=lean", "zero.stage=2"),
}
RECIPE = """
[data]
stores = ["{store}"]
[model]
width = {width}
layers = 3
cutoff = 5.0
forces = "{forces}"
[batch]
structures = {structures}
[optimizer]
steps = 10
"""


def main() -> None:
    """Run all settings and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--structures", type=int, default=12)
    parser.add_argument("--forces", choices=["conservative", "direct"], default="conservative")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    baseline = measure_baseline()
    found: dict[str, list[Measured]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory(prefix="equipot-bench-") as scratch:
        recipe = Path(scratch) / "recipe.toml"
        words = {"width": args.width, "structures": args.structures, "forces": args.forces}
        recipe.write_text(RECIPE.format(store=make_store(Path(scratch)), **words))
        machine = measure_machine(load_recipe(recipe), RANKS, lambda text: None, baseline=baseline)
        for number in range(args.rounds):
            for name, changes in SETTINGS.items():
                done = profile(
                    load_recipe(recipe, changes),
                    RANKS,
                    name=name,
                    steps=args.steps,
                    machine=machine,
                    say=lambda text: None,
                ).measured
                found[name].append(done)
                print(
                    f"round {number + 1}: {name}: {done.peak / 2**20:.0f} MiB, {done.busy:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    rows = {name: summary(runs, baseline) for name, runs in found.items()}
    reference = rows[REFERENCE]
    report = {
        "what": "latency",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "kernel": kernel_status().partition(" (")[0],
        "ranks": RANKS,
        **words,
        "memory": "peak of a rank beyond an empty one; whole: with it",
        "an empty rank, bytes": baseline.own + baseline.files // RANKS,
        "relative to plain": {
            name: {key: round(value / reference[key], 3) for key, value in row.items()}
            for name, row in rows.items()
        },
        "absolute": rows,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


def summary(runs: list[Measured], baseline: Baseline) -> dict[str, float]:
    """Bytes of a rank, seconds of a step."""
    whole = max(run.peak for run in runs) / RANKS
    return {
        "memory": whole - baseline.own - baseline.files // RANKS,
        "whole": whole,
        "time": min(run.busy for run in runs),
        "wall": min(run.seconds for run in runs),
    }


if __name__ == "__main__":
    main()
