"""One rank of a profile: a few steps of a real run, its times written down. The launcher starts it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipot.train.allocator import give_memory_back
from equipot.train.assemble import assemble
from equipot.train.checkpoint import CheckpointError
from equipot.train.engine import start_world
from equipot.train.errors import TrainError
from equipot.train.launch import Failure
from equipot.train.loader import Loader
from equipot.train.loss import Counts
from equipot.train.memory.machine import busy_seconds
from equipot.train.recipe import Recipe
from equipot.train.run_directory import RunDirectory
from equipot.train.state import TrainerState
from equipot.train.trainer import Trainer
from equipot.train.worker import end_with_parent


def run(job: dict[str, Any]) -> None:
    """Be a rank for so many steps, then save as training does."""
    scratch = Path(job["scratch"])
    (scratch / f"pid-{os.getpid()}").touch()
    assert Trainer is not None  # imported, as in training
    give_memory_back()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = Recipe.model_validate(job["recipe"])
    world = start_world()
    parts = assemble(recipe, RunDirectory(Path(job["run"])), world)
    marks = (scratch / "steps.jsonl").open("w", buffering=1) if world.is_first else None
    loader = Loader(
        parts.dataset,
        parts.sampler,
        world,
        accumulation=recipe.batch.accumulation,
        first_step=0,
        steps=job["steps"],
        workers=recipe.batch.workers,
    )
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with loader:
        for made in loader:
            start, busy = time.perf_counter(), busy_seconds()
            labels = np.sum([Counts.of(batch.targets) for batch in made.batches], axis=0)
            counts = Counts(*world.sum(list(labels)))
            parts.engine.module.train()
            for number, batch in enumerate(made.batches, start=1):
                parts.engine.forward_backward(
                    batch.systems, batch.targets, counts, world.size, last=number == len(made.batches)
                )
            parts.engine.step(1e-6)
            parts.ema.update(made.step + 1)
            world.barrier()
            if marks is not None:
                mark = {"seconds": time.perf_counter() - start, "busy": busy_seconds() - busy}
                marks.write(json.dumps(mark) + "\n")
            if made.step == 0:  # what saving needs, it keeps
                parts.checkpoints.begin(TrainerState(step=1), parts.engine, parts.ema)
                if (problem := parts.checkpoints.settle()) is not None:
                    raise CheckpointError(problem)
    if marks is not None:
        on_device = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
        marks.write(json.dumps({"device_bytes": on_device}) + "\n")


def main() -> int:
    """The entry of a rank that the launcher started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    parser.add_argument("--failure-file", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    end_with_parent(options.parent)
    try:
        run(json.loads(options.job))
    except Exception as error:
        code = error.exit_code if isinstance(error, TrainError) else 1
        message = str(error) if isinstance(error, TrainError) else f"{error}\n{traceback.format_exc()}"
        Failure(time=time.time(), message=message, exit_code=code).write(options.failure_file)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
