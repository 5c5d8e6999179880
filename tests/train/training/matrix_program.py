"""What each rank runs in test_matrix.py: a few steps of every combination, one after the other."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from equipot.train.assemble import make_engine, make_potential
from equipot.train.dataset import Dataset
from equipot.train.engine import start_world
from equipot.train.loss import Counts, LossModule
from equipot.train.prepare import open_mix
from equipot.train.recipe import Recipe, load_recipe
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.world import World

STEPS = 3
RATE = 1e-3


def follow(recipe: Recipe, run: RunDirectory, world: World) -> dict[str, torch.Tensor]:
    """Loss and gradient norm of each step, and all fp32 weights after the last, by name."""
    mix, card = open_mix(recipe, run), RunCard.read(run.card)
    config = replace(
        card.config,
        width=recipe.model.width,
        layers=recipe.model.layers,
        forces=recipe.model.forces,
        messages=recipe.model.messages,
    )
    card = replace(card, config=config)
    dataset = Dataset(mix.stores, config, cache_mib=1)
    _, training = mix.training(recipe.data.subset)
    two_passes = recipe.zero.stage == 3
    module = LossModule(make_potential(recipe, card), recipe.loss, two_passes=two_passes)
    engine = make_engine(module, recipe, world)
    losses, norms = [], []
    for step in range(STEPS):
        keys = training[np.arange(recipe.batch.structures) + step * recipe.batch.structures]
        # Unequal parts: a mean of the ranks' means would not be the mean of all.
        parts = np.split(
            keys, np.linspace(0, len(keys), world.size * recipe.batch.accumulation + 1)[1:-1].astype(int) - 1
        )
        mine = parts[world.rank * recipe.batch.accumulation :][: recipe.batch.accumulation]
        batches = [dataset.batch(part) for part in mine]
        labels = np.sum([Counts.of(batch.targets) for batch in batches], axis=0)
        counts = Counts(*world.sum(list(labels)))
        engine.module.train()
        loss = 0.0
        for batch in batches:
            last = batch is batches[-1]
            part, _ = engine.forward_backward(batch.systems, batch.targets, counts, world.size, last=last)
            loss += float(part) / world.size
        losses.append(world.sum([loss])[0])
        norms.append(engine.step(RATE))
    result = {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}
    for fragment in engine.fragments():
        whole = torch.zeros(torch.Size(fragment.shape).numel())
        whole[fragment.offset : fragment.offset + fragment.values.numel()] = fragment.values
        result[fragment.name] = world.sum_tensor(whole).view(fragment.shape)
    return result


def main(recipe_file: str, run: str, jobs: dict[str, list[str]]) -> None:
    """Follow every job, a file's name and changes to the recipe; rank 0 writes the files."""
    torch.set_num_threads(1)
    world = start_world()
    for out, changes in jobs.items():
        result = follow(load_recipe(recipe_file, changes), RunDirectory(Path(run)), world)
        if world.is_first:
            torch.save(result, out)
        del result
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))
