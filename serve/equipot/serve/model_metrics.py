"""What is counted of models that come and go, for Prometheus. Knows nothing of gRPC or torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from equipot.serve.metrics import Metrics
from equipot.serve.models import ServedModel
from equipot.serve.registry import Registry

LOAD_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class ModelMetrics:
    """Counters of loading; what is in memory is read from the registry when somebody asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counters = counters = metrics.registry
        self._loads = Counter(
            "equipot_model_loads", "Versions loaded, by how it ended", ["model", "outcome"], registry=counters
        )
        self._load_seconds = Histogram(
            "equipot_model_load_seconds",
            "From storage to the first computed structure",
            ["model"],
            registry=counters,
            buckets=LOAD_SECONDS,
        )

    def watch(self, registry: Registry) -> None:
        """Reports every version and its state from now on."""
        self._counters.register(_Models(registry))

    def watch_problems(self, count: Callable[[], int]) -> None:
        """Reports how much is wrong in the repository from now on."""
        gauge = Gauge(
            "equipot_repository_problems", "What is wrong in the repository now", registry=self._counters
        )
        gauge.set_function(count)

    def loaded(self, model: ServedModel, seconds: float) -> None:
        """Notes a version that answers now."""
        self._loads.labels(model.name, "ok").inc()
        self._load_seconds.labels(model.name).observe(seconds)

    def load_failed(self, name: str) -> None:
        """Notes a version that cannot be loaded."""
        self._loads.labels(name, "failed").inc()

    def gone(self, model: ServedModel) -> None:
        """Drops what was counted of a version that is in memory no longer."""
        self._metrics.forget(model.name, model.version)


class _Models(Collector):
    """Reads the registry whenever somebody asks, over copies: whoever asks may be in another thread."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing ahead of time: else registering would collect."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The versions as they are now."""
        info = GaugeMetricFamily(
            "equipot_model_info",
            "1 for each model in memory",
            labels=["model", "version", "digest", "dtype", "force_mode"],
        )
        state = GaugeMetricFamily(
            "equipot_model_state",
            "1 for the state of each version: available, loading, ready, failed",
            labels=["model", "version", "state"],
        )
        label = GaugeMetricFamily(
            "equipot_model_label", "Weight of each label", labels=["model", "version", "label"]
        )
        place = ["model", "version"]
        ranks = GaugeMetricFamily("equipot_ranks", "Processes that compute together", labels=place)
        alive = GaugeMetricFamily("equipot_ranks_alive", "Those of them that can compute now", labels=place)
        most = GaugeMetricFamily("equipot_batch_edges_limit", "Most edges in one batch", labels=place)
        for family in list(self._registry.families.values()):
            for slot in list(family.slots.values()):
                state.add_metric([family.name, slot.version, str(slot.state)], 1)
                if (model := slot.model) is not None:
                    card = model.card
                    info.add_metric(
                        [model.name, model.version, card.digest, model.engine.dtype, card.force_mode], 1
                    )
                    size = model.engine.tensor_parallel
                    ranks.add_metric([model.name, model.version], size)
                    alive.add_metric([model.name, model.version], size if model.ready else 0)
                    most.add_metric([model.name, model.version], model.capacity.limit.edges)
            for name, target in list(family.labels.items()):
                label.add_metric([family.name, target.version, name], target.weight)
        yield from (info, state, label, ranks, alive, most)
