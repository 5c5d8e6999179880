"""What a fine-tuned model takes over of its bundle, and what is refused. Knows no tensors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipot.model.card import BundleCard, read_card
from equipot.model.config import ModelConfig
from equipot.model.elements import symbol
from equipot.model.errors import ModelError
from equipot.train.chemistry import Chemistry
from equipot.train.recipe import ModelSection, Recipe, RecipeError

_FREE = frozenset({"messages"})
"""Of [model], what may differ from the bundle: the same function in another order of evaluation."""

_NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParentRecord:
    """What a run remembers of the bundle that it began from."""

    name: str
    digest: str
    weights: str
    """``all`` or ``heads``: what is trained on."""

    def to_json(self) -> dict[str, str]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def of(recipe: Recipe, card: BundleCard) -> ParentRecord:
        """Note a bundle."""
        assert recipe.finetune is not None
        return ParentRecord(name=card.name, digest=card.digest, weights=recipe.finetune.weights)


def read_parent(path: Path) -> BundleCard:
    """The card of a bundle to begin from.

    Raises:
        RecipeError: it is none, or damaged.
    """
    try:
        return read_card(path)
    except ModelError as error:
        raise RecipeError(f"finetune.bundle: {error}") from None


def with_architecture(recipe: Recipe, begun: Recipe | None = None) -> Recipe:
    """A recipe whose [model] is that of the bundle that it fine-tunes, if it does.

    Args:
        recipe: as it was written.
        begun: what a run was begun with that is continued: its bundle need not be there any more.

    Raises:
        RecipeError: the bundle cannot be read, or the recipe contradicts it.
    """
    if recipe.finetune is None:
        return recipe
    if begun is not None and begun.finetune == recipe.finetune:
        return _agreed(recipe, begun.model.model_dump(), "the run was begun with")
    bundle = recipe.finetune.bundle
    return _agreed(recipe, read_parent(bundle).config.to_json(), f"the bundle {bundle} has")


def _agreed(recipe: Recipe, theirs: Mapping[str, Any], who: str) -> Recipe:
    model: dict[str, Any] = {}
    for name, field in ModelSection.model_fields.items():
        mine = getattr(recipe.model, name)
        if name in _FREE:
            model[name] = mine
            continue
        their = theirs.get(name, field.default)
        if name in recipe.model.model_fields_set and mine != their:
            raise RecipeError(
                f"model.{name} = {mine!r} contradicts finetune.bundle: {who} {their!r}. Remove "
                "the key; a fine-tuned model has its bundle's architecture"
            )
        model[name] = their
    return recipe.model_copy(update={"model": ModelSection(**model)})


def make_config(
    recipe: Recipe, known: Chemistry, levels: tuple[str, ...], mean_neighbors: float
) -> ModelConfig:
    """The recipe's architecture for the elements, charges, spins and levels of the training split."""
    return ModelConfig(
        **recipe.model.model_dump(),
        elements=known.elements,
        levels_of_theory=levels,
        charges=known.charges,
        spin_multiplicities=known.spin_multiplicities,
        mean_neighbors=mean_neighbors,
    )


def child_config(
    recipe: Recipe, parent: ModelConfig, known: Chemistry, levels: tuple[str, ...]
) -> ModelConfig:
    """The fine-tuned model: the bundle's architecture for the elements, levels, … of the training split.

    What the bundle knows besides is not taken over: after other weights have been trained it would be wrong.

    Args:
        recipe: after :func:`with_architecture`.
        parent: of the bundle.
        known: elements, charges and spins of the training split.
        levels: of theory, of the training split.

    Raises:
        RecipeError: the heads alone are trained, and the embedding lacks something.
    """
    assert recipe.finetune is not None
    child = make_config(recipe, known, levels, parent.mean_neighbors)
    if recipe.finetune.weights == "heads":
        _check_embedding(recipe.finetune.bundle, parent, child)
    return child


def _check_embedding(bundle: Path, parent: ModelConfig, child: ModelConfig) -> None:
    missing = [f"the element {symbol(z)}" for z in child.elements if z not in parent.elements]
    for name, what in (("charges", "charge"), ("spin_multiplicities", "spin multiplicity")):
        mine, theirs = getattr(child, name), getattr(parent, name)
        if len(mine) > 1 or len(theirs) > 1:
            missing += [f"{what} {value}" for value in mine if value not in theirs]
    if missing:
        raise RecipeError(
            f'finetune.weights = "heads" leaves the embedding as it is, and {bundle} does not know '
            f'{", ".join(missing)}, which the training split has. Set finetune.weights = "all"'
        )


def new_elements(parent: ModelConfig, child: ModelConfig) -> dict[int, int]:
    """Elements that the bundle does not know, each with the one whose embedding it begins as."""
    return {z: nearest_element(z, parent.elements) for z in child.elements if z not in parent.elements}


def nearest_element(z: int, known: tuple[int, ...]) -> int:
    """The known element of the same group with the nearest atomic number; without one, the nearest of all."""
    kin = [other for other in known if _group(other) == _group(z)]
    return min(kin or known, key=lambda other: (abs(other - z), other))


def _group(z: int) -> int:
    """A number that elements of one group share: place after a noble gas (s block), or before the next."""
    before = max((gas for gas in _NOBLE_GASES if gas < z), default=0)
    after = min(gas for gas in _NOBLE_GASES if gas >= z)
    return z - before if z - before <= 2 and z != after else z - after


def copy_bundle(bundle: Path, to: Path) -> None:
    """Keep a copy of the bundle with the run, so that the run needs no other to be continued and exported."""
    aside = to.with_name(f".{to.name}.partial")
    for path in (aside, to):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(bundle, aside)
    aside.rename(to)
