"""From declared points to recipes: widths for numbers of parameters, steps for lengths, learning rates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from equipot.model.config import ModelConfig
from equipot.model.potential import Potential, count_parameters
from equipot.model.references import References
from equipot.train.flops import step_flops
from equipot.train.prepare import make_card
from equipot.train.recipe import Recipe, check_combination, parse_recipe
from equipot.train.run_card import RunCard
from equipot.train.scaling.data import Sight, StudyData
from equipot.train.scaling.declaration import AXES, COMPUTE, PARAMETERS, Study, StudyError, is_key
from equipot.train.scaling.grid import Wish
from equipot.train.scaling.point import Point, digest, name_of

_WIDEST = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A point that can be run."""

    point: Point
    recipe: Recipe
    tier: float
    """What is run first; lower ones are."""

    @property
    def step_flops(self) -> float:
        """Expected model FLOPs of a step."""
        return self.point.target_flops / self.point.steps


def plan(
    study: Study, data: StudyData, wishes: Sequence[Wish], tell: Callable[[str, float], None]
) -> list[Planned]:
    """The points in the order of the file, each run once: what several experiments name is joined.

    Raises:
        StudyError: a point that cannot be; names the experiment, the key and the remedy.
        RecipeError: likewise, of a recipe's key.
    """
    found: dict[str, Planned] = {}
    planner = _Planner(study, data)
    for number, wish in enumerate(wishes):
        tell("planning", number / len(wishes))
        new = planner.planned(wish)
        old = found.get(new.point.name)
        if old is None:
            found[new.point.name] = new
        else:
            joined = old.point.joined(new.point)
            found[new.point.name] = replace(old, point=joined, tier=min(old.tier, new.tier))
    return list(found.values())


