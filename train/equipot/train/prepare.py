"""Settles what a run trains on: splits, elements, references, mean neighbours. The first rank does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipot.model.config import ModelConfig
from equipot.train.dataset import Sizes, chemistry, levels_of_theory, open_stores, splits_summary, supported
from equipot.train.errors import DataError
from equipot.train.recipe import Recipe
from equipot.train.reference_fit import fit_references
from equipot.train.run_card import RunCard, StoreRecord, changes_on_resume, digest_of_splits
from equipot.train.run_directory import RunDirectory, RunError
from equipot.train.splits import Splits, split
from equipot.train.store import Store


def prepare(recipe: Recipe, run: RunDirectory, *, resume: bool) -> list[str]:
    """Write the run's card and splits, or check that they fit a run to be continued.

    Returns:
        What the user should be told.

    Raises:
        TrainError: the directory is taken, the data cannot be used, or the recipe is not the run's own.
    """
    stores = open_stores(recipe.data.stores)
    if run.has_checkpoints:
        if not resume:
            raise RunError(
                f"{run.path} already holds a run; continue it with --resume, or choose another --out"
            )
        return _continue(recipe, run, stores)
    run.path.mkdir(parents=True, exist_ok=True)
    run.checkpoints.mkdir(exist_ok=True)
    notes = [f"nothing to resume in {run.path}: the run begins"] if resume else []
    splits = split(stores, fractions=recipe.data.fractions, seed=recipe.data.seed)
    splits, left_out = _only_supported(stores, splits)
    splits.save(run.splits)
    make_card(recipe, stores, splits).write(run.card)
    return notes + left_out


def make_card(recipe: Recipe, stores: Sequence[Store], splits: Splits) -> RunCard:
    """Derive from the training split, and from it alone, what the model needs to know of the data."""
    if not len(splits.train):
        raise DataError("the training split is empty; import more structures or raise data.fractions[0]")
    known = chemistry(stores, splits.train)
    levels = levels_of_theory(stores)
    sizes = Sizes.of(stores, recipe.model.cutoff, progress=True)
    _check_labels(recipe, stores)
    return RunCard(
        recipe=recipe,
        config=ModelConfig(
            **recipe.model.model_dump(),
            elements=known.elements,
            levels_of_theory=levels,
            charges=known.charges,
            spin_multiplicities=known.spin_multiplicities,
            mean_neighbors=sizes.mean_neighbors(splits.train),
        ),
        references=fit_references(stores, splits.train, known.elements, levels),
        stores=tuple(StoreRecord.of(store) for store in stores),
        splits_digest=digest_of_splits(splits),
        split_sizes=splits_summary(splits),
    )


def _continue(recipe: Recipe, run: RunDirectory, stores: Sequence[Store]) -> list[str]:
    card = RunCard.read(run.card)
    splits = Splits.load(run.splits)
    splits.check_stores(stores)
    changes = changes_on_resume(card.recipe, recipe)
    if changes:
        replace(card, recipe=recipe).write(run.card)
    return [f"the recipe has changed: {change}" for change in changes]


def _only_supported(stores: Sequence[Store], splits: Splits) -> tuple[Splits, list[str]]:
    known = chemistry(stores, splits.train)
    kept: dict[str, NDArray[np.int64]] = {}
    notes = []
    for name in ("validation", "test"):
        keys = splits.part(name)
        mask = supported(stores, keys, known)
        kept[name] = keys[mask]
        if not mask.all():
            notes.append(
                f"{int((~mask).sum())} of {len(keys)} {name} structures hold elements, charges or spins "
                "absent from the training split: they are left out"
            )
    return replace(splits, validation=kept["validation"], test=kept["test"]), notes


def _check_labels(recipe: Recipe, stores: Sequence[Store]) -> None:
    available = {
        "energy": any(store.manifest.with_energy for store in stores),
        "forces": any(store.manifest.has_forces for store in stores),
        "stress": any(store.manifest.has_stress for store in stores),
    }
    for term, present in available.items():
        weight = getattr(recipe.loss, term)
        # Forces weigh by default: data without them is fine as long as something is left to learn from.
        if (
            weight > 0
            and not present
            and "loss" in recipe.model_fields_set
            and term in recipe.loss.model_fields_set
        ):
            raise DataError(f"loss.{term} = {weight:g}, but no store has {term}; set loss.{term} = 0")
    if not any(getattr(recipe.loss, term) > 0 and present for term, present in available.items()):
        raise DataError(
            "no store has any label that the loss gives a weight to; see `equipot data info STORE`"
        )
