"""One replica: the same server as without Ray, reached through Ray's port. Decides nothing of its own."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import grpc

from equipot.serve.engine import use_threads
from equipot.serve.errors import ServeError
from equipot.serve.http_side import HttpSide
from equipot.serve.logs import configure
from equipot.serve.metrics import Metrics
from equipot.serve.opening import open_models
from equipot.serve.ray_app.mount import Collector, mount_refusals
from equipot.serve.ray_app.scaling import METRIC
from equipot.serve.ray_app.settings import split
from equipot.serve.ray_app.workers import call_workers
from equipot.serve.server import GrpcServer
from equipot.serve.tracing import call_tracer
from equipot.serve.trust import Trust

PATIENCE_SECONDS = 300.0
"""Ranks that died are started again by the replica; if they stay away longer, Ray replaces the replica."""

logger = logging.getLogger(__name__)


class Replica:
    """A Ray Serve deployment of one server.

    Args:
        mapping: a configuration, as a file holds it.
        base: the folder that its relative paths start from.

    Raises:
        ServeError: it cannot serve as asked.
        BundleError: a bundle cannot be loaded.
    """

    # Ray awaits it: what is loaded must know the loop that will answer.
    async def __init__(self, mapping: Mapping[str, object], base: str) -> None:  # type: ignore[misc]
        check_ingress()
        config, _ = split(mapping, base=Path(base))
        self._config, self._workers = call_workers(config)
        configure(self._config.log_format, self._config.log_level)
        use_threads(self._config.threads)
        metrics = Metrics()
        self._metrics: HttpSide | None = None
        self._server = GrpcServer(self._config, metrics, on_done=call_tracer(), make_server=self._collect)
        self._opened = await open_models(self._config, metrics)
        if self._config.metrics_port is not None:
            # Several replicas share a machine, so each takes a port of its own.
            self._metrics = HttpSide(metrics, host=self._config.http_host, port=0)
            await self._metrics.start()
            logger.info("metrics on port %d", self._metrics.port)
        gc.collect()
        gc.freeze()
        self._server.open(self._opened)
        self._server.keep_current()
        self._watching = asyncio.create_task(self._server.watch(self._opened.registry))
        self._seen_ready = time.monotonic()
        _here.append(self)

    def _collect(self, trust: Trust, config: object) -> grpc.aio.Server:
        self._services = Collector(trust.door)
        return cast("grpc.aio.Server", self._services)

    def attach(self, server: Any) -> None:  # noqa: ANN401  # Ray's gRPC server has no type of its own
        """Answers the calls that come to Ray's port."""
        self._services.mount(server)
        stop = server.stop

        async def drain_and_stop(grace: float | None) -> None:
            # Ray tells nobody else that it stops, and sessions would hold the port open until time is over.
            await self._server.drain(min(self._config.drain_seconds, grace or 0.0))
            await stop(grace)

        server.stop = drain_and_stop

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas is decided by."""
        return {METRIC: self._server.open_edges}

    def check_health(self) -> None:
        """Raises if another replica should take this one's place."""
        now = time.monotonic()
        if self._opened.registry.ready:
            self._seen_ready = now
        elif now - self._seen_ready > PATIENCE_SECONDS:
            raise ServeError(f"the models have not been ready for {now - self._seen_ready:.0f} s")

    async def __del__(self) -> None:
        self._watching.cancel()
        self._opened.close()
        if self._metrics is not None:
            await self._metrics.stop()
        await self._server.stop()


_here: list[Replica] = []
"""The replica of this process, if it is one: Ray makes both it and the server, and makes neither known to the
other."""


def mount(servicer: object, server: Any) -> None:  # noqa: ANN401  # Ray's gRPC server has no type of its own
    """What Ray calls to register services: in each replica, and in the proxy that stands in for them."""
    if _here:
        _here[-1].attach(server)
    else:
        mount_refusals(server)


def check_ingress() -> None:
    """Raises ServeError unless calls come to replicas directly, or through HAProxy."""
    from ray.serve._private import constants

    if not constants.RAY_SERVE_ENABLE_DIRECT_INGRESS:
        raise ServeError(
            "this Ray Serve passes calls through its Python proxy, which loses deadlines and takes many times"
            " as long: set RAY_SERVE_ENABLE_HA_PROXY=1 in the environment of every node before `ray start`"
        )
