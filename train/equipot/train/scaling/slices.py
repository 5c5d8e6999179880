"""Which points of a study belong to one curve: same everything, but for what the curve is over."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipot.train.scaling.laws import Array
from equipot.train.scaling.rows import SWITCHES, Row

_SAME = 1.03
"""Lengths whose ratio is less are the same: steps are whole numbers."""

_WORDS: Mapping[str, Callable[[str], str]] = {
    "architecture": str,
    "forces": lambda value: f"{value} forces",
    "residual": lambda value: {"true": "residuals", "false": "no residuals"}.get(value, f"{value} residuals"),
    "normalisation": lambda value: "no normalisation" if value == "none" else f"{value} norm",
    "inputs": lambda value: f"{value} inputs",
    "references": lambda value: f"{value} references",
    "overrides": str,
}


@dataclass(frozen=True, order=True, slots=True)
class Family:
    """Architecture and switches: what is not size, data, length or seed."""

    architecture: str
    forces: str
    residual: str
    normalisation: str
    inputs: str
    references: str
    overrides: str

    @staticmethod
    def of(row: Row) -> Family:
        """Of a point."""
        return Family(*(str(getattr(row, name)) for name in Family.__slots__))

    def changes(self, base: Family) -> dict[str, tuple[str, str]]:
        """Field → (the base's, this one's), of those that differ."""
        pairs = ((name, (getattr(base, name), getattr(self, name))) for name in self.__slots__)
        return {name: pair for name, pair in pairs if pair[0] != pair[1]}

    def label(self, base: Family) -> str:
        """What it is in the words of what differs from the base."""
        changed = self.changes(base)
        words = [_WORDS[name](pair[1]) or "no overrides" for name, pair in changed.items()]
        return ", ".join(words) if words else base.architecture


def base_family(rows: Sequence[Row]) -> Family:
    """The family that most points are of: what others are compared with."""
    counts: dict[Family, int] = defaultdict(int)
    for row in rows:
        counts[Family.of(row)] += 1
    return max(sorted(counts), key=lambda family: counts[family])


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Points of one family along one or two variables."""

    family: Family
    variables: tuple[str, ...]
    """Of `VARIABLES`."""
    fixed: tuple[tuple[str, str], ...]
    """What is the same for all, in words."""
    rows: tuple[Row, ...]
    held_out: tuple[Row, ...]

    @property
    def x(self) -> Array:
        """(n, K) variables of the rows."""
        return variables_of(self.rows, self.variables)

    @property
    def distinct(self) -> int:
        """Different settings of the variables."""
        return len(np.unique(self.x, axis=0)) if self.rows else 0

    @property
    def title(self) -> str:
        """What it is over, and what is the same."""
        return f"{' and '.join(self.variables)} at " + ", ".join(f"{k} {v}" for k, v in self.fixed)


VARIABLES: Mapping[str, Callable[[Row], float]] = {
    "parameters": lambda row: row.parameters,
    "training structures": lambda row: row.train_structures,
    "structures seen": lambda row: row.structures,
    "model FLOPs": lambda row: row.flops,
}


def variables_of(rows: Sequence[Row], names: Sequence[str]) -> Array:
    """(n, K) values."""
    values = [[VARIABLES[name](row) for name in names] for row in rows]
    return np.array(values, dtype=np.float64).reshape(len(rows), len(names))


LENGTHS: Mapping[str, Callable[[Row], float]] = {
    "steps": lambda row: row.steps,
    "epochs": lambda row: row.epochs,
    "FLOPs": lambda row: row.flops,
}
"""In what points may be of one length."""


def slices(rows: Iterable[Row], variables: tuple[str, ...]) -> list[Slice]:
    """Every set of points along some variables, that with most settings first.

    A curve in parameters holds layers, data, batch and length; one in data holds the model, the batch and
    the length; one in both holds layers, batch and length; one in parameters and structures seen holds
    layers, data and batch. The length is the same in steps, in epochs or in FLOPs.
    """
    usable = [row for row in rows if row.usable]
    found: list[Slice] = []
    for unit in LENGTHS:
        for family, fixed, members in _alike(usable, variables, unit):
            each = Slice(
                family=family,
                variables=variables,
                fixed=fixed,
                rows=tuple(row for row in members if not row.holdout),
                held_out=tuple(row for row in members if row.holdout),
            )
            names = {row.name for row in each.rows}
            if names and not any(
                other.family == family and names <= {row.name for row in other.rows} for other in found
            ):
                found.append(each)

    def rank(each: Slice) -> tuple[int, int, Fixed]:
        # those held out count: the curve they were taken from is the one that matters
        points = (*each.rows, *each.held_out)
        return -len(np.unique(variables_of(points, variables), axis=0)), -len(points), each.fixed

    return sorted(found, key=rank)


