"""What each rank runs in test_division.py: trains whole runs, takes up and continues copies of others."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path

import torch

from equipot.train.assemble import assemble
from equipot.train.checkpoint import newest_valid
from equipot.train.console import Display
from equipot.train.engine import start_world
from equipot.train.recipe import Recipe, load_recipe
from equipot.train.run_directory import RunDirectory
from equipot.train.saving import Checkpoints
from equipot.train.trainer import Trainer
from equipot.train.worker import StopRequest
from equipot.train.world import World


def copy_until(step: int, source: Path, run: Path) -> None:
    """A run as it was after so many steps."""
    shutil.copytree(source, run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def save_again(recipe: Recipe, run: RunDirectory, world: World) -> None:
    """Restore the newest checkpoint of a run and save it at once, as `again` beside the others."""
    parts = assemble(recipe, run, world)
    checkpoint, problems = newest_valid(run.checkpoints)
    assert checkpoint is not None, problems
    parts.checkpoints.restore(checkpoint, parts.engine, parts.ema)
    again = Checkpoints(run.path / "again", world, recipe.checkpoint, checkpoint.parallelism)
    again.begin(checkpoint.state, parts.engine, parts.ema)
    assert again.settle() is None


def train(recipe: Recipe, run: RunDirectory, world: World) -> None:
    """Begin or continue a run, to its end."""
    with Display(silent=True) as display:
        Trainer(recipe, run, world, display, StopRequest()).run()
    gc.collect()


def main(recipe_file: str, prepared: Path, step: int, jobs: list[tuple[str | None, str, list[str]]]) -> None:
    """Every job: the run to continue from that step (or none: begin one), the run's name, the changes."""
    torch.set_num_threads(1)
    world = start_world()
    for source, name, changes in jobs:
        recipe, run = load_recipe(recipe_file, changes), RunDirectory(prepared.parent / name)
        if world.is_first and source is None:
            shutil.copytree(prepared, run.path)
        elif world.is_first:
            copy_until(step, prepared.parent / str(source), run.path)
        world.barrier()
        if source is not None:
            save_again(recipe, run, world)
        train(recipe, run, world)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
