"""Which settings of a recipe fit a memory, and the cheapest of them. Knows no shapes and measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from equipot.train.errors import TrainError
from equipot.train.memory.predict import Prediction
from equipot.train.recipe import Recipe, RecipeError, check_combination

Change = tuple[str, object]
"""A recipe's key, with its section, and its value"""

Predict = Callable[[Recipe], Prediction]


class PlanError(TrainError):
    """Nothing fits, or what was asked cannot be planned."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """Settings with what they take."""

    recipe: Recipe
    changes: tuple[Change, ...]
    """what differs from the recipe as it is given"""
    prediction: Prediction
    total: int
    """bytes of all ranks that share a memory"""


def candidates(
    recipe: Recipe, ranks: int, memory: int, predict: Predict, *, sharing: int, offload: bool
) -> list[Candidate]:
    """Settings that compute the same step, the quickest first; with micro-batches if none fits without.

    Args:
        recipe: what is to be trained.
        ranks: processes.
        memory: bytes that there are.
        predict: says what a recipe takes.
        sharing: ranks that share that memory.
        offload: whether a host's memory is another one than the device's.
    """
    found: list[Candidate] = []
    accumulation = recipe.batch.accumulation
    while True:
        for changes in _settings(recipe, ranks, accumulation, offload=offload):
            changed = apply(recipe, changes)
            try:
                check_combination(changed, ranks)
            except RecipeError:
                continue
            prediction = predict(changed)
            differing = tuple(change for change in changes if apply(recipe, [change]) != recipe)
            found.append(Candidate(changed, differing, prediction, prediction.per_rank * sharing))
        if any(each.total <= memory for each in found):
            break
        accumulation *= 2
        if recipe.batch.structures < ranks * accumulation:
            break
    return sorted(found, key=lambda each: (each.prediction.seconds, each.total, len(each.changes)))


def propose(found: Sequence[Candidate], memory: int) -> Candidate:
    """The quickest that fits.

    Raises:
        PlanError: none does; says what would be needed.
    """
    fitting = [each for each in found if each.total <= memory]
    if fitting:
        # Predictions are not exact: of what is as quick within a few per cent, the recipe as it is comes
        # first, then what takes less.
        quickest = fitting[0].prediction.seconds
        near = [each for each in fitting if each.prediction.seconds <= 1.03 * quickest]
        return min(near, key=lambda each: (bool(each.changes), each.total))
    if not found:
        raise PlanError("no setting of this recipe can be run on so many ranks; give fewer --ranks")
    least = min(found, key=lambda each: each.total)
    settings = ", ".join(in_words(least.changes)) or "the recipe as it is"
    copied = "set checkpoint.asynchronous = false, " if least.recipe.checkpoint.asynchronous else ""
    raise PlanError(
        f"nothing fits in {gib(memory)}: the least is {gib(least.total)}, with {settings}. Give more "
        f"memory, {copied}or lower model.width or batch.max_edges"
    )


def apply(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    """A recipe with other values."""
    values = recipe.model_dump(mode="json")
    for key, value in changes:
        *sections, name = key.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[name] = value
    return Recipe.model_validate(values)


def in_words(changes: Sequence[Change]) -> list[str]:
    """As they stand in a recipe."""
    return [f"{key} = {toml(value)}" for key, value in changes]


def toml(value: object) -> str:
    """A scalar or a list of them as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value)


def as_toml(recipe: Recipe) -> str:
    """A recipe's file: what differs from the defaults."""
    values = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    top = [f"{name} = {toml(value)}" for name, value in values.items() if not isinstance(value, dict)]
    lines = ["\n".join(top)] if top else []
    for name, section in values.items():
        if isinstance(section, dict) and section:
            lines.append("\n".join([f"[{name}]", *(f"{key} = {toml(v)}" for key, v in section.items())]))
    return "\n\n".join(lines) + "\n"


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _settings(
    recipe: Recipe, ranks: int, accumulation: int, *, offload: bool
) -> Iterator[tuple[Change, ...]]:
    forms: list[object] = [recipe.model_dump(mode="json")["model"]["messages"]]
    if recipe.model.architecture == "egnn":  # the others have one order of evaluation
        forms += [form for form in ("fast", "lean") if form != forms[0]]
    # Alone there is nobody to divide with: what a stage adds is buffers.
    lowest = 1 if recipe.precision == "bf16" else 0
    stages = range(lowest, 4) if ranks > 1 else sorted({lowest, recipe.zero.stage})
    offloads = ["none", "cpu"] if offload else [recipe.zero.offload_optimizer]
    lowest_for = {"none": 0, "cpu": 1, "nvme": 3}
    for form in forms:
        for stage in stages:
            for checkpointing in (False, True):
                for where in offloads:
                    yield (
                        ("model.messages", form),
                        ("zero.stage", stage),
                        ("zero.offload_optimizer", where if stage >= lowest_for[where] else "none"),
                        ("zero.offload_parameters", recipe.zero.offload_parameters if stage == 3 else "none"),
                        ("activation_checkpointing", checkpointing),
                        ("batch.accumulation", accumulation),
                    )
