"""What the server counts, for Prometheus, in a registry of its own. Knows nothing of gRPC or torch."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from equipot.serve.batcher import Depth
from equipot.serve.errors import ServeError

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
STRUCTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
EDGES = tuple(4**power for power in range(3, 12))

OK = "ok"
"""The outcome of what was answered; anything else is the reason why it was not."""

NO_MODEL = ""
"""The model label of requests that name none we serve: what callers invent must not become labels."""


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        by_outcome = ["model", "outcome"]
        self.requests = self._counter(
            "requests", "Calls of Predict, and others refused at the door, by outcome", by_outcome
        )
        self.structures = self._counter("structures", "Structures, by how they ended", by_outcome)
        self.atoms = self._counter("atoms", "Atoms of answered structures", ["model"])
        self.edges = self._counter("edges", "Edges of answered structures", ["model"])
        self.batches = self._counter("batches", "Batches computed", ["model"])
        self.in_flight = self._gauge("in_flight_requests", "Calls of Predict not answered yet")
        self.sessions = self._gauge("sessions", "Sessions that are open")
        self.wait_seconds = self._histogram("wait_seconds", "A structure's wait for the engine", SECONDS)
        self.prepare_seconds = self._histogram("prepare_seconds", "Checks and neighbour lists", SECONDS)
        self.compute_seconds = self._histogram("compute_seconds", "A batch in the engine", SECONDS)
        self.request_seconds = self._histogram("request_seconds", "An answered call in the server", SECONDS)
        self.batch_structures = self._histogram("batch_structures", "Structures in a batch", STRUCTURES)
        self.batch_edges = self._histogram("batch_edges", "Edges in a batch", EDGES)

    def watch_certificate(self, expires: Callable[[], float]) -> None:
        """Reports when the server's certificate ends, as a Unix time."""
        gauge = self._gauge("certificate_expires_timestamp_seconds", "When the TLS certificate in use ends")
        gauge.set_function(expires)

    def watch_queue(self, depth: Callable[[], Depth]) -> None:
        """Reports what waits; `depth` is called from the endpoint's thread whenever somebody asks."""
        requests = self._gauge("queue_requests", "Requests that wait for the engine")
        atoms = self._gauge("queue_atoms", "Atoms that wait for the engine")
        edges = self._gauge("queue_edges", "Edges that wait for the engine")
        requests.set_function(lambda: depth().requests)
        atoms.set_function(lambda: depth().atoms)
        edges.set_function(lambda: depth().edges)

    def batch_done(
        self,
        model: str,
        *,
        outcomes: Mapping[str, int],
        atoms: int,
        edges: int,
        waits: Sequence[float],
        batch_edges: int,
        seconds: float,
    ) -> None:
        """Notes one computed batch.

        Args:
            model: that computed it.
            outcomes: how many structures ended how.
            atoms: of the structures that were answered.
            edges: of the structures that were answered.
            waits: each structure's seconds in the queue.
            batch_edges: of the whole batch.
            seconds: in the engine.
        """
        for outcome, count in outcomes.items():
            self.structures.labels(model, outcome).inc(count)
        self.atoms.labels(model).inc(atoms)
        self.edges.labels(model).inc(edges)
        self.batches.labels(model).inc()
        self.compute_seconds.labels(model).observe(seconds)
        self.batch_structures.labels(model).observe(len(waits))
        self.batch_edges.labels(model).observe(batch_edges)
        wait_seconds = self.wait_seconds.labels(model)
        for wait in waits:
            wait_seconds.observe(wait)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"equipot_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"equipot_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"equipot_{name}", text, ["model"], registry=self.registry, buckets=buckets)


class MetricsEndpoint:
    """Serves `/metrics` over HTTP for the length of a `with` block.

    Attributes:
        port: the one it listens on.

    Raises:
        ServeError: the port is in use or may not be used.
    """

    def __init__(self, metrics: Metrics, *, host: str, port: int) -> None:
        try:
            server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServeError(
                    f"metrics port {port} is in use: choose another --metrics-port (0 takes a free one)"
                    " or --no-metrics"
                ) from error
            raise ServeError(
                f"cannot serve metrics on {host} port {port}: {error.strerror or error}"
            ) from error
        self._server: WSGIServer = server
        self.port: int = server.server_port

    def __enter__(self) -> MetricsEndpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
