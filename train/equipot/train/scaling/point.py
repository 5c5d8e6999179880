"""One training run of a study: its settings, its name, and the digest of all that decides its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from equipot.train.recipe import Recipe

STUDY_VERSION = 1
"""Raised when the code changes what a point's result is, or a recipe's default: points of another version
are trained again."""

_IDLE = (
    "data.mix",
    "data.store_root",
    "data.memory",
    "checkpoint",
    "watch",
    "batch.workers",
    "batch.cache_mib",
)
"""Keys of a recipe that change no result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Settings of a point, as ``point.json`` holds them."""

    name: str
    group: tuple[str, ...]
    """Experiments that it belongs to."""
    holdout: bool
    """Left out of fits, and predicted."""
    architecture: str
    width: int
    layers: int
    forces: str
    residual: bool | str
    normalisation: str
    inputs: str
    references: str
    data_fraction: float
    train_structures: int
    """Of the subset."""
    seed: int
    steps: int
    structures_per_step: int
    target_flops: float
    """Model FLOPs of training that are expected of so many steps."""
    learning_rate: float
    parameters: int
    ranks: int
    overrides: Mapping[str, Any]
    """Keys of a recipe that the experiment sets besides."""
    study_version: int = STUDY_VERSION

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "group": list(self.group), "overrides": dict(self.overrides)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Point:
        """The inverse of :meth:`to_json`; what a later version may have added is left out."""
        known = {field.name for field in fields(Point)}
        return Point(**{k: v for k, v in values.items() if k in known} | {"group": tuple(values["group"])})

    def joined(self, other: Point) -> Point:
        """The same run, wanted by the experiments of both."""
        group = tuple(dict.fromkeys((*self.group, *other.group)))
        return replace(self, group=group, holdout=self.holdout or other.holdout)


def digest(recipe: Recipe, mix_digest: str) -> str:
    """Identity of a run's result, in hexadecimal: the recipe, the data, and the version of the study's code.

    Of the recipe count the values that are not the defaults, so that a key that is added to recipes leaves
    the points that do not use it as they are.

    Args:
        recipe: of the point.
        mix_digest: what is trained, validated and tested on.
    """
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    for key in _IDLE:
        section, _, name = key.partition(".")
        if name:
            values.get(section, {}).pop(name, None)
        else:
            values.pop(section, None)
    values = {name: value for name, value in values.items() if value != {}}
    body = {"recipe": values, "mix": mix_digest, "study_version": STUDY_VERSION}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def name_of(recipe: Recipe, references: str, identity: str) -> str:
    """A folder's name that people can read: what differs from the usual, and eight digits of the digest."""
    model = recipe.model
    parts = [model.architecture, f"w{model.width}", f"l{model.layers}", f"d{recipe.data.subset:.4g}"]
    usual = {
        "forces": "conservative",
        "residual": True,
        "normalisation": "layer",
        "inputs": "invariant",
    }
    for key, value in usual.items():
        found = getattr(model, key, value)
        if found != value:
            parts.append(f"{key}-{found}".lower())
    if references != "per-level":
        parts.append(f"references-{references}")
    parts += [f"n{recipe.optimizer.steps}", f"s{recipe.seed}", identity[:8]]
    return "_".join(parts)
