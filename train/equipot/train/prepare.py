"""Settles what a run trains on: splits, elements, references, mean neighbours. The first rank does it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from equipot.model.card import BundleCard, read_card
from equipot.model.elements import symbol
from equipot.model.errors import ModelError
from equipot.model.shard_files import check_shards
from equipot.train.dataset import Sizes
from equipot.train.errors import DataError
from equipot.train.finetune import (
    ParentRecord,
    child_config,
    copy_bundle,
    make_config,
    new_elements,
    read_parent,
)
from equipot.train.inherit import suited_references
from equipot.train.joint_references import joint_references
from equipot.train.long_work import told_bar
from equipot.train.mix import Mix
from equipot.train.mix_build import build_mix
from equipot.train.mix_request import FRACTIONS, of_stores
from equipot.train.recipe import DataSection, Recipe
from equipot.train.run_card import MixRecord, RunCard, StoreRecord, changes_on_resume
from equipot.train.run_directory import RunDirectory, RunError
from equipot.train.store import Store


def prepare(recipe: Recipe, run: RunDirectory, *, resume: bool) -> list[str]:
    """Write the run's card, and of stores its mix, or check that they fit a run to be continued.

    Returns:
        What the user should be told.

    Raises:
        TrainError: the directory is taken, the data cannot be used, or the recipe is not the run's own.
    """
    if run.has_checkpoints:
        if not resume:
            raise RunError(
                f"{run.path} already holds a run; continue it with --resume, or choose another --out"
            )
        return _continue(recipe, run)
    run.path.mkdir(parents=True, exist_ok=True)
    run.checkpoints.mkdir(exist_ok=True)
    notes = [f"nothing to resume in {run.path}: the run begins"] if resume else []
    if recipe.data.mix is None:
        shutil.rmtree(run.mix, ignore_errors=True)  # of an earlier start that took no step
        mix = _mix_of_stores(recipe.data, run.mix)
    else:
        mix = open_mix(recipe, run)
        mix.verify()
    card = make_card(recipe, mix)
    if recipe.finetune is not None:
        card, told = _inherit(card, recipe.finetune.bundle, run, mix)
        notes += told
    card.write(run.card)
    return notes + _left_out(mix)


def open_mix(recipe: Recipe, run: RunDirectory) -> Mix:
    """The mix that the recipe names, or the one that the run made of its stores.

    Raises:
        DataError: it is gone or damaged, or a store is gone or not the one that was mixed.
    """
    data = recipe.data
    if data.mix is None:
        return Mix.open(run.mix, stores=data.stores)
    return Mix.open(data.mix, store_root=data.store_root)


def reopen_mix(run: RunDirectory, card: RunCard, *, store_root: Path | None = None) -> Mix:
    """The mix a run was trained on, from wherever this is called.

    Args:
        run: where it lies.
        card: its card.
        store_root: folder that holds the stores, if they were moved.

    Raises:
        DataError: as `open_mix`, or it is another mix by now.
    """
    stores = [] if store_root else [Path(store.path) for store in card.stores]
    mix = Mix.open(card.mix.path or run.mix, stores=stores, store_root=store_root)
    _check_same(card, mix)
    return mix


def make_card(recipe: Recipe, mix: Mix) -> RunCard:
    """Derive from the training split, and from it alone, what the model needs to know of the data.

    Elements, references and mean neighbours are those of the whole training split, whatever the subset: the
    models of a scaling curve differ in nothing else, and are validated and tested on the same structures.
    """
    known = mix.card.chemistry
    _check_labels(recipe, mix.stores)
    sizes = Sizes.of(mix.stores, recipe.model.cutoff, progress=True)
    parent = None if recipe.finetune is None else read_parent(recipe.finetune.bundle)
    if parent is None:
        config = make_config(recipe, known, mix.card.levels, sizes.mean_neighbors(mix.part("train")))
    else:
        config = child_config(recipe, parent.config, known, mix.card.levels)
    return RunCard(
        recipe=recipe,
        config=config,
        parent=None if parent is None else ParentRecord.of(recipe, parent),
        references=joint_references(mix) if recipe.data.references == "shared" else mix.card.references,
        stores=tuple(StoreRecord.of(store) for store in mix.stores),
        mix=MixRecord.of(mix, recipe.data.subset, own=recipe.data.mix is None),
    )


def _inherit(card: RunCard, bundle: Path, run: RunDirectory, mix: Mix) -> tuple[RunCard, list[str]]:
    """Keep the bundle with the run, and fit the references to what its network leaves to them."""
    copy_bundle(bundle, run.parent)
    parent = _check_parent(run, card)
    references = suited_references(run.parent, card.config, card.references, mix)
    new = new_elements(parent.config, card.config)
    likes = ", ".join(f"{symbol(z)} as {symbol(kin)}" for z, kin in new.items())
    notes = [f"elements that {parent.name} does not know begin as their likes: {likes}"] if new else []
    return replace(card, references=references), notes


def _check_parent(run: RunDirectory, card: RunCard) -> BundleCard:
    try:
        parent = read_card(run.parent)
        check_shards(run.parent, parent)
    except ModelError as error:
        raise RunError(f"the copy of the bundle that the run began from: {error}") from None
    if card.parent is None or parent.digest != card.parent.digest:
        raise RunError(f"{run.parent} is not the bundle that the run began from; put it back, or begin anew")
    return parent


def _mix_of_stores(data: DataSection, out: Path) -> Mix:
    names = [Store.open(path).manifest.name for path in data.stores]
    request = of_stores(
        [path.resolve() for path in data.stores], names, data.seed or 0, data.fractions or FRACTIONS
    )
    with told_bar() as show:
        return build_mix(request, out, on_progress=show)


def _continue(recipe: Recipe, run: RunDirectory) -> list[str]:
    card, mix = RunCard.read(run.card), open_mix(recipe, run)
    changes = changes_on_resume(card.recipe, recipe)
    _check_same(card, mix)
    if card.parent is not None:
        _check_parent(run, card)
    own = recipe.data.mix is None
    now = replace(
        card,
        recipe=recipe,
        stores=tuple(StoreRecord.of(store) for store in mix.stores),
        mix=replace(card.mix, path="" if own else str(mix.path.resolve())),
    )
    if changes or (now.stores, now.mix) != (card.stores, card.mix):
        now.write(run.card)
    return [f"the recipe has changed: {change}" for change in changes]


def _check_same(card: RunCard, mix: Mix) -> None:
    if mix.card.digest != card.mix.digest:
        raise DataError(
            f"{mix.path}: is not the mix that the run was begun with (it is {mix.card.digest[:15]}…, then it "
            f"was {card.mix.digest[:15]}…); name that one, or begin another run with another --out"
        )


def _left_out(mix: Mix) -> list[str]:
    notes = []
    for source in mix.card.sources:
        for reason, count in source.left_out.items():
            if reason.startswith("elements"):
                notes.append(
                    f"{source.name}: {count} validation and test structures are left out, which hold {reason}"
                )
    return notes


def _check_labels(recipe: Recipe, stores: tuple[Store, ...]) -> None:
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
