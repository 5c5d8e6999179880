"""The audit: two passes over everything, closer look at samples, findings; knows no page or command line."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from equipot.train.audit.blocks import KinSample, kin_keys, read_blocks
from equipot.train.audit.duplicates import (
    NO_SPLIT,
    TOLERANCE,
    Copies,
    Kind,
    Pairs,
    Sample,
    exact_copies,
    near_copies,
)
from equipot.train.audit.findings import Finding, NamedStore, name_stores, ordered, verdict
from equipot.train.audit.geometry_pass import GeometryStatistics, examine
from equipot.train.audit.outliers import judge_copies, judge_offsets, judge_outliers
from equipot.train.audit.pairs import PairStatistics, Step, near_steps, summarise
from equipot.train.audit.statistics import StoreStatistics
from equipot.train.audit.units import judge_labels
from equipot.train.errors import DataError
from equipot.train.mix import Mix
from equipot.train.places import in_blocks
from equipot.train.reference_fit import NormalEquations
from equipot.train.splits import NAMES, TRAIN
from equipot.train.store import N_ELEMENTS, Store

SAMPLE = 50_000
_PAIR_FRAMES = 6000
_PER_GROUP = 128
_FEW_PAIRS = 24
_CONSECUTIVE = 64


class AuditStopped(DataError):
    """An audit was asked to stop; nothing is written."""

    exit_code = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditOptions:
    """How closely to look.

    Attributes:
        sample: structures looked at for near copies, over all stores, and for distances, of each.
        seed: of the samples.
        tolerance: Å that distances in near copies may differ by.
    """

    sample: int = SAMPLE
    seed: int = 0
    tolerance: float = TOLERANCE


@dataclass(frozen=True, slots=True)
class StoreAudit:
    """One store, audited."""

    named: NamedStore
    statistics: StoreStatistics
    pairs: PairStatistics
    geometry: GeometryStatistics
    examined_all: bool


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found.

    Attributes:
        stores: in the order given.
        mix: folder of the mix whose splits were looked at, if any.
        references: level of theory → (119,) eV per atom.
        exact, near: copies.
        compared: structures compared for near copies, of `structures`.
        findings: the worst first.
        answer: in one line.
    """

    options: AuditOptions
    stores: tuple[StoreAudit, ...]
    mix: Path | None
    references: dict[str, NDArray[np.float64]]
    exact: dict[Kind, Pairs]
    near: Copies
    compared: int
    findings: tuple[Finding, ...]
    answer: str

    @property
    def structures(self) -> int:
        """Over all stores."""
        return sum(audit.statistics.structures for audit in self.stores)


Report = Callable[[str, float], None]
"""Called with what is being done, and the share of the whole that is done."""


class _Meter:
    """Tells how far the whole is, in structures weighted by what looking costs; asks whether to stop."""

    def __init__(self, total: float, report: Report, should_stop: Callable[[], bool]) -> None:
        self._total, self._report, self._should_stop = max(total, 1.0), report, should_stop
        self._done = 0.0
        self._what = ""
        self._spoke = 0.0

    def stage(self, what: str) -> None:
        self._what = what
        self.step(0.0)

    def step(self, cost: float) -> None:
        self._done += cost
        if self._should_stop():
            raise AuditStopped("the audit was stopped; nothing is written, run the same command again")
        now = time.monotonic()
        if cost == 0 or now - self._spoke > 0.1:
            self._spoke = now
            self._report(self._what, min(self._done / self._total, 1.0))


