"""From a spread to an interval that holds the truth as often as it says: split-conformal prediction.

Of structures that no member was trained on, a score says how large the error was beside the spread,
s = |error| / (spread + offset); an interval of half-width q · (spread + offset) then holds the truth of a
new structure of the same kind with probability p, if q is the ⌈(n+1)·p⌉-th smallest of n such scores
(Angelopoulos and Bates, arXiv 2107.07511, sections 2.3.1 and 2.4). The offset keeps scores finite where
members happen to agree; of a model without a spread it is 1, and q a plain quantile of errors.

Frames of one trajectory, and atoms of one structure, are no independent cases. Of n scores in groups as many
count as would be worth the same if they were independent: n / (1 + (m−1)·ρ) with m their mean number in a
group and ρ the correlation of ranks within groups (Kish's design effect, ρ by analysis of variance).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from equipot.model.errors import BundleError

PERCENTS = tuple(range(1, 100))
"""Coverages that quantiles are kept of, in percent."""

DEFAULT_COVERAGE = 0.9

OFFSET_SHARE = 1.0
"""The offset as a part of the median spread."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Scores of one quantity at one level of theory.

    Attributes:
        offset: added to a spread, in its unit.
        scores: how many there were.
        effective: how many independent ones they are worth.
        values: (99,) their quantiles at each whole percent; None where so few scores promise nothing.
    """

    offset: float
    scores: int
    effective: float
    values: tuple[float | None, ...]

    def half_width(self, spread: NDArray[np.float64], coverage: float) -> NDArray[np.float64]:
        """Of the interval around a prediction, in the spread's unit and shape; NaN if there is none."""
        q = self.values[percent_of(coverage) - 1]
        return (spread + self.offset) * (math.nan if q is None else q)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__} | {"values": list(self.values)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            BundleError: the values are no quantiles.
        """
        values = tuple(None if value is None else float(value) for value in data["values"])
        known = [value for value in values if value is not None]
        offset = float(data["offset"])
        rising = known == sorted(known) and values[: len(known)] == tuple(known)
        if len(values) != len(PERCENTS) or not rising or not all(0 <= v < math.inf for v in [offset, *known]):
            raise BundleError("uncertainty: calibration: the quantiles of scores do not rise from 0 on")
        return cls(offset, int(data["scores"]), float(data["effective"]), values)


@dataclass(frozen=True, slots=True)
class LevelCalibration:
    """Of one level of theory; None where there were no labels.

    Attributes:
        energy: of |ΔE| per atom, in eV.
        forces: of |ΔF| of an atom, the length of the vector, in eV/Å.
    """

    energy: Quantiles | None
    forces: Quantiles | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of a bundle.

    Attributes:
        mix: digest of the mix whose validation split it comes from.
        structures: that were looked at.
        groups: that these belong to.
        by_level_of_theory: by name, of those that the validation split holds.
    """

    mix: str
    structures: int
    groups: int
    by_level_of_theory: Mapping[str, LevelCalibration]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "mix": self.mix,
            "structures": self.structures,
            "groups": self.groups,
            "by_level_of_theory": {
                name: {
                    "energy": None if level.energy is None else level.energy.to_json(),
                    "forces": None if level.forces is None else level.forces.to_json(),
                }
                for name, level in self.by_level_of_theory.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            BundleError: quantiles are none.
        """

        def quantiles(entry: Mapping[str, Any] | None) -> Quantiles | None:
            return None if entry is None else Quantiles.from_json(entry)

        return cls(
            mix=str(data["mix"]),
            structures=int(data["structures"]),
            groups=int(data["groups"]),
            by_level_of_theory={
                name: LevelCalibration(quantiles(entry["energy"]), quantiles(entry["forces"]))
                for name, entry in data["by_level_of_theory"].items()
            },
        )


def percent_of(coverage: float) -> int:
    """The least whole percent that covers as much; 1 to 99.

    Raises:
        ValueError: no interval covers that much.
    """
    percent = math.ceil(round(coverage * 100, 6)) if math.isfinite(coverage) else 0
    if not 1 <= percent <= PERCENTS[-1]:
        raise ValueError(f"coverage is {coverage:g}, allowed are 0.01 to {PERCENTS[-1] / 100:g}")
    return percent


def quantiles_of(
    errors: NDArray[np.float64], spread: NDArray[np.float64], groups: NDArray[np.int64]
) -> Quantiles | None:
    """Calibrates one quantity; None if there are no errors.

    Args:
        errors: (n,) absolute ones.
        spread: (n,) in the same unit; zeros of a model that has none.
        groups: (n,) which group each belongs to.
    """
    if not len(errors):
        return None
    median = float(np.median(spread))
    offset = OFFSET_SHARE * median if median > 0 else 1.0
    scores = np.sort(errors / (spread + offset))
    effective = effective_size(errors / (spread + offset), groups)
    values = []
    for percent in PERCENTS:
        rank = rank_of(len(scores), effective, percent / 100)
        values.append(None if rank is None else float(scores[rank - 1]))
    return Quantiles(offset, len(scores), round(effective, 1), tuple(values))


def rank_of(count: int, effective: float, coverage: float) -> int | None:
    """Which of so many ascending scores bounds a new one with this probability, from 1; None: none does.

    With all scores independent it is ⌈(n+1)·p⌉; of fewer effective ones the same part of the list.
    """
    rank = math.ceil(round(count * (1 + 1 / effective) * coverage, 9))
    return rank if rank <= count else None


def effective_size(scores: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """How many independent scores (n,) are worth these, which belong to groups (n,); between 1 and n."""
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    n, n_groups = len(scores), len(sizes)
    if n_groups == n:
        return float(n)
    if n_groups == 1:
        return 1.0
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable") / n
    means = np.bincount(group, ranks) / sizes
    between = float((sizes * (means - ranks.mean()) ** 2).sum()) / (n_groups - 1)
    within = float(((ranks - means[group]) ** 2).sum()) / (n - n_groups)
    usual = (n - float((sizes**2).sum()) / n) / (n_groups - 1)
    total = between + (usual - 1) * within
    correlation = min(max((between - within) / total, 0.0), 1.0) if total > 0 else 1.0
    return n / (1 + (float((sizes**2).sum()) / n - 1) * correlation)
