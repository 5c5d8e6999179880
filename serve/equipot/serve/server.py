"""Assembles one server and runs it from the first bind to the last answer. Decides nothing about requests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from equipot.serve import admin, health, inference_protocol
from equipot.serve.admin import AdminServicer
from equipot.serve.call import Call
from equipot.serve.config import ServeConfig, is_loopback
from equipot.serve.dispatcher import Dispatcher
from equipot.serve.engine import use_threads
from equipot.serve.errors import NotReady, ServeError
from equipot.serve.free import address, check_port
from equipot.serve.heap import trim
from equipot.serve.http_side import HttpSide
from equipot.serve.inference_protocol import InferenceServicer
from equipot.serve.jobs import servicer as jobs
from equipot.serve.jobs.metrics import JobMetrics
from equipot.serve.jobs.servicer import JobServicer
from equipot.serve.metrics import Metrics
from equipot.serve.motion.servicer import MotionServicer
from equipot.serve.opening import Opened, open_models
from equipot.serve.registry import Registry
from equipot.serve.reread import keep_current
from equipot.serve.room import Room
from equipot.serve.servicer import RETRY_DRAINING, SERVICE, Gate, PotentialServicer
from equipot.serve.sessions import SessionServicer
from equipot.serve.tracing import call_tracer
from equipot.serve.trust import Trust, server_options
from equipot.serve.ui.page import Page, Services

LAST_ANSWERS_SECONDS = 2.0
"""Time for answers that are ready to leave, once nothing computes any more."""

WATCH_SECONDS = 0.5
"""How often health asks the engines whether they can compute."""

TRIM_SECONDS = 60.0
"""How often the gaps that batches of all sizes leave in memory are given back: they would grow for days, and
a container's limit counts them, too."""

OPEN_TO_ALL = (
    f"/{health.SERVICE}/",
    f"/{inference_protocol.SERVICE}/ServerLive",
    f"/{inference_protocol.SERVICE}/ServerReady",
)
"""What probes ask for, who have no token."""

logger = logging.getLogger(__name__)


