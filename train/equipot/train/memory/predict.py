"""Memory and time of a recipe on so many ranks of this machine, from shapes and the machine's measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from equipot.train.memory.follow import follow_step
from equipot.train.memory.machine import Baseline, Rates
from equipot.train.memory.trace import Timeline
from equipot.train.memory.workload import Load, Workload
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured of it."""

    baseline: Baseline
    rates: Rates
    compiled: bool
    """whether messages are computed by compiled kernels"""


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a rank takes."""

    parts: Mapping[str, int]
    """bytes by what they are for, at the moment when most are needed"""
    process: int
    """bytes of a process that holds nothing of it, its share of libraries included"""
    phase: str
    """of a step, with that moment"""
    seconds: float
    """a step of average size"""
    timeline: Timeline

    @property
    def per_rank(self) -> int:
        """Bytes at most."""
        return sum(self.parts.values()) + self.process


def predict(recipe: Recipe, card: RunCard, ranks: int, work: Workload, machine: Machine) -> Prediction:
    """Follow the largest micro-batch for memory, and scale its work to the average one for time."""
    # Micro-batches beyond the second hold nothing more.
    followed = min(2, max(recipe.batch.accumulation, round(work.micro_batches)))
    once = recipe.model_copy(
        update={"batch": recipe.batch.model_copy(update={"accumulation": followed, "max_edges": None})}
    )
    timeline = follow_step(once, card, ranks, work.largest, compiled=machine.compiled)
    at = int(timeline.total.argmax())
    return Prediction(
        parts=timeline.peak(),
        process=machine.baseline.own + machine.baseline.files // ranks,
        phase=str(timeline.phase[at]),
        seconds=_seconds(timeline, followed, work, machine.rates),
        timeline=timeline,
    )


def _seconds(timeline: Timeline, followed: int, work: Workload, rates: Rates) -> float:
    def cost(load_share: float, first: int, last: int) -> float:
        flops = timeline.flops[last] - timeline.flops[first]
        touched = timeline.touched[last] - timeline.touched[first]
        calls = timeline.calls[last] - timeline.calls[first]
        return float(load_share * (flops / rates.gemm + touched / rates.bandwidth) + calls * rates.call)

    updates = (timeline.phase == "update").nonzero()[0]
    first_update = int(updates[0]) if len(updates) else len(timeline.phase) - 1
    share = _size(work.mean) / _size(work.largest)
    micro = cost(share, 0, first_update) / followed
    return micro * work.micro_batches + cost(1.0, first_update, len(timeline.phase) - 1)


def _size(load: Load) -> float:
    return float(load.edges + load.atoms)
