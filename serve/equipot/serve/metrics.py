"""What the server counts, for Prometheus, in a registry of its own. Knows nothing of gRPC or torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from equipot.serve.batcher import Depth
from equipot.serve.recent import Recent

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
STRUCTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FILLS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
EDGES = tuple(4**power for power in range(3, 12))

OK = "ok"
"""The outcome of what was answered; anything else is the reason why it was not."""

NO_MODEL = ""
"""The model label of requests that name none we serve: what callers invent must not become labels."""

STREAM_SECONDS = (0.1, 1.0, 10.0, 60.0, 600.0, 3_600.0, 21_600.0, 86_400.0)
STREAMS = ("session", "relax", "simulate")
"""Methods that answer by streams, in lower case."""

MISSES = {"deadline_unreachable": "door", "deadline_passed": "inside"}
"""Where requests are too late, by their outcome."""


class Metrics:
    """Counters, gauges and histograms of one server.

    Attributes:
        recent: what the last minutes were like.
        depth: what waits now.
    """

    def __init__(self) -> None:
        self.recent = Recent()
        self.depth: Callable[[], Depth] = _nothing_waits
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.in_flight = self._gauge("in_flight_requests", "Calls of Predict not answered yet")
        self.moving = self._gauge("moving_structures", "Structures that are being relaxed or simulated")
        self.sessions = self._gauge("sessions", "Sessions that are open")
        self.calls = self._gauge("calls", "Calls of all methods that were let in and have not ended")
        self.families = Families(self.registry)
        self._of_model: dict[tuple[str, str], ModelCounts] = {}
        self._told_forgotten: list[Callable[[str, str], None]] = []

    def of(self, model: str, version: str = "") -> ModelCounts:
        """What is counted of one version of a model; both empty for calls that reached none."""
        counts = self._of_model.get((model, version))
        if counts is None:
            counts = self._of_model[model, version] = ModelCounts(self.families, self.recent, model, version)
        return counts

    def when_forgotten(self, told: Callable[[str, str], None]) -> None:
        """Has somebody told of models and versions that are forgotten."""
        self._told_forgotten.append(told)

    def forget(self, model: str, version: str) -> None:
        """Drops what was counted of a version that is served no longer; should it come again, from 0 on."""
        if (counts := self._of_model.pop((model, version), None)) is not None:
            counts.forget()
        for told in self._told_forgotten:
            told(model, version)

    def now(self) -> dict[str, float]:
        """What is under way, by name."""
        gauges = {"in_flight": self.in_flight, "moving": self.moving, "sessions": self.sessions}
        return {name: _value(gauge) for name, gauge in gauges.items()}

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All of it as Prometheus reads it, and of which content type; `accept` is what it asked for."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is none
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type

    def watch_certificate(self, expires: Callable[[], float]) -> None:
        """Reports when the server's certificate ends, as a Unix time."""
        gauge = self._gauge("certificate_expires_timestamp_seconds", "When the TLS certificate in use ends")
        gauge.set_function(expires)

    def watch_queue(self, depth: Callable[[], Depth]) -> None:
        """Reports what waits; `depth` is called whenever somebody asks."""
        self.depth = depth
        requests = self._gauge("queue_requests", "Requests that wait for the engine")
        atoms = self._gauge("queue_atoms", "Atoms that wait for the engine")
        edges = self._gauge("queue_edges", "Edges that wait for the engine")
        seconds = self._gauge("queue_seconds", "Predicted time to compute all that is let in")
        requests.set_function(lambda: depth().requests)
        atoms.set_function(lambda: depth().atoms)
        edges.set_function(lambda: depth().edges)
        seconds.set_function(lambda: depth().seconds)

    def watch_intake(self, held_bytes: Callable[[], int]) -> None:
        """Reports the room that requests take; called whenever somebody asks."""
        self._gauge("request_bytes", "Of requests that are read or not yet answered").set_function(held_bytes)

    def watch_sessions(self, held_bytes: Callable[[], int]) -> None:
        """Reports what sessions and motions keep; called whenever somebody asks."""
        text = "Structures of sessions, and neighbour lists of sessions and motions"
        self._gauge("session_bytes", text).set_function(held_bytes)

    def watch_gpu(self, held_bytes: Callable[[], int]) -> None:
        """Reports the GPU's memory; called whenever somebody asks."""
        self._gauge("gpu_memory_bytes", "GPU memory that this process holds").set_function(held_bytes)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"equipot_{name}", text, registry=self.registry)


