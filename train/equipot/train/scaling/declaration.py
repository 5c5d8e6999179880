"""What a study is made of, as a TOML file checked before anything starts. Opens no data.

A study is read with :func:`load_study`; every field carries its meaning and default. Relative paths are
relative to the directory in which the command is run, as in a recipe.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from equipot.train.errors import TrainError
from equipot.train.mix_request import FRACTIONS
from equipot.train.sections import Section, explain, read_toml

AXES = {
    "architecture": "model.architecture",
    "width": "model.width",
    "layers": "model.layers",
    "forces": "model.forces",
    "residual": "model.residual",
    "normalisation": "model.normalisation",
    "inputs": "model.inputs",
    "references": "data.references",
    "data_fraction": "data.subset",
    "seed": "seed",
    "structures": "batch.structures",
    "learning_rate": "optimizer.learning_rate",
}
"""Axis → the recipe's key that it is; besides, any key of a recipe with a dot in it is an axis."""

PARAMETERS, COMPUTE = "parameters", "compute"
"""Axes that are no key: a number of parameters, for which the width is solved; a share of the length."""

_NAMED = (*AXES, PARAMETERS, COMPUTE)
_TAKEN = ("data.stores", "data.mix", "data.store_root", "optimizer.steps", "optimizer.epochs")
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]*")


class StudyError(TrainError):
    """A study that cannot be run: the message names the key, the value and the remedy."""


class SourceSection(Section):
    """[sources.NAME]: labelled files that the study imports, or a store that is there."""

    files: tuple[str, ...] = Field(
        default=(),
        description="labelled files, or folders of a release; {NAME} in a path stands for one of [folders]",
    )
    store: str | None = Field(
        default=None, description="a store made by `equipot data import`, in the place of files"
    )
    release: str = Field(default="", description="name of the release that the files are of, as oc20")
    level_of_theory: str = Field(default="", description='functional and basis, as "PBE/def2-SVP"')
    licence: str = Field(default="", description="of the data")
    group_by: str = Field(default="auto", description="what stays together in a split, as block:10")
    max_force: float | None = Field(
        default=None, gt=0, description="eV/Å; frames with an atom that feels more are left out"
    )
    max_structures: int | None = Field(default=None, ge=1, description="at most so many, by whole groups")
    max_per_group: int | None = Field(default=None, ge=1, description="at most so many of a group")
    max_atoms: int | None = Field(default=None, ge=1, description="larger structures are left out")
    weight: float = Field(default=1.0, gt=0, le=1000, description="how often an epoch sees a structure")
    role: Literal["train", "unseen"] = Field(
        default="train", description="unseen: never trained on, and evaluated at the end of each point"
    )
    optional: bool = Field(
        default=False, description="left out, and told, where a folder of its path is not given"
    )

    @model_validator(mode="after")
    def _files_or_a_store(self) -> SourceSection:
        if bool(self.files) == (self.store is not None):
            raise ValueError('give either files = ["…"], or store = "…", as made by `equipot data import`')
        if self.files and not self.release and not (self.level_of_theory and self.licence):
            raise ValueError("files of no release need level_of_theory and licence; say what the data are")
        caps = [name for name in ("max_structures", "max_per_group") if getattr(self, name) is not None]
        if self.role == "unseen" and caps:
            raise ValueError(f"{caps[0]} is for sources that are trained on; remove it")
        return self


class DataSection(Section):
    """[data]: how the sources are split, or a mix that is split already."""

    mix: Path | None = Field(
        default=None, description="a mix made by `equipot data mix`, in the place of sources to train on"
    )
    seed: int = Field(default=0, ge=0, description="of the splits and of the nested subsets")
    fractions: tuple[float, float, float] = Field(
        default=FRACTIONS, description="shares of training, validation and test; they add up to 1"
    )


