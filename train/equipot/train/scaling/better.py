"""Whether another architecture reaches the base's errors with less compute, source by source."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from equipot.train.scaling.compare import Effect, effect
from equipot.train.scaling.rows import Row
from equipot.train.scaling.slices import Family, by_setting, least_validated

SHARES = (0.25, 1.0)
WANTED_SOURCES = 2
"""On so many, at least, a better architecture has to reach the base's loss."""
_ALLOWED = 1.06
"""A share of the compute may be exceeded by so much: steps are whole numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Contest:
    """A candidate with a share of the base's compute, paired by seed with the base."""

    family: Family
    share: float
    pairs: tuple[tuple[Row, Row], ...]
    by_source: Mapping[str, Effect]
    """Ratios of the loss, of all sources together (`ALL`) and of each."""

    @property
    def reached(self) -> list[str]:
        """Sources on which the candidate's mean is not above the base's."""
        return [name for name, each in self.by_source.items() if name != ALL and each.ratio <= 1]

    @property
    def surely_reached(self) -> list[str]:
        """Those on which it is below in the eyes of the seeds."""
        return [name for name in self.reached if self.by_source[name].significant]

    @property
    def compute(self) -> float:
        """Model FLOPs of the candidate over those of its rival, as they were; the most of any pair."""
        return max(mine.flops / theirs.flops for theirs, mine in self.pairs)

    @property
    def clock(self) -> Effect | None:
        """Seconds of training over the rival's: of processes that shared their machine with others."""
        return effect([(a.seconds, b.seconds) for a, b in self.pairs if a.seconds and b.seconds])


ALL = "all sources"


def papers_family(rows: Sequence[Row]) -> Family | None:
    """What the paper trained, if it is among them: raw coordinates, no residuals, no normalisation."""
    found = [
        Family.of(row)
        for row in rows
        if row.inputs == "raw" and row.residual == "false" and row.normalisation == "none"
    ]
    # its forces were not equivariant, if that was trained too
    return max(sorted(found), key=lambda family: family.forces == "invariant", default=None)


def contests(rows: Sequence[Row], base: Family, candidates: Collection[Family] = ()) -> list[Contest]:
    """Candidates (by default all other architectures) at a quarter of the base's compute, and at all of it.

    A candidate's setting meets the best of the base's settings that took so many times its compute on the
    same data, of those that share an experiment with it if there are any; seeds meet seeds. Of a family's
    settings the one of least validation loss is taken. The most successful come first.
    """
    usable = [row for row in rows if row.usable and not row.holdout]
    plain = [row for row in usable if Family.of(row) == base]
    others = candidates or {Family.of(row) for row in usable if row.architecture != base.architecture}
    found = []
    for family in sorted(others):
        mine = [row for row in usable if Family.of(row) == family]
        for share in SHARES:
            best = _best(mine, plain, share)
            if best:
                by_source = _by_source(best)
                found.append(Contest(family, share, tuple(best), by_source))
    return sorted(found, key=lambda each: (each.share, -len(each.reached), each.by_source[ALL].ratio))


def _best(mine: Sequence[Row], plain: Sequence[Row], share: float) -> list[tuple[Row, Row]]:
    """Pairs (base, candidate) by seed of the candidate's best setting that has a rival."""
    found = []
    for setting in by_setting(mine):
        rivals = [each for each in by_setting(plain) if _meet(setting, each, share)]
        names = {name for row in setting for name in row.group}
        rivals = [each for each in rivals if any(names & set(row.group) for row in each)] or rivals
        if not rivals:
            continue
        by_seed = {row.seed: row for row in least_validated(rivals)}
        pairs = [(by_seed[row.seed], row) for row in setting if row.seed in by_seed]
        if pairs:
            found.append((setting, pairs))
    most = max((len(pairs) for _, pairs in found), default=0)
    best = least_validated([setting for setting, pairs in found if len(pairs) == most]) if found else []
    return next((pairs for setting, pairs in found if setting is best), [])


def _meet(candidate: Sequence[Row], rival: Sequence[Row], share: float) -> bool:
    one, other = candidate[0], rival[0]
    equal = one.data_fraction == other.data_fraction
    return equal and share / 1.5 < one.flops / other.flops <= share * _ALLOWED


def _by_source(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Effect]:
    sources = sorted({name for pair in pairs for row in pair for name in row.test.get("by_source", {})})
    wanted = {ALL: [(a.value("loss"), b.value("loss")) for a, b in pairs]}
    wanted |= {
        name: [(a.of_source(name, "loss"), b.of_source(name, "loss")) for a, b in pairs] for name in sources
    }
    effects = {
        name: effect([(one, two) for one, two in values if one and two]) for name, values in wanted.items()
    }
    return {name: each for name, each in effects.items() if each is not None}
