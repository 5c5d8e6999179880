"""What a request would cost, told without computing it. Knows no gRPC, and no queue but its forecast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from equipot.model.batch import Graph
from equipot.serve.errors import Fault
from equipot.serve.job import Work
from equipot.serve.pace import NOTHING, Size
from equipot.serve.shares import Priority
from equipot.serve.terms import BatchLimit
from equipot.wire.v1.codec import Failure, FailureReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request whose structures were looked at.

    Attributes:
        sizes: of each structure; None for one that would fail.
        failures: of those.
        first_seconds: that preparing took up to where the engine could have begun.
        seconds: that preparing took in all.
    """

    sizes: Sequence[Size | None]
    failures: Sequence[Failure]
    first_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a request would cost; see `ExplainResponse` in the .proto for the fields."""

    prepared: Prepared
    n_batches: int
    memory_bytes: int
    queue_seconds: float
    compute_seconds: float
    total_seconds: float
    priority: Priority
    refusal: str


def estimate(
    work: Work, prepared: Prepared, *, queue_seconds: float, priority: Priority, refusal: str
) -> Estimate:
    """Puts the forecast together.

    Args:
        work: the request.
        prepared: its structures, looked at.
        queue_seconds: until it is computed, as far as the queue tells.
        priority: that it would have.
        refusal: why it would be refused now, "" if it would not.
    """
    key, capacity = work.key, work.key.model.capacity
    batches = list(_batches([size for size in prepared.sizes if size], capacity.limit))
    compute = sum(capacity.seconds(batch, forces=key.forces, stress=key.stress) for batch in batches)
    # While the engine computes what was ahead, and then the first batch, the rest is prepared.
    late = max(0.0, prepared.first_seconds - queue_seconds)
    rest = prepared.seconds - prepared.first_seconds
    return Estimate(
        prepared=prepared,
        n_batches=len(batches),
        memory_bytes=max((capacity.memory_bytes(batch) for batch in batches), default=0),
        queue_seconds=queue_seconds,
        compute_seconds=compute,
        total_seconds=queue_seconds + late + max(compute, rest) + capacity.around_seconds(work.size),
        priority=priority,
        refusal=refusal,
    )


def look_at(start: int, prepared: Sequence[Graph | Fault]) -> Iterator[Size | Failure]:
    """What was prepared from structure `start` on, without the graphs."""
    for index, one in enumerate(prepared, start):
        if isinstance(one, Fault):
            yield Failure(index, FailureReason(one.reason), one.field, one.message, one.remedy)
        else:
            yield Size(1, one.n_atoms, one.n_edges)


def _batches(sizes: Sequence[Size], limit: BatchLimit) -> Iterator[Size]:
    """As the queue would cut them if they were alone."""
    batch = NOTHING
    for size in sizes:
        larger = batch + size
        if batch.structures and (larger.edges > limit.edges or larger.atoms > limit.atoms):
            yield batch
            batch = size
        else:
            batch = larger
    if batch.structures:
        yield batch