class _Planner:
    def __init__(self, study: Study, data: StudyData) -> None:
        self._study = study
        self._data = data
        self._widths: dict[tuple[ModelConfig, int], int] = {}

    def planned(self, wish: Wish) -> Planned:
        where = f"experiments.{wish.experiment}"
        recipe = self._recipe(wish, where)
        card = make_card(recipe, self._data.mix)
        if PARAMETERS in wish.axes:
            width = self._width(card, wish.axes[PARAMETERS], where)
            recipe = self._recipe(wish, where, width)
            card = replace(card, recipe=recipe, config=replace(card.config, width=width))
        sight = self._data.sight(float(recipe.data.subset), recipe.model.cutoff)
        structures = recipe.batch.structures
        if structures > sight.draws:
            raise StudyError(
                f"{where}: batch.structures = {structures} is more than the {sight.draws} structures of "
                f"data_fraction = {recipe.data.subset}; make it smaller, or the fraction larger"
            )
        each = structures * step_flops(recipe, card.config).of(sight.atoms, sight.edges)
        steps = _steps(wish, where, sight.draws // structures, each)
        recipe = self._timed(recipe, steps, given=self._gives_rate(wish))
        check_combination(recipe, wish.ranks)
        return Planned(point=self._point(wish, recipe, card, sight, each), recipe=recipe, tier=wish.tier)

    def _recipe(self, wish: Wish, where: str, width: int | None = None) -> Recipe:
        values = _merged(self._study.recipe, wish.recipe)
        for axis, value in wish.axes.items():
            if axis not in (PARAMETERS, COMPUTE):
                _put(values, axis if is_key(axis) else AXES[axis], value)
        if width is not None:
            _put(values, "model.width", width)
        _put(values, "data.mix", str(self._data.mix.path))
        _put(values, "optimizer.steps", 1)
        return parse_recipe(values, where)

    def _gives_rate(self, wish: Wish) -> bool:
        key = "optimizer.learning_rate"
        tables = (self._study.recipe, wish.recipe)
        return any("learning_rate" in table.get("optimizer", {}) for table in tables) or bool(
            {"learning_rate", key} & set(wish.axes)
        )

    def _timed(self, recipe: Recipe, steps: int, *, given: bool) -> Recipe:
        rule = self._study.rate
        every = math.ceil(steps / self._study.validations)
        optimizer: dict[str, Any] = {"steps": steps, "warmup_steps": round(rule.warmup * steps)}
        if not given:
            rate = rule.peak * (rule.at_width / recipe.model.width) ** rule.power
            optimizer["learning_rate"] = float(f"{min(rate, rule.most):.4g}")
        sections = {
            "optimizer": optimizer,
            "validation": {"every_epochs": None, "every_steps": every},
            "checkpoint": {"every_epochs": None, "every_steps": every, "keep": 1, "asynchronous": False},
        }
        if "workers" not in recipe.batch.model_fields_set:
            sections["batch"] = {"workers": 0}  # one core a point: there is none to make batches beside
        return recipe.model_copy(
            update={
                name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()
            }
        )

    def _width(self, card: RunCard, parameters: object, where: str) -> int:
        if isinstance(parameters, bool) or not isinstance(parameters, int) or parameters < 1:
            raise StudyError(f"{where}: parameters = {parameters!r}; give a number of at least 1")
        key = (replace(card.config, width=2), parameters)
        if key not in self._widths:
            self._widths[key] = _width_for(card.config, card.references, parameters, where)
        return self._widths[key]

    def _point(self, wish: Wish, recipe: Recipe, card: RunCard, sight: Sight, each: float) -> Point:
        model = recipe.model
        identity = digest(recipe, self._data.mix.card.digest)
        references = recipe.data.references
        overrides = {key: value for key, value in wish.axes.items() if is_key(key)}
        return Point(
            name=name_of(recipe, references, identity),
            group=(wish.experiment,),
            holdout=wish.holdout,
            architecture=model.architecture,
            width=model.width,
            layers=model.layers,
            forces=model.forces,
            residual=model.residual,
            normalisation=model.normalisation,
            inputs=str(getattr(model, "inputs", "invariant")),
            references=references,
            data_fraction=float(recipe.data.subset),
            train_structures=sight.structures,
            seed=recipe.seed,
            steps=recipe.optimizer.steps or 0,
            structures_per_step=recipe.batch.structures,
            target_flops=each * (recipe.optimizer.steps or 0),
            learning_rate=recipe.optimizer.learning_rate,
            parameters=parameters_of(card.config, card.references)[0],
            ranks=wish.ranks,
            overrides={**_dotted(wish.recipe), **overrides},
        )


def parameters_of(config: ModelConfig, references: References) -> tuple[int, int]:
    """Numbers that training changes: all of them, and those beside the embedding of elements and the like."""
    with torch.device("meta"):
        potential = Potential(config, references)
    every = count_parameters(potential)
    return every, every - count_parameters(potential.embedding)


def _width_for(config: ModelConfig, references: References, parameters: int, where: str) -> int:
    def count(width: int) -> int:
        return parameters_of(replace(config, width=width), references)[0]

    low, high = 2, 2  # count(low) is below what is asked for, or low is the least
    while high < _WIDEST and count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    best = min((low, high), key=lambda width: abs(count(width) - parameters))
    found = count(best)
    if abs(found - parameters) > 0.25 * parameters:
        raise StudyError(
            f"{where}: no width gives {parameters:,} parameters at layers = {config.layers}: width {best} "
            f"has {found:,}; ask for another number, or fewer layers"
        )
    return best


def _steps(wish: Wish, where: str, steps_per_epoch: int, flops: float) -> int:
    length, share = wish.length, wish.axes.get(COMPUTE, 1.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or share <= 0:
        raise StudyError(f"{where}: compute = {share!r}; give a share of the length, as 0.25")
    if length.steps is not None:
        wanted = float(length.steps)
    elif length.epochs is not None:
        wanted = length.epochs * steps_per_epoch
    else:
        assert length.flops is not None
        wanted = length.flops / flops
    return max(1, round(wanted * share))


def _merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for table in tables:
        for key, value in _dotted(table).items():
            _put(values, key, copy.deepcopy(value))
    return values


def _dotted(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= (
            _dotted(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
        )
    return found


def _put(values: dict[str, Any], key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value
