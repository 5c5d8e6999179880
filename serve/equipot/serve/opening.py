"""Everything that a server is told to serve, loaded: bundles, and what a repository holds. No gRPC."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from equipot.serve.config import ServeConfig
from equipot.serve.machine import gpu_bytes
from equipot.serve.metrics import Metrics
from equipot.serve.model_metrics import ModelMetrics
from equipot.serve.registry import Registry
from equipot.serve.repository.keeper import Keeper
from equipot.serve.shadow import Shadow


@dataclass(frozen=True, slots=True)
class Opened:
    """What is served; and without a repository None: what keeps it current, and who answers on trial."""

    registry: Registry
    keeper: Keeper | None = None
    shadow: Shadow | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being loaded, which cannot be interrupted."""
        return self.keeper is not None and self.keeper.busy

    def close(self) -> None:
        """Ends what the models hold besides memory."""
        if self.keeper is not None:
            self.keeper.close()
        if self.shadow is not None:
            self.shadow.close()
        for model in self.registry:
            model.engine.close()


async def open_models(config: ServeConfig, metrics: Metrics) -> Opened:
    """Loads what is to be in memory before the first call.

    A version of a repository that cannot be loaded keeps nothing else from being served.

    Raises:
        BundleError: a bundle that was named cannot be loaded.
        ServeError: two models have the same name, the device cannot be used, or there is no such repository.
    """
    registry = await asyncio.to_thread(Registry.load, config)
    counts = ModelMetrics(metrics)
    counts.watch(registry)
    metrics.watch_gpu(lambda: gpu_bytes(config.device))
    if config.repository is None:
        return Opened(registry)
    keeper = Keeper(config.repository, registry, config, counts)
    counts.watch_problems(lambda: len(keeper.problems))
    await keeper.start()
    shadow = Shadow(registry, metrics.registry)
    metrics.when_forgotten(shadow.forget)
    return Opened(registry, keeper, shadow)
