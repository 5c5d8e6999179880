"""Lets a model on trial answer what others have answered, and records by how much it differs.

Its answers reach nobody. It computes in a thread of its own at the system's lowest priority, so callers and
their queue do not wait for it; what it cannot keep up with is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram

from equipot.model.batch import Graph
from equipot.serve.call import Call
from equipot.serve.engine import Result
from equipot.serve.errors import CallError, Fault
from equipot.serve.job import Answer, Key, Work
from equipot.serve.models import ServedModel
from equipot.serve.registry import SHADOW, Label, Registry

MOST_WAITING = 64
"""Requests that wait for the shadow; more would be answers of minutes ago."""

MOST_BYTES = 64 * 2**20
"""Of these requests and their answers together."""

SUMMARY_SECONDS = 10.0
"""Between two lines of the log."""

LOWEST_PRIORITY = 19

ENERGY_STEPS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
FORCE_STEPS = (1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Difference:
    """Of one structure: |ΔE| in eV per atom, and the largest |ΔF| in eV/Å; NaN without forces."""

    energy: float
    force: float


class _Sums:
    """What one line of the log says."""

    def __init__(self) -> None:
        self.count = 0
        self.energy = self.most_energy = self.most_force = 0.0

    def add(self, one: _Difference) -> None:
        """Takes a structure into account."""
        self.count += 1
        self.energy += one.energy
        self.most_energy = max(self.most_energy, one.energy)
        self.most_force = max(self.most_force, 0.0 if math.isnan(one.force) else one.force)


class Shadow:
    """All its methods are called in the event loop."""

    def __init__(self, registry: Registry, counters: CollectorRegistry) -> None:
        self._registry = registry
        names = ["model", "version", "shadow"]
        self._requests = Counter(
            "equipot_shadow_requests",
            "Requests that a shadow was to answer, too, by how that ended: ok, dropped, failed",
            [*names, "outcome"],
            registry=counters,
        )
        self._failures = Counter(
            "equipot_shadow_structures_failed",
            "Structures that were answered, and that the shadow could not answer",
            names,
            registry=counters,
        )
        self._energy = Histogram(
            "equipot_shadow_energy_difference_ev_per_atom",
            "Energy of the shadow against what was answered, per atom",
            names,
            registry=counters,
            buckets=ENERGY_STEPS,
        )
        self._force = Histogram(
            "equipot_shadow_force_difference_ev_per_angstrom",
            "Largest force of a structure by which the shadow differs from what was answered",
            names,
            registry=counters,
            buckets=FORCE_STEPS,
        )
        self._thread = ThreadPoolExecutor(1, "equipot-shadow", initializer=_lowest_priority)
        self._waiting: set[asyncio.Task[None]] = set()
        self._bytes = 0
        self._due: dict[tuple[str, str], tuple[str, float]] = {}
        self._sums: dict[tuple[str, str, str], _Sums] = {}
        self._told = -math.inf
        self._closed = False

    def offer(self, work: Work, answer: Answer) -> None:
        """Takes an answered request for the shadow of its model, if it has one; never waits nor fails."""
        model = work.key.model
        family = self._registry.families.get(model.name)
        label = None if family is None else family.labels.get(SHADOW)
        if family is None or label is None or self._closed or label.version == model.version:
            return
        if not self._is_due((model.name, model.version), label):
            return
        names = (model.name, model.version, label.version)
        slot = family.slots.get(label.version)
        size = _bytes_of(work, answer)
        too_much = len(self._waiting) >= MOST_WAITING or self._bytes + size > MOST_BYTES
        if slot is None or slot.model is None or too_much:
            self._requests.labels(*names, "dropped").inc()
            return
        # From here on, not only when it is computed: it would be closed below the computation.
        using = contextlib.ExitStack()
        using.enter_context(slot.model.in_use())
        self._bytes += size
        task = asyncio.get_running_loop().create_task(self._answer(slot.model, work, answer, names))
        self._waiting.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._waiting.discard(task)
            self._bytes -= size
            using.close()

        task.add_done_callback(done)

    def forget(self, model: str, version: str) -> None:
        """Drops what was counted of a version that is served no longer, on trial or not."""
        self._due.pop((model, version), None)
        for metric in (self._requests, self._failures, self._energy, self._force):
            for place in ("version", "shadow"):
                metric.remove_by_labels({"model": model, place: version})

    def close(self) -> None:
        """Forgets what waits."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _is_due(self, answered: tuple[str, str], label: Label) -> bool:
        """Whether this request of those that a model and version answered is one for the shadow.

        By turns, so that the share is right over few requests, too; each pair of versions has its own, lest
        requests that alternate give all of the one and none of the other.
        """
        shadow, due = self._due.get(answered, (label.version, 0.0))
        due = label.weight + (due if shadow == label.version else 0.0)
        taken = due >= 1.0
        self._due[answered] = label.version, due - taken
        return taken

    async def _answer(
        self, shadow: ServedModel, work: Work, answer: Answer, names: tuple[str, str, str]
    ) -> None:
        try:
            loop = asyncio.get_running_loop()
            found, failed = await loop.run_in_executor(self._thread, _compare, shadow, work, answer)
        except (CallError, asyncio.CancelledError, RuntimeError) as error:
            self._requests.labels(*names, "failed").inc()
            logger.info("shadow %s@%s: %s", names[0], names[2], error)
            return
        except Exception:
            self._requests.labels(*names, "failed").inc()
            logger.exception("shadow %s@%s failed", names[0], names[2])
            return
        self._requests.labels(*names, "ok").inc()
        self._failures.labels(*names).inc(failed)
        sums = self._sums.setdefault(names, _Sums())
        for one in found:
            sums.add(one)
            self._energy.labels(*names).observe(one.energy)
            if not math.isnan(one.force):
                self._force.labels(*names).observe(one.force)
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < SUMMARY_SECONDS:
            return
        self._told = now
        for (model, version, shadow), sums in self._sums.items():
            logger.info(
                "shadow %s@%s against %s@%s: %d structures, energy differs by %.3g eV/atom on average and"
                " %.3g at most, forces by %.3g eV/Å at most",
                *(model, shadow, model, version, sums.count),
                *(sums.energy / max(1, sums.count), sums.most_energy, sums.most_force),
            )
        self._sums.clear()


