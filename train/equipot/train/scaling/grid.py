"""Which points a study declares: products of axes, experiment by experiment. Opens no data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipot.train.scaling.declaration import Length, Study, StudyError


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """A point as it is declared: values of axes, whose rest is the recipe's."""

    experiment: str
    axes: Mapping[str, Any]
    length: Length
    ranks: int
    recipe: Mapping[str, Any]
    holdout: bool
    tier: float
    """What is run first: the experiment's priority, and one more for each seed after the first."""


def wishes(study: Study, only: Sequence[str] = ()) -> list[Wish]:
    """Every declared point, in the order of the file; one that two experiments name stands here twice.

    Args:
        study: as declared.
        only: experiments to keep; all if empty.

    Raises:
        StudyError: `only` names an experiment that there is not.
    """
    for name in only:
        if name not in study.experiments:
            raise StudyError(f"--only {name}: no such experiment; one of {', '.join(study.experiments)}")
    return [wish for name in study.experiments if not only or name in only for wish in _of(study, name)]


def _of(study: Study, name: str) -> Iterator[Wish]:
    experiment = study.experiments[name]
    names = list(experiment.axes)
    seeds: list[Any] = []
    for listed in experiment.points or ({},):
        for values in itertools.product(*experiment.axes.values()):
            axes = {**listed, **dict(zip(names, values, strict=True))}
            if axes.get("seed") not in seeds:
                seeds.append(axes.get("seed"))
            yield Wish(
                experiment=name,
                axes=axes,
                length=experiment.length or study.length,
                ranks=experiment.ranks,
                recipe=experiment.recipe,
                holdout=any(_matches(axes, pattern) for pattern in experiment.holdout),
                tier=experiment.priority + seeds.index(axes.get("seed")),
            )


def _matches(axes: Mapping[str, Any], pattern: Mapping[str, Any]) -> bool:
    return all(key in axes and axes[key] == value for key, value in pattern.items())
