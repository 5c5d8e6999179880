"""Puts the parts of a run together from its recipe and its card: data, order, model, engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from equipot.model.potential import Potential, count_parameters
from equipot.train.checkpoint import Parallelism
from equipot.train.columns import Column
from equipot.train.dataset import Dataset, Sizes
from equipot.train.ema import Ema
from equipot.train.engine import Engine
from equipot.train.inherit import Inherited, is_head
from equipot.train.loss import LossModule
from equipot.train.places import Places
from equipot.train.prepare import open_mix
from equipot.train.recipe import Recipe, RecipeError
from equipot.train.recompute import recomputed
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.sampler import Sampler
from equipot.train.saving import Checkpoints
from equipot.train.schedule import total_steps
from equipot.train.world import World

_ROWS_AT_ONCE = 2**20
_NAMED = 10


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SourceSplit:
    """A split's structures of one store."""

    name: str
    level_of_theory: str
    places: Places
    costs: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parts:
    """What a trainer works with."""

    dataset: Dataset
    sampler: Sampler
    validation: tuple[SourceSplit, ...]
    """What of each store is validated on; stores that have nothing there are left out."""
    potential: Potential
    engine: Engine
    ema: Ema
    checkpoints: Checkpoints
    total_steps: int
    summary: str
    """One line for the user."""


def assemble(recipe: Recipe, run: RunDirectory, world: World) -> Parts:
    """Build everything on this rank; the same on all ranks but for their shares.

    Raises:
        TrainError: a store is gone, the batch is larger than the training split, or a structure is larger
            than a micro-batch may be.
    """
    card, mix = RunCard.read(run.card), open_mix(recipe, run)
    sizes = Sizes.of(mix.stores, recipe.model.cutoff, progress=False)
    stores = [store.kept_in(recipe.data.memory) for store in mix.stores]
    dataset = Dataset(stores, card.config, cache_mib=recipe.batch.cache_mib)
    _, draws = mix.training(recipe.data.subset)
    validation = [
        SourceSplit(
            name=source.name,
            level_of_theory=source.level_of_theory,
            places=places,
            costs=sizes.costs(places),
        )
        for k, source in enumerate(mix.card.sources)
        if len(places := mix.part("validation").of_store(k))
    ]
    costs = sizes.cost_column(draws)
    if recipe.batch.max_edges is not None:
        check_limit(recipe.batch.max_edges, draws, costs, dataset)
    sampler = Sampler(
        draws,
        costs,
        structures=recipe.batch.structures,
        seed=recipe.seed,
        limit=recipe.batch.max_edges,
    )
    total = total_steps(recipe.optimizer, sampler.steps_per_epoch)
    potential = make_potential(recipe, card)
    n_parameters = count_parameters(potential)  # before ZeRO-3 takes them apart
    module = LossModule(potential, recipe.loss, two_passes=recipe.zero.stage == 3)
    engine = make_engine(module, recipe, world)
    if card.parent is not None:
        inherited = Inherited(run.parent, card.config, card.references)
        engine.load(inherited.read, updates=0)
        engine.load_frozen(inherited.read)
    parallelism = Parallelism(ranks=world.size, zero_stage=recipe.zero.stage, precision=recipe.precision)
    begun_from = ""
    if card.parent is not None:
        begun_from = f"fine-tunes {card.parent.weights} of {card.parent.name} ({card.parent.digest[:15]}…); "
    split_sizes = ", ".join(f"{count} {name}" for name, count in card.mix.sizes.items())
    return Parts(
        dataset=dataset,
        sampler=sampler,
        validation=tuple(validation),
        potential=potential,
        engine=engine,
        ema=Ema(engine, recipe.ema.decay),
        checkpoints=Checkpoints(run.checkpoints, world, recipe.checkpoint, parallelism),
        total_steps=total,
        summary=(
            f"{begun_from}{n_parameters:,} parameters; {split_sizes} structures; "
            f"{sampler.steps_per_epoch} steps an epoch and {total} in all; "
            f"{world.size} rank(s) on {world.device.type}, ZeRO stage {recipe.zero.stage}, {recipe.precision}"
        ),
    )


def check_limit(limit: int, keys: Column, costs: Column, dataset: Dataset) -> None:
    """Refuse structures that no micro-batch may hold, before training and not at the step that meets them.

    Raises:
        RecipeError: naming the largest ones.
    """
    dearest: list[tuple[int, int]] = []  # cost and row
    count = 0
    for at in range(0, len(keys), _ROWS_AT_ONCE):
        rows = np.arange(at, min(at + _ROWS_AT_ONCE, len(keys)))
        values = costs[rows]
        over = np.flatnonzero(values > limit)
        count += len(over)
        found = [(int(values[row]), at + int(row)) for row in over]
        dearest = sorted(dearest + found, reverse=True)[:_NAMED]
    if dearest:
        named = dataset.describe(keys[np.array([row for _, row in dearest])].astype(np.int64))
        raise RecipeError(
            f"batch.max_edges = {limit}, but {count} structure(s) of the training split have more "
            f"edges and atoms, up to {dearest[0][0]}: {named}. Set batch.max_edges ≥ {dearest[0][0]}"
        )


def make_engine(module: LossModule, recipe: Recipe, world: World) -> Engine:
    """The engine of a module on the meta device, its weights drawn from the recipe's seed.

    They are the same at any number of ranks and any ZeRO stage, and at stage 3 no rank ever has all of them.
    """
    torch.manual_seed(recipe.seed)
    fresh = module.draw_parameters(torch.Generator().manual_seed(recipe.seed))
    return Engine(module, recipe, world, fresh=fresh)


def make_potential(recipe: Recipe, card: RunCard) -> Potential:
    """The potential that is to be trained, on the meta device: shapes without numbers."""
    config = card.config
    if recipe.zero.stage == 3:
        # "fast" is "split" on small batches: ranks would ask each other for weights in different orders.
        forms = tuple("balanced" if form == "fast" else form for form in config.message_forms)
        config = replace(config, messages=forms)
    with torch.device("meta"):
        potential = Potential(config, card.references)
    if recipe.finetune is not None and recipe.finetune.weights == "heads":
        for name, parameter in potential.named_parameters():
            parameter.requires_grad_(is_head(name))
    if recipe.activation_checkpointing:
        potential.backbone.run_layer = recomputed
    return potential