class Families:
    """All that is counted by model and version, before it is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._all: list[Counter | Histogram] = []
        self.requests = self._counter(
            "requests", "Calls of Predict, and others refused at the door, by outcome", "outcome"
        )
        self.deadline_misses = self._counter(
            "deadline_misses", "Requests that were too late: refused at the door, or let in", "where"
        )
        self.structures = self._counter("structures", "Structures, by how they ended", "outcome")
        self.outside_domain = self._counter(
            "structures_outside_domain", "Structures beyond the training domain, of callers who ask"
        )
        self.streams = self._counter(
            "streams", "Sessions, relaxations and simulations that ended, by outcome", "method", "outcome"
        )
        self.moved = self._counter(
            "moved_structures", "Structures that came to the end of their motion", "method", "outcome"
        )
        self.stream_seconds = self._histogram(
            "stream_seconds", "From a stream's opening to its end", STREAM_SECONDS, "method"
        )
        self.atoms = self._counter("atoms", "Atoms of answered structures")
        self.edges = self._counter("edges", "Edges of answered structures")
        self.batches = self._counter("batches", "Batches computed")
        self.exhausted = self._counter("batches_out_of_memory", "Batches that were halved for want of memory")
        self.wait_seconds = self._histogram("wait_seconds", "A structure's wait for the engine", SECONDS)
        self.prepare_seconds = self._histogram("prepare_seconds", "Checks and neighbour lists", SECONDS)
        self.compute_seconds = self._histogram("compute_seconds", "A batch in the engine", SECONDS)
        self.request_seconds = self._histogram("request_seconds", "An answered call in the server", SECONDS)
        self.batch_structures = self._histogram("batch_structures", "Structures in a batch", STRUCTURES)
        self.batch_edges = self._histogram("batch_edges", "Edges in a batch", EDGES)
        self.batch_fill = self._histogram("batch_fill", "Part of its budget that a batch used", FILLS)

    def remove(self, model: str, version: str) -> None:
        """Removes all series of a version."""
        for metric in self._all:
            metric.remove_by_labels({"model": model, "version": version})

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        labels = ["model", "version", *more]
        counter = Counter(f"equipot_{name}", text, labels, registry=self._registry)
        self._all.append(counter)
        return counter

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *more: str) -> Histogram:
        labels = ["model", "version", *more]
        histogram = Histogram(f"equipot_{name}", text, labels, registry=self._registry, buckets=buckets)
        self._all.append(histogram)
        return histogram


class ModelCounts:
    """What is counted of one version of one model. All of it is there from the start, at 0.

    Attributes:
        wait_seconds, prepare_seconds, compute_seconds: histograms.
    """

    def __init__(self, families: Families, recent: Recent, model: str, version: str) -> None:
        self._recent = recent
        self._requests = {OK: families.requests.labels(model, version, OK)}
        self._structures = {OK: families.structures.labels(model, version, OK)}
        self._families, self._labels = families, (model, version)
        self._misses = {
            outcome: families.deadline_misses.labels(model, version, where)
            for outcome, where in MISSES.items()
        }
        for method in STREAMS:
            families.streams.labels(model, version, method, OK)
            families.stream_seconds.labels(model, version, method)
        for method in STREAMS[1:]:
            families.moved.labels(model, version, method, OK)
        self._outside_domain = families.outside_domain.labels(model, version)
        self._atoms = families.atoms.labels(model, version)
        self._edges = families.edges.labels(model, version)
        self._batches = families.batches.labels(model, version)
        self._exhausted = families.exhausted.labels(model, version)
        self.wait_seconds = families.wait_seconds.labels(model, version)
        self.prepare_seconds = families.prepare_seconds.labels(model, version)
        self.compute_seconds = families.compute_seconds.labels(model, version)
        self._request_seconds = families.request_seconds.labels(model, version)
        self._batch_structures = families.batch_structures.labels(model, version)
        self._batch_edges = families.batch_edges.labels(model, version)
        self._batch_fill = families.batch_fill.labels(model, version)

    def request_answered(self, seconds: float) -> None:
        """Notes an answer that took so long in the server."""
        self._request_seconds.observe(seconds)
        self._recent.answered(seconds)

    def request_ended(self, outcome: str) -> None:
        """Notes how a call ended: `OK`, or the reason in lower case."""
        counter = self._requests.get(outcome)
        if counter is None:
            counter = self._requests[outcome] = self._families.requests.labels(*self._labels, outcome)
        counter.inc()
        if outcome in self._misses:
            self._misses[outcome].inc()

    def structures_ended(self, outcome: str, count: int = 1) -> None:
        """Notes how structures ended: `OK`, or the reason of their fault."""
        counter = self._structures.get(outcome)
        if counter is None:
            counter = self._structures[outcome] = self._families.structures.labels(*self._labels, outcome)
        counter.inc(count)

    def stream_ended(self, method: str, outcome: str, seconds: float) -> None:
        """Notes a stream of a method that ended after so long: `OK`, or the reason in lower case."""
        self._families.streams.labels(*self._labels, method, outcome).inc()
        self._families.stream_seconds.labels(*self._labels, method).observe(seconds)

    def moved(self, method: str, outcome: str) -> None:
        """Notes a structure that came to the end of its motion: `OK`, or the reason of its fault."""
        self._families.moved.labels(*self._labels, method, outcome).inc()

    def forget(self) -> None:
        """Removes all of it."""
        self._families.remove(*self._labels)

    def outside_domain(self) -> None:
        """Notes a structure unlike any in training, answered or refused."""
        self._outside_domain.inc()

    def out_of_memory(self) -> None:
        """Notes a batch that had to be halved."""
        self._exhausted.inc()

    def batch_done(
        self,
        *,
        outcomes: Mapping[str, int],
        atoms: int,
        edges: int,
        waits: Sequence[float],
        batch_edges: int,
        fill: float,
        seconds: float,
    ) -> None:
        """Notes one computed batch.

        Args:
            outcomes: how many structures ended how.
            atoms: of the structures that were answered.
            edges: of the structures that were answered.
            waits: each structure's seconds in the queue.
            batch_edges: of the whole batch.
            fill: the part of its budget that it used.
            seconds: in the engine.
        """
        for outcome, count in outcomes.items():
            self.structures_ended(outcome, count)
        self._atoms.inc(atoms)
        self._edges.inc(edges)
        self._batches.inc()
        self._recent.computed(structures=sum(outcomes.values()), atoms=atoms, edges=edges)
        self.compute_seconds.observe(seconds)
        self._batch_structures.observe(len(waits))
        self._batch_edges.observe(batch_edges)
        self._batch_fill.observe(fill)
        for wait in waits:
            self.wait_seconds.observe(wait)


def _nothing_waits() -> Depth:
    return Depth(requests=0, atoms=0, edges=0, seconds=0.0)


def _value(gauge: Gauge) -> float:
    (family,) = gauge.collect()
    return float(family.samples[0].value)