class Length(Section):
    """length = { … }: how long a point is trained; one of these."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    epochs: float | None = Field(default=None, gt=0, description="epochs of the point's own data")
    flops: float | None = Field(
        default=None, gt=0, description="model FLOPs of training, the same whatever the width and the depth"
    )

    @model_validator(mode="after")
    def _one(self) -> Length:
        given = [name for name in ("steps", "epochs", "flops") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of steps, epochs and flops, not {' and '.join(given) or 'none'}")
        return self


class RateSection(Section):
    """[rate]: the peak learning rate, peak · (at_width / width)^power, and no more than most."""

    peak: float = Field(default=4e-3, gt=0, le=1, description="peak learning rate at at_width")
    at_width: int = Field(default=64, ge=1, description="the width that peak is for")
    power: float = Field(default=0.7, ge=0, le=2, description="how it falls with the width; 0: it does not")
    most: float = Field(default=1.2e-2, gt=0, le=1, description="upper bound, for small widths")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps that warm it up")


class Experiment(Section):
    """[experiments.NAME]: a group of points, the product of its axes, or of them with a list of points."""

    question: str = Field(default="", description="what it answers, for the report")
    priority: float = Field(default=1.0, description="lower ones are run first")
    axes: dict[str, tuple[Any, ...]] = Field(default={}, description="values of each axis")
    points: tuple[dict[str, Any], ...] = Field(
        default=(), description="values of several axes together, each combined with the product of the axes"
    )
    holdout: tuple[dict[str, Any], ...] = Field(
        default=(), description="points with all values of one of these stay out of fits and are predicted"
    )
    length: Length | None = Field(default=None, description="of its points, if not the study's")
    ranks: int = Field(default=1, ge=1, description="processes that train a point together")
    recipe: dict[str, Any] = Field(default={}, description="keys of a recipe for its points")

    @field_validator("axes", mode="before")
    @classmethod
    def _lists(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        axes = {key: inner if isinstance(inner, list | tuple) else [inner] for key, inner in _flat(value)}
        for key, values in axes.items():
            if not values:
                raise ValueError(f"axis {key} is empty; give it a value, or remove it")
        return axes

    @field_validator("points", "holdout", mode="before")
    @classmethod
    def _flat_tables(cls, value: object) -> object:
        if not isinstance(value, list | tuple) or not all(isinstance(each, dict) for each in value):
            return value
        return [dict(_flat(each)) for each in value]

    @model_validator(mode="after")
    def _known_axes(self) -> Experiment:
        for place in (self.axes, *self.points, *self.holdout):
            for name in place:
                _check_axis(name)
        for point in self.points or ({},):
            both = {*self.axes, *point}
            if {"width", PARAMETERS} <= both:
                raise ValueError("width and parameters are both given; the one decides the other")
            twice = sorted(set(self.axes) & set(point))
            if twice:
                raise ValueError(f"{twice[0]} is an axis and stands in points too; say it once")
        return self


class Study(Section):
    """A scaling study. Top-level keys stand before the first [section] of the file."""

    name: str = Field(description="of the study")
    question: str = Field(default="", description="what it is about, for the report")
    folders: dict[str, str] = Field(
        default={}, description='places of data by name; "": to be given by --folder NAME=PATH'
    )
    sources: dict[str, SourceSection] = Field(default={}, description="data, as [sources.NAME]")
    data: DataSection = DataSection()
    recipe: dict[str, Any] = Field(default={}, description="what all points have in common, as a recipe")
    length: Length = Field(description="how long points are trained, where their experiment does not say")
    rate: RateSection = RateSection()
    validations: int = Field(default=8, ge=1, le=1000, description="points of each learning curve")
    keep_checkpoints: bool = Field(default=False, description="of finished points too, for `equipot export`")
    experiments: dict[str, Experiment] = Field(min_length=1, description="groups, as [experiments.NAME]")

    @model_validator(mode="after")
    def _has_data(self) -> Study:
        trained = [name for name, source in self.sources.items() if source.role == "train"]
        if bool(trained) == (self.data.mix is not None):
            raise ValueError("give either sources to train on, as [sources.NAME], or data.mix")
        for kind, names in (("source", self.sources), ("experiment", self.experiments)):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{kind} {name!r}: names are letters, digits, - and _")
        for name, source in self.sources.items():
            for path in (*source.files, source.store or ""):
                for folder in folders_in(path):
                    if folder not in self.folders:
                        raise ValueError(f"sources.{name}: {path} names no folder of [folders]; add {folder}")
        for where, recipe in [
            ("recipe", self.recipe),
            *((f"experiments.{name}.recipe", each.recipe) for name, each in self.experiments.items()),
        ]:
            for key, _ in _flat(recipe):
                if key in _TAKEN:
                    raise ValueError(f"{where}.{key} is the study's own to set: see sources, data and length")
        return self


def load_study(path: str | Path, overrides: Sequence[str] = (), folders: Sequence[str] = ()) -> Study:
    """Read a TOML study, apply ``key.key=value`` overrides and ``NAME=PATH`` folders, and check it.

    Raises:
        StudyError: no such file, not TOML, an unknown key or a value out of range; each named, on one line.
    """
    try:
        values = read_toml(Path(path), "study", overrides)
    except ValueError as error:
        raise StudyError(str(error)) from None
    known = values.get("folders")
    for folder in folders:
        name, equals, place = folder.partition("=")
        if not equals or not isinstance(known, dict) or name not in known:
            names = ", ".join(known) if isinstance(known, dict) else "none"
            raise StudyError(f"--folder {folder}: write NAME=PATH; {path} has the folders: {names}")
        known[name] = place
    return parse_study(values, str(path))


def parse_study(values: Mapping[str, object], source: str) -> Study:
    """Check a study given as plain values; `source` is how error messages call it."""
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise StudyError(f"{source}: {explain(error, Study, 'study')}") from None


def folders_in(path: str) -> list[str]:
    """Names in braces of a source's path."""
    return re.findall(r"\{(\w*)\}", path)


def is_key(axis: str) -> bool:
    """Whether an axis is written as a key of a recipe, as model.cutoff."""
    return "." in axis


def _check_axis(name: str) -> None:
    if name not in AXES and name in AXES.values():
        short = next(axis for axis, key in AXES.items() if key == name)
        raise ValueError(f"axis {name}: call it {short}")
    if (is_key(name) and name not in _TAKEN) or name in _NAMED:
        return
    close = difflib.get_close_matches(name, _NAMED, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(
        f"axis {name}: {hint}known are {', '.join(_NAMED)}, and keys of a recipe as model.cutoff"
    )


def _flat(table: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    # `axes.model.cutoff = […]` is a table of tables to TOML
    found = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{before}{key}.")
        else:
            found.append((f"{before}{key}", value))
    return found