def _compare(shadow: ServedModel, work: Work, answer: Answer) -> tuple[list[_Difference], int]:
    """In the thread: differences of what both answered, and how many the shadow alone could not answer.

    Raises:
        CallError: the shadow has not this level of theory, or cannot compute now.
    """
    level = shadow.level_index(work.key.model.card.levels_of_theory[work.level])
    forces = work.key.forces and shadow.card.has_forces
    asked = replace(
        work, key=Key(shadow, forces, False), level=level, deadline=None, neighbors=None, call=Call()
    )
    known = {failure.index for failure in answer.predictions.failures}
    differences: list[_Difference] = []
    failed = 0
    for start, stop in asked.chunks():
        prepared = asked.prepare(start, stop)
        computed = _computed(shadow, [one for one in prepared if isinstance(one, Graph)], forces=forces)
        for index, one in enumerate(prepared, start):
            result = next(computed) if isinstance(one, Graph) else one
            if index in known:
                continue
            if isinstance(result, Result):
                differences.append(_difference(asked, answer, index, result))
            else:
                failed += 1
    return differences, failed


def _computed(shadow: ServedModel, graphs: list[Graph], *, forces: bool) -> Iterator[Result | Fault]:
    """Answers in order, in batches no larger than the shadow's own: they come on top of what callers take."""
    limit = shadow.capacity.limit
    batch: list[Graph] = []
    edges = atoms = 0
    for graph in graphs:
        edges, atoms = edges + graph.n_edges, atoms + graph.n_atoms
        if batch and (edges > limit.edges or atoms > limit.atoms):
            yield from shadow.engine.compute(batch, forces=forces, stress=False)
            batch, edges, atoms = [], graph.n_edges, graph.n_atoms
        batch.append(graph)
    if batch:
        yield from shadow.engine.compute(batch, forces=forces, stress=False)


def _bytes_of(work: Work, answer: Answer) -> int:
    """What a request and its answer take while they wait, about."""
    asked, told = work.structures, answer.predictions
    forces = 0 if told.forces is None else told.forces.nbytes
    return (
        asked.atomic_numbers.nbytes + asked.positions.nbytes + asked.cell.nbytes + told.energy.nbytes + forces
    )


def _difference(work: Work, answer: Answer, index: int, result: Result) -> _Difference:
    atoms = slice(work.offsets[index], work.offsets[index + 1])
    energy = abs(result.energy - float(answer.predictions.energy[index])) / (atoms.stop - atoms.start)
    told = answer.predictions.forces
    if told is None or result.forces is None:
        return _Difference(energy, math.nan)
    return _Difference(energy, float(np.linalg.norm(result.forces - told[atoms], axis=1).max()))


def _lowest_priority() -> None:
    """This thread computes when no other wants to; the threads that it starts inherit that."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