Fixed = tuple[tuple[str, str], ...]


def _alike(
    rows: Sequence[Row], variables: tuple[str, ...], unit: str
) -> Iterator[tuple[Family, Fixed, list[Row]]]:
    parts: dict[tuple[Family, Fixed], list[Row]] = defaultdict(list)
    for row in rows:
        parts[(Family.of(row), _held(row, variables))].append(row)
    for (family, fixed), members in parts.items():
        if "structures seen" in variables:
            yield family, fixed, members
            continue
        for amount, equal in equally_long(members, LENGTHS[unit]):
            shown = f"{amount:.0f}" if unit == "steps" else f"{amount:.3g}"
            yield family, (*fixed, (unit, shown)), equal


def equally_long(rows: Sequence[Row], length: Callable[[Row], float]) -> Iterator[tuple[float, list[Row]]]:
    """Points of one length, and it, the shortest first."""
    ordered = sorted(rows, key=length)
    run: list[Row] = []
    for row in ordered:
        if run and length(row) > _SAME * length(run[0]):
            yield _commonest(run, length), run
            run = []
        run.append(row)
    if run:
        yield _commonest(run, length), run


def _commonest(rows: Sequence[Row], length: Callable[[Row], float]) -> float:
    return Counter(map(length, rows)).most_common(1)[0][0]


def _held(row: Row, variables: tuple[str, ...]) -> Fixed:
    held: list[tuple[str, Any]] = [("layers", row.layers)]
    if "parameters" not in variables:
        held.append(("width", row.width))
    if "training structures" not in variables:
        held.append(("data fraction", f"{row.data_fraction:g}"))
    if row.structures_per_step:
        held.append(("batch", row.structures_per_step))
    return tuple((name, str(value)) for name, value in held)


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Points that no other with as much or less compute beats, by the mean loss of their setting's seeds."""
    members, losses = _by_compute(rows)
    best, kept = np.inf, []
    for each, loss in zip(members, losses, strict=True):
        if loss < best:
            best = loss
            kept += each
    return kept


def trend_of_frontier(rows: Sequence[Row], shuffles: int = 999) -> float:
    """Probability that losses which do not depend on compute have a frontier that falls so steadily.

    The least losses so far always fall, whatever they depend on: a law fitted to a frontier cannot tell. The
    test shuffles the losses of all settings among them, those off the frontier too, and asks how often the
    log losses of the frontier stay as high for as long, on the mean over the settings: without a trend they
    are soon as low as they will be.
    """
    _, losses = _by_compute(rows)
    if len(losses) < 2:
        return 1.0
    random = np.random.default_rng(0)
    logs = np.log(losses)
    shuffled = random.permuted(np.tile(logs, (shuffles, 1)), axis=1)
    seen = np.minimum.accumulate(logs).mean()
    found = np.minimum.accumulate(shuffled, axis=1).mean(axis=1)
    return float((1 + (found >= seen - 1e-12).sum()) / (1 + shuffles))


def _by_compute(rows: Sequence[Row]) -> tuple[list[list[Row]], Array]:
    """Settings, the cheapest first, and the mean losses of their seeds."""
    members = by_setting([row for row in rows if row.usable and not row.holdout])
    ranked = sorted(
        (float(np.mean([r.flops for r in each])), float(np.mean([r.value("loss") for r in each])), k)
        for k, each in enumerate(members)
    )
    return [members[k] for *_, k in ranked], np.array([loss for _, loss, _ in ranked])


def by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    """The seeds of each setting together."""
    settings: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        settings[setting_of(row)].append(row)
    return list(settings.values())


def least_validated(settings: Iterable[list[Row]]) -> list[Row]:
    """The setting of least mean validation loss: what is compared in the end has no part in the choice."""
    return min(settings, key=lambda each: float(np.mean([row.validation_loss or np.inf for row in each])))


def setting_of(row: Row) -> Hashable:
    """Everything but the seed that decides a result: seeds of one setting share it."""
    return (
        Family.of(row),
        row.width,
        row.layers,
        row.data_fraction,
        row.structures_per_step,
        row.steps,
        row.learning_rate,
    )


assert set(SWITCHES) <= set(Family.__slots__)
