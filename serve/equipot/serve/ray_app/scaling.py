"""How many replicas the open edges ask for. Ray pickles this module by value: it imports nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

METRIC = "open_edges"
"""What each replica reports: edges that it has let in and not answered."""


class Context(Protocol):
    """What is asked here of Ray's AutoscalingContext."""

    current_num_replicas: int
    target_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[object, float]] | None:
        """Each replica's reports, by metric."""


class ByOpenEdges:
    """A policy for Ray Serve: as many replicas as it takes for each to have no more edges than it should.

    Ray keeps to the least and the most replicas, and waits until a wish has lasted.
    """

    def __init__(self, open_edges: int) -> None:
        """Each replica should have at most `open_edges` edges open."""
        self._open_edges = open_edges

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """The number of replicas wanted, and nothing to remember."""
        reports = (context.aggregated_metrics or {}).get(METRIC, {})
        if not reports:
            return context.target_num_replicas, {}
        # A replica that has not reported yet is like the others: else each new one would ask for less.
        edges = sum(reports.values()) / len(reports) * max(context.current_num_replicas, len(reports))
        return max(1, math.ceil(edges / self._open_edges)), {}
