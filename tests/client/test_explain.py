"""What the client makes of a server's forecasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from equipot.client import Client, ServerError
from equipot.client.batches import Part
from equipot.client.explanation import NOTHING, explained, together
from equipot.client.structures import as_structure
from equipot.wire.v1 import potential_pb2 as pb


def test_nothing_costs_nothing(server: Any) -> None:
    with Client(server.address) as client:
        explanation = client.explain([])
    assert explanation.n_requests == 0
    assert explanation.seconds == 0
    assert together([]) == NOTHING


def test_parts_wait_once_and_are_computed_one_after_the_other(
    server: Any, cluster: Callable[..., Atoms]
) -> None:
    frames = [cluster(4, seed=i) for i in range(6)]
    with Client(server.address, atoms_per_request=8, priority="low") as client:
        explanation = client.explain(frames)
    assert explanation.n_requests == 3
    assert explanation.n_batches == 3
    np.testing.assert_array_equal(explanation.n_edges, np.full(6, 8))
    assert explanation.queue_seconds == 0.25
    assert explanation.compute_seconds == 1.5
    assert explanation.total_seconds == pytest.approx(0.25 + 3 * 0.51)
    assert explanation.memory_bytes == 8_000
    assert explanation.priority == "low"
    assert explanation.round_trip_seconds > 0


def test_structures_that_are_never_sent_are_among_the_failures(
    server: Any, cluster: Callable[..., Atoms]
) -> None:
    broken = cluster(3)
    broken.positions[0] = np.nan
    with Client(server.address) as client:
        explanation = client.explain([broken, cluster(4), Atoms()])
    assert [failure.index for failure in explanation.failures] == [0, 2]
    np.testing.assert_array_equal(explanation.n_edges, [0, 8, 0])


@pytest.mark.parametrize(
    "reply",
    [pb.ExplainResponse(n_edges=[1]), pb.ExplainResponse(n_edges=[1, 2], failures=[pb.Failure(index=2)])],
    ids=["too few structures", "a failure of none"],
)
def test_a_forecast_that_does_not_fit_is_the_servers_error(
    cluster: Callable[..., Atoms], reply: pb.ExplainResponse
) -> None:
    part = Part()
    for n_atoms in (4, 5):
        part.add(as_structure(cluster(n_atoms)))
    with pytest.raises(ServerError, match="does not fit"):
        explained(part, reply, 0.1)


def test_a_priority_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="priority"):
        Client("localhost:1", priority="urgent")  # type: ignore[arg-type]