def audit_stores(
    stores: Sequence[Store],
    options: AuditOptions,
    *,
    mix: Mix | None = None,
    report: Report = lambda what, done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Audit:
    """Audits stores, each on its own and against each other; memory does not grow with them but for one byte
    a structure of a mix.

    Args:
        stores: those beside a mix's.
        options: how closely to look.
        mix: its stores come first, and its splits are looked at for leaks. Reference energies are fitted to
            its training split and to the other stores.
        report: told what is done.
        should_stop: asked often.

    Raises:
        DataError: a store is empty.
        AuditStopped: asked to stop.
    """
    tables = _split_tables(mix) if mix else []
    stores = [*(mix.stores if mix else ()), *stores]
    for store in stores:
        if not len(store):
            raise DataError(f"{store.path}: holds no structure, there is nothing to audit")
    named = name_stores(stores)

    def split_of(store: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if store >= len(tables):
            return np.full(len(indices), NO_SPLIT)
        return tables[store][indices].astype(np.int64)

    total = sum(len(store) for store in stores)
    looked = min(2 * options.sample, total) + sum(min(len(store), _PAIR_FRAMES) for store in stores)
    meter = _Meter(0.02 * 2 * total + looked + 0.5 * min(options.sample, total), report, should_stop)

    statistics = [StoreStatistics() for _ in stores]
    sums: dict[str, NormalEquations] = {}
    kin = KinSample(options.sample, options.seed)
    own = [KinSample(max(options.sample // len(stores), 1), options.seed) for _ in stores]
    in_pairs = [KinSample(_PAIR_FRAMES, options.seed, _PER_GROUP) for _ in stores]
    runs = [KinSample(_PAIR_FRAMES, options.seed) for _ in stores]
    for k, each in enumerate(named):
        meter.stage(f"{each.name}: reading")
        of_level = sums.setdefault(each.store.manifest.level_of_theory, NormalEquations())
        for block in read_blocks(each.store):
            statistics[k].add(block)
            fitted = split_of(k, block.indices) == (TRAIN if k < len(tables) else NO_SPLIT)
            of_level.add(block.counts[fitted], block.energy[fitted])
            kin.add(k, block.indices, kin_keys(block))
            own[k].add(k, block.indices, block.indices)
            in_pairs[k].add(k, block.indices, block.group)
            runs[k].add(k, block.indices, block.indices // _CONSECUTIVE)
            meter.step(0.02 * len(block))
    references = {level: each.solve(np.arange(N_ELEMENTS)) for level, each in sums.items()}
    for k, each in enumerate(named):
        meter.stage(f"{each.name}: energies against references")
        for block in read_blocks(each.store):
            statistics[k].add_residuals(block, references[each.store.manifest.level_of_theory])
            meter.step(0.02 * len(block))

    shared = kin.places()
    sample = Sample()
    audits = []
    for k, each in enumerate(named):
        meter.stage(f"{each.name}: distances")
        mine = shared[shared[:, 0] == k, 1]
        groups = dict(zip(mine.tolist(), each.store.values("group", mine).tolist(), strict=True))
        geometry = examine(
            each.store, k, own[k].places()[:, 1], mine, groups, split_of, sample, lambda: meter.step(1.0)
        )
        meter.stage(f"{each.name}: energies against forces")
        steps = _steps(
            each.store, in_pairs[k].places()[:, 1], runs[k].places()[:, 1], lambda: meter.step(1.0)
        )
        audits.append(StoreAudit(each, statistics[k], summarise(steps), geometry, own[k].complete))
    meter.stage("copies to the bit")
    exact = exact_copies(stores, split_of, lambda: meter.step(0.0))
    meter.stage("near copies")
    near = near_copies(stores, sample, options.tolerance, lambda: meter.step(0.5))
    findings = ordered(
        [
            *(f for a in audits for f in judge_labels(a.named, a.statistics, a.pairs, a.geometry)),
            *judge_copies(named, exact, near),
            *judge_offsets(named, statistics),
            *(f for a in audits for f in judge_outliers(a.named, a.statistics, a.geometry)),
        ]
    )
    return Audit(
        options=options,
        stores=tuple(audits),
        mix=None if mix is None else mix.path,
        references=references,
        exact=exact,
        near=near,
        compared=len(shared),
        findings=tuple(findings),
        answer=verdict(findings),
    )


def _steps(
    store: Store, by_group: NDArray[np.int64], in_runs: NDArray[np.int64], check: Callable[[], None]
) -> list[Step]:
    """Near frames within groups; where those are few, within runs of consecutive frames too."""
    groups = store.values("group", by_group).astype(np.int64)
    steps = near_steps(store, by_group, groups, check)
    if sum(step.strain == 0 for step in steps) < _FEW_PAIRS:
        steps += near_steps(store, in_runs, in_runs // _CONSECUTIVE, check)
    return steps


def _split_tables(mix: Mix) -> list[NDArray[np.int8]]:
    """For each of its stores the split of every structure."""
    tables = [np.full(len(store), NO_SPLIT, np.int8) for store in mix.stores]
    for number, name in enumerate(NAMES):
        for places in in_blocks(mix.part(name)):
            for k, table in enumerate(tables):
                table[places[places[:, 0] == k, 1]] = number
    return tables
