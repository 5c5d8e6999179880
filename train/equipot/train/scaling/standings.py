"""Errors of models side by side: by source, on sources never trained on, and as shares of trivial ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from equipot.train.scaling.better import Contest
from equipot.train.scaling.compare import Effect, effect
from equipot.train.scaling.rows import Row
from equipot.train.scaling.slices import Family

LOSS, ENERGY, FORCES, COSINE = "loss", "energy_mae_per_atom", "force_mae", "force_cosine"
TRIVIAL = {LOSS: "references", ENERGY: "references", FORCES: "zero_forces"}
"""The baseline of each error: reference energies alone, and forces of zero. A cosine has none."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where errors are of."""

    name: str
    unseen: bool
    """A source that was never trained on."""
    error: Callable[[Row, str], float | None]
    trivial: Callable[[Row, str], float | None]
    balanced: bool = False
    """Errors are shares of the trivial ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """Seeds of one setting, and what they are compared with, paired by seed."""

    label: str
    rows: tuple[Row, ...]
    rivals: tuple[Row, ...]
    """In the order of the rows; none of the rival itself."""

    def values(self, place: Place, key: str) -> list[float]:
        """Of the seeds that have it."""
        return [value for row in self.rows if (value := place.error(row, key)) is not None]

    def against(self, place: Place, key: str) -> Effect | None:
        """The ratio to the rival over pairs; None of the rival itself."""
        if not self.rivals:
            return None
        pairs = [
            (place.error(a, key), place.error(b, key)) for a, b in zip(self.rivals, self.rows, strict=True)
        ]
        return effect([(a, b) for a, b in pairs if a and b])


def balanced(row: Row, key: str) -> float | None:
    """The mean over sources of an error divided by the trivial one there; of cosines, their plain mean.

    No source weighs more than another, however large its energies are. None where a source lacks a baseline.
    """
    shares = []
    for source in row.test.get("by_source", {}):
        error, trivial = row.of_source(source, key), _trivial_of_source(row, source, key)
        if error is None or (key in TRIVIAL and not trivial):
            return None
        shares.append(error / trivial if trivial else error)
    return float(np.mean(shares)) if shares else None


def places(rows: Sequence[Row]) -> list[Place]:
    """All that these rows were evaluated on: the test split, evenly, by source, and sources never seen."""
    sources = sorted({name for row in rows for name in row.test.get("by_source", {})})
    unseen = sorted({name for row in rows for name, found in row.unseen.items() if "problem" not in found})
    return [
        Place("mean of sources, each ÷ trivial", False, balanced, lambda _, key: float(key in TRIVIAL), True),
        *(_source(name) for name in sources),
        *(_unseen(name) for name in unseen),
        Place("all structures alike", False, lambda row, key: _of(row.test, key), _trivial_of_all),
    ]


def standings(found: Sequence[Contest], rival: str, base: Family) -> list[Standing]:
    """The rival first, then each candidate with all of its compute, if there are any."""
    equal = [each for each in found if each.share == 1.0]
    if not equal:
        return []
    theirs = {row.seed: row for each in equal for row, _ in each.pairs}
    ours = [
        Standing(each.family.label(base), tuple(b for _, b in each.pairs), tuple(a for a, _ in each.pairs))
        for each in equal
    ]
    return [Standing(rival, tuple(theirs[seed] for seed in sorted(theirs)), ()), *ours]


def verdict(standing: Standing, rival: str) -> Iterator[str]:
    """On how many sources it beats its rival, trained on or never seen, beyond the seeds' doubt."""
    there = places(standing.rows)[:-1]  # less the mean that one source dominates
    names = ((LOSS, "loss"), (ENERGY, "energy MAE"), (FORCES, "force MAE"))
    kinds = ((False, "held-out frames of sources trained on"), (True, "sources never trained on"))
    for unseen, words in kinds:
        mine = [each for each in there if each.unseen == unseen and not each.balanced]
        if not mine:
            yield f"{standing.label} on {words}: nothing was evaluated."
            continue
        parts = []
        for key, name in names:
            effects = {each.name: e for each in mine if (e := standing.against(each, key)) is not None}
            better = [n for n, e in effects.items() if e.significant and e.ratio < 1]
            worse = [n for n, e in effects.items() if e.significant and e.ratio > 1]
            doubt = [n for n in effects if n not in (*better, *worse)]
            parts.append(
                f"{name} below on {len(better)} of {len(effects)}"
                + (f", above on {', '.join(worse)}" if worse else "")
                + (f", not told apart by the seeds on {', '.join(doubt)}" if doubt else "")
            )
        whole = next((each for each in there if each.balanced), None)
        mean = standing.against(whole, FORCES) if whole is not None and not unseen else None
        yield (
            f"{standing.label} against {rival} on {words}, with the same frames and compute: "
            f"{'; '.join(parts)}."
            + (f" Mean of sources: {mean.words('force MAE')}." if mean is not None else "")
            + _useless(standing, mine)
        )


def _useless(standing: Standing, there: Sequence[Place]) -> str:
    worse = []
    for each in there:
        for key, name in ((ENERGY, "energies"), (FORCES, "forces")):
            values, trivial = standing.values(each, key), each.trivial(standing.rows[0], key)
            if values and trivial and np.mean(values) >= trivial:
                worse.append(f"{name} of {each.name}")
    return f" No better than the trivial baseline: {', '.join(worse)}." if worse else ""


def _source(name: str) -> Place:
    return Place(
        name,
        False,
        lambda row, key: row.of_source(name, key),
        lambda row, key: _trivial_of_source(row, name, key),
    )


def _unseen(name: str) -> Place:
    return Place(
        f"{name} (never seen)",
        True,
        lambda row, key: _of(row.unseen.get(name, {}), key),
        lambda row, key: _of(row.unseen.get(name, {}).get("baseline", {}), key) if key in TRIVIAL else None,
    )


def _trivial_of_source(row: Row, source: str, key: str) -> float | None:
    found = row.baselines.get(TRIVIAL.get(key, ""), {}).get("by_source", {})
    return _of(found.get(source, {}), key)


def _trivial_of_all(row: Row, key: str) -> float | None:
    return _of(row.baselines.get(TRIVIAL.get(key, ""), {}), key)


def _of(found: object, key: str) -> float | None:
    value = found.get(key) if isinstance(found, dict) else None
    return None if value is None else float(value)
