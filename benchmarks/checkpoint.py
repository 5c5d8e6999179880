"""How long training waits for a checkpoint, written while it waits and while it goes on, as JSON.

    python benchmarks/checkpoint.py [--width 1024] [--rounds 6] [--steps 10] [--out DIRECTORY]

Each round takes steps on the demo's data, then saves once in each way, in turn, with the same number of steps
after each: the whole wait is what the call takes plus what is left to wait for after those steps. Times are
of the clock, because waiting is what is asked; the median of the rounds. `share` is the wait over the time of
the steps between two saves, `step_while_writing` the first step after a save that goes on in the background
over an undisturbed one: on a machine whose cores all train, the checksum takes its part of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from equipot.train.assemble import Parts, assemble
from equipot.train.checkpoint import Parallelism
from equipot.train.dataset import Batch
from equipot.train.engine import start_world
from equipot.train.launch import free_port, rank_environment
from equipot.train.loss import Counts
from equipot.train.prepare import prepare
from equipot.train.recipe import CheckpointSection, load_recipe
from equipot.train.run_directory import RunDirectory
from equipot.train.saving import Checkpoints
from equipot.train.state import TrainerState
from equipot.train.world import World

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples/data/ethanol-methanol.extxyz"
LEVEL = ["--level-of-theory", "PBE/def2-SVP", "--licence", "MIT", "--group-by", "block:10"]
WAYS = ("synchronous", "asynchronous")


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="between two saves")
    parser.add_argument(
        "--out", type=Path, help="a directory on the disk to measure; default: temporary files"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(rank_environment(0, 1, free_port()))
    world = start_world()
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        parts = assembled(Path(folder), options.width, world)
        n_parameters = sum(place.length for place in parts.engine.places())
        report = {
            "what": "checkpoint",
            "command": f"python benchmarks/checkpoint.py --width {options.width} --rounds {options.rounds} "
            f"--steps {options.steps}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "parameters": n_parameters,
            "checkpoint_mib": round(16 * n_parameters / 2**20),
            "host_memory_of_asynchronous_mib": round(16 * n_parameters / 2**20),
            "steps_between_saves": options.steps,
            **measure(parts, Path(folder), world, options.rounds, options.steps),
        }
    print(json.dumps(report, indent=1))


def assembled(folder: Path, width: int, world: World) -> Parts:
    """The demo's run at another width, on one rank."""
    store = folder / "store"
    command = [sys.executable, "-m", "equipot.cli", "data", "import", str(DATA), *LEVEL, "--out", str(store)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    changes = [f'data.stores=["{store}"]', f"model.width={width}"]
    recipe, run = load_recipe(ROOT / "examples" / "demo.toml", changes), RunDirectory(folder / "run")
    prepare(recipe, run, resume=False)
    return assemble(recipe, run, world)


def measure(parts: Parts, folder: Path, world: World, rounds: int, steps: int) -> dict[str, object]:
    """Waits of both ways, in turn."""
    parallelism = Parallelism(ranks=1, zero_stage=1, precision="fp32")
    settings = CheckpointSection(keep=1)
    savers = {
        way: Checkpoints(
            folder / way, world, settings.model_copy(update={"asynchronous": way == WAYS[1]}), parallelism
        )
        for way in WAYS
    }
    batch = parts.dataset.batch(parts.sampler.micro_batches(0, rank=0, ranks=1, accumulation=1)[0].keys)
    waits: dict[str, list[float]] = {way: [] for way in WAYS}
    calm: list[float] = []
    disturbed: list[float] = []
    state = TrainerState()
    step(parts, batch)
    for number in range(rounds + 1):  # the first fills buffers and caches, and is not counted
        for way in WAYS[number % 2 :] + WAYS[: number % 2]:
            state = replace(state, step=state.step + 1)
            began = time.perf_counter()
            savers[way].begin(state, parts.engine, parts.ema)
            waited = time.perf_counter() - began
            times = [step(parts, batch) for _ in range(steps)]
            began = time.perf_counter()
            problem = savers[way].settle()
            assert problem is None, problem
            waited += time.perf_counter() - began
            if number:
                waits[way].append(waited)
                (disturbed if way == WAYS[1] else calm).append(times[0])
    one = statistics.median(calm)
    return {
        "step_s": round(one, 3),
        "step_while_writing": round(statistics.median(disturbed) / one, 3),
        **{
            way: {
                "wait_s": round(statistics.median(waits[way]), 4),
                "wait_over_step": round(statistics.median(waits[way]) / one, 4),
                "share": round(statistics.median(waits[way]) / (steps * one), 4),
            }
            for way in WAYS
        },
    }


def step(parts: Parts, batch: Batch) -> float:
    """One step as the trainer does it; seconds."""
    began = time.perf_counter()
    counts = Counts(*Counts.of(batch.targets))
    parts.engine.module.train()
    parts.engine.forward_backward(batch.systems, batch.targets, counts, 1, last=True)
    parts.engine.step(1e-6)
    parts.ema.update(1)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