async def run(config: ServeConfig, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then answers what was accepted; a second signal ends it at once.

    Args:
        config: what to serve, where and how.
        announce: called with each line for the operator: where metrics are, and when the server is ready.

    Raises:
        ServeError: it cannot start as asked.
        BundleError: a bundle cannot be loaded.
    """
    metrics = Metrics()
    stop = asyncio.Event()
    _on_signals(stop)
    use_threads(config.threads)
    async with contextlib.AsyncExitStack() as stack:
        server = GrpcServer(config, metrics, on_done=call_tracer())
        port = await server.start()
        try:
            if config.metrics_port is not None:
                http = server.http_side()
                await http.start(more=server.page().add_to if config.offers_page else None)
                stack.push_async_callback(http.stop)
                scheme = "https" if config.encrypts_http else "http"
                where = f"{scheme}://{address(config.http_host, http.port)}"
                announce(f"metrics on {where}/metrics")
                if config.offers_page:
                    announce(f"page on {where}/ui/")
            loading = asyncio.create_task(open_models(config, metrics))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                logger.info("stopped while loading")
                # The thread that loads cannot be interrupted, and nobody waits for what it loads.
                leave(0)
            opened = loading.result()
            # What is loaded stays: else each full collection would walk torch's objects, for tens of ms.
            gc.collect()
            gc.freeze()
            server.open(opened)
            watching = asyncio.create_task(server.watch(opened.registry))
            names = ", ".join(opened.registry.families) or "nothing yet"
            announce(f"serving {names} on {address(config.host, port)}")
            await stopping
            watching.cancel()
            await server.drain(config.drain_seconds, linger=config.linger_seconds)
            opened.close()
        finally:
            await server.stop()
    if server.computing or opened.busy:
        # What computes can only be abandoned with the process; nobody waits for it any more.
        leave(0)


def _behind_a_port(trust: Trust, config: ServeConfig) -> grpc.aio.Server:
    return grpc.aio.server(interceptors=[trust.door, trust.intake], options=server_options(config))


class GrpcServer:
    """The gRPC side: our service, health and reflection on one port."""

    def __init__(
        self,
        config: ServeConfig,
        metrics: Metrics,
        *,
        on_done: Callable[[Call], None] | None = None,
        make_server: Callable[[Trust, ServeConfig], grpc.aio.Server] = _behind_a_port,
    ) -> None:
        """Registers what is answered.

        Args:
            config: what to serve, where and how.
            metrics: what is counted.
            on_done: told each call when its answer has left; None if nobody wants to know.
            make_server: what the services are registered with, every call behind the door; by default a
                server of our own for `start`.
        """
        self._config = config
        self._metrics = metrics
        self._gate = Gate()
        self._health = health.Health([SERVICE])
        self._trust = Trust(config, metrics, open_to_all=OPEN_TO_ALL, on_done=on_done)
        self._dispatcher = Dispatcher(
            config.budget,
            metrics,
            in_compute_thread=lambda: use_threads(config.threads),
            share_of=self._trust.quotas.share_of,
        )
        self._admin = AdminServicer(config.admins, config.limits)
        self._server = make_server(self._trust, config)
        servicer = self._potential = PotentialServicer(
            self._gate, self._dispatcher, metrics, config.limits, log_structures=config.log_structures
        )
        servicer.add_to(self._server)
        room = Room(config.sessions.memory_bytes)
        metrics.watch_sessions(lambda: room.held)
        self._sessions = SessionServicer(servicer, self._dispatcher, metrics, config.sessions, room)
        self._sessions.add_to(self._server)
        self._motion = MotionServicer(
            servicer,
            self._dispatcher,
            metrics,
            most_atoms=config.limits.request_atoms,
            patience=config.sessions.idle_seconds,
            room=room,
            share_of=self._trust.quotas.share_of,
        )
        self._motion.add_to(self._server)
        self._jobs: JobServicer | None = None
        if config.jobs is not None:
            self._jobs = JobServicer(
                config.jobs,
                move=self._motion.moved,
                check=self._motion.check,
                find=lambda name, session: self._gate.registry().find(name, session=session),
                quotas=self._trust.quotas,
                limits=config.limits,
                metrics=JobMetrics(metrics.registry),
            )
            self._jobs.add_to(self._server)
        InferenceServicer(servicer, ready=lambda: self._health.serving).add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.admins:
            self._admin.add_to(self._server)
        if config.reflection:
            administered = (admin.SERVICE,) if config.admins else ()
            kept = (jobs.SERVICE,) if config.jobs is not None else ()
            ours = (SERVICE, *kept, *administered, inference_protocol.SERVICE)
            names = (*ours, health.SERVICE, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self._keeping: asyncio.Task[None] | None = None

    def http_side(self) -> HttpSide:
        """Where /metrics and the page are.

        Raises:
            ServeError: the certificate cannot be used.
        """
        config = self._config
        assert config.metrics_port is not None
        tls = self._trust.web_context() if config.encrypts_http else None
        return HttpSide(self._metrics, host=config.http_host, port=config.metrics_port, tls=tls)

    def page(self) -> Page:
        """The page to look at this server with; its calls pass the same door into the same queue."""
        return Page(
            Services(
                door=self._trust.door,
                potential=self._potential,
                motion=self._motion,
                metrics=self._metrics,
                limits=self._config.limits,
                only_here=is_loopback(self._config.http_host),
                patience=self._config.sessions.unread_seconds,
            )
        )

    @property
    def computing(self) -> bool:
        """Whether a batch is in the engine, which cannot be interrupted."""
        return self._dispatcher.computing

    async def start(self) -> int:
        """Listens, refusing calls until `open`; returns the port.

        Raises:
            ServeError: the port is in use or may not be used.
        """
        host, port = self._config.host, self._config.port
        check_port(host, port)
        try:
            bound = self._trust.add_port(self._server, address(host, port))
        except RuntimeError as error:
            raise ServeError(f"cannot listen on {address(host, port)}: {error}") from error
        await self._server.start()
        self.keep_current()
        return bound

    @property
    def held_bytes(self) -> int:
        """Of requests that are read or not yet answered."""
        return self._trust.intake.held

    def keep_current(self) -> None:
        """Looks at the files of certificates, tokens and limits now and then, until `stop`."""
        self._keeping = asyncio.create_task(keep_current(self._trust.changing))

    @property
    def open_edges(self) -> int:
        """Edges of requests that are let in and not answered; an estimate for those not prepared yet."""
        return self._dispatcher.open_edges

    def open(self, opened: Opened) -> None:
        """Serves these models."""
        self._gate.open(opened.registry, opened.shadow)
        if self._jobs is not None:
            self._jobs.open()
        if opened.keeper is not None:
            self._admin.open(opened.keeper)
        self._health.set(serving=opened.registry.ready)

    async def watch(self, registry: Registry) -> None:
        """Says by health whether every model can compute, and gives back memory, until cancelled."""
        trimmed = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            self._health.set(serving=registry.ready)
            if time.monotonic() >= trimmed + TRIM_SECONDS:
                await asyncio.to_thread(trim)
                trimmed = time.monotonic()

    async def drain(self, seconds: float, *, linger: float = 0.0) -> None:
        """Says NOT_SERVING at once, refuses new calls after `linger` s, ends those open `seconds` later.

        Callers that watch health (and whoever sends them) look elsewhere within `linger` without a refusal.
        """
        self._health.set(serving=False)
        if linger:
            logger.info("draining: new calls are taken for another %g s, health says NOT_SERVING", linger)
            await asyncio.sleep(linger)
        logger.info("draining: new calls are refused, accepted ones have %g s", seconds)
        self._gate.close()
        self._sessions.drain()
        if self._jobs is not None:
            await self._jobs.close()
        self._motion.drain()
        self._admin.close()
        try:
            await asyncio.wait_for(self._dispatcher.quiet(), seconds)
        except TimeoutError:
            logger.warning("requests were still open after %g s and are ended", seconds)
            self._dispatcher.abandon(
                NotReady("the server stopped before the answer was ready", retry_after=RETRY_DRAINING)
            )

    async def stop(self) -> None:
        """Ends every connection."""
        if self._keeping is not None:
            self._keeping.cancel()
        self._health.close()
        if self._jobs is not None:
            await self._jobs.close()
        await self._server.stop(LAST_ANSWERS_SECONDS)
        self._motion.close()
        self._dispatcher.close()
        logger.info("stopped")


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for its threads."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _on_signals(stop: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT sets the event, the second one ends the process."""

    def received(number: signal.Signals) -> None:
        if stop.is_set():
            logger.warning("%s again: leaving at once", number.name)
            leave(128 + number)
        logger.info("%s received", number.name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received, number)
