"""What a batch would cost, put together from a server's forecasts of its parts. No gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from equipot.client.batches import Part, Priority
from equipot.client.errors import ServerError
from equipot.client.results import ModelReference, same_model
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import Failure, Int64Array, decode_failures

_PRIORITIES: dict[int, Priority] = {pb.PRIORITY_LOW: "low", pb.PRIORITY_HIGH: "high"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What `predict` with the same structures would cost now; nothing was computed.

    Attributes:
        n_edges: (S,) int64 directed pairs within the cutoff; 0 for a structure that would fail.
        total_atoms: of the structures that would be computed.
        total_edges: of these.
        n_requests: into how many requests the client would cut them.
        n_batches: into how many batches the server would.
        memory_bytes: working memory of the largest batch at its peak; 0: not known.
        prepare_seconds: checks and neighbour lists.
        queue_seconds: until the first structure is computed, as far as the present queue tells.
        compute_seconds: in the engine; infinite, as the total, where nothing like it was computed yet.
        total_seconds: in the server.
        round_trip_seconds: there and back on top of it, as this call measured.
        priority: what it would be treated as.
        refusal: why the server would refuse it now ("QUEUE_FULL", "DEADLINE_UNREACHABLE"); empty if not.
        replica: what would compute it.
        failures: the structures that would fail, by index into the batch.
        model: that would compute them; None if nothing was sent.
    """

    n_edges: Int64Array
    total_atoms: int
    total_edges: int
    n_requests: int
    n_batches: int
    memory_bytes: int
    prepare_seconds: float
    queue_seconds: float
    compute_seconds: float
    total_seconds: float
    round_trip_seconds: float
    priority: Priority
    refusal: str
    replica: str
    failures: tuple[Failure, ...]
    model: ModelReference | None

    @property
    def seconds(self) -> float:
        """From asking to the answer, as the caller would measure it."""
        return self.total_seconds + self.round_trip_seconds


NOTHING = Explanation(
    n_edges=np.zeros(0, dtype=np.int64),
    total_atoms=0,
    total_edges=0,
    n_requests=0,
    n_batches=0,
    memory_bytes=0,
    prepare_seconds=0.0,
    queue_seconds=0.0,
    compute_seconds=0.0,
    total_seconds=0.0,
    round_trip_seconds=0.0,
    priority="normal",
    refusal="",
    replica="",
    failures=(),
    model=None,
)


def explained(part: Part, response: pb.ExplainResponse | None, seconds: float) -> Explanation:
    """What one request would cost.

    Args:
        part: its structures, and those that would not be sent.
        response: the server's forecast; None if there is nothing to send.
        seconds: that the forecast took, there and back.

    Raises:
        ServerError: the answer does not fit the request.
    """
    n_edges = np.zeros(len(part.n_atoms), dtype=np.int64)
    if response is None:
        return replace(NOTHING, n_edges=n_edges, failures=tuple(part.failures))
    if len(response.n_edges) != len(part.structures):
        raise ServerError(
            f"the answer does not fit the request: {len(response.n_edges)} structures are explained,"
            f" {len(part.structures)} were sent"
        )
    try:
        failures = [
            replace(failure, index=part.places[failure.index])
            for failure in decode_failures(response.failures)
        ]
    except IndexError as error:
        raise ServerError(f"the answer does not fit the request: {error}") from error
    n_edges[part.places] = response.n_edges
    return Explanation(
        n_edges=n_edges,
        total_atoms=response.total_atoms,
        total_edges=response.total_edges,
        n_requests=1,
        n_batches=response.n_batches,
        memory_bytes=response.memory_bytes,
        prepare_seconds=response.prepare_seconds,
        queue_seconds=response.queue_seconds,
        compute_seconds=response.compute_seconds,
        total_seconds=response.total_seconds,
        round_trip_seconds=max(0.0, seconds - response.explain_seconds),
        priority=_PRIORITIES.get(response.priority, "normal"),
        refusal=response.refusal,
        replica=response.replica,
        failures=tuple(sorted([*part.failures, *failures], key=lambda failure: failure.index)),
        model=ModelReference.from_wire(response.model),
    )


def together(parts: Sequence[Explanation]) -> Explanation:
    """What they would cost, sent a few at a time: one waits while another is computed.

    Raises:
        ModelChanged: different bundles would compute them.
    """
    total, start = NOTHING, 0
    failures: list[Failure] = []
    for part in parts:
        failures += [replace(failure, index=failure.index + start) for failure in part.failures]
        start += len(part.n_edges)
        model = same_model(total.model, part.model)
        wait = max(total.queue_seconds, part.queue_seconds)
        busy = total.total_seconds - total.queue_seconds + part.total_seconds - part.queue_seconds
        total = Explanation(
            n_edges=np.concatenate([total.n_edges, part.n_edges]),
            total_atoms=total.total_atoms + part.total_atoms,
            total_edges=total.total_edges + part.total_edges,
            n_requests=total.n_requests + part.n_requests,
            n_batches=total.n_batches + part.n_batches,
            memory_bytes=max(total.memory_bytes, part.memory_bytes),
            prepare_seconds=total.prepare_seconds + part.prepare_seconds,
            queue_seconds=wait,
            compute_seconds=total.compute_seconds + part.compute_seconds,
            total_seconds=wait + busy,
            round_trip_seconds=max(total.round_trip_seconds, part.round_trip_seconds),
            priority=part.priority if part.n_requests else total.priority,
            refusal=total.refusal or part.refusal,
            replica=total.replica or part.replica,
            failures=tuple(failures),
            model=model,
        )
    return total
