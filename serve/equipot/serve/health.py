"""grpc.health.v1 for a server whose services rise and fall together, and the two names that probes ask for.

grpcio's own servicer leaves watchers waiting when the server stops: they hold it up for the whole grace
period and end with a traceback. Here they are told, and then let go.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from equipot.serve.operation import to_its_end
from equipot.serve.status import Context

LIVENESS = "equipot.liveness"
"""SERVING while the process answers at all: also while models load, ranks are away, or the server drains."""

READINESS = "equipot.readiness"
"""SERVING while calls are answered, as the server as a whole and its services; apart for probes to name."""

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated, without types
    """One state for the given services and for the server as a whole, whose name is empty."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = {"", READINESS, LIVENESS, *services}
        self._serving = False
        self._closed = False
        self._change = asyncio.Event()

    @property
    def serving(self) -> bool:
        """The state now."""
        return self._serving

    def set(self, *, serving: bool) -> None:
        """Changes the state and tells the watchers."""
        if serving != self._serving:
            self._serving = serving
            self._tell()

    def close(self) -> None:
        """Lets the watchers go; the server stops."""
        self._closed = True
        self._tell()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The state now."""
        if request.service not in self._services:
            message = f"no service {request.service[:200]!r} here"
            await to_its_end(context.abort(grpc.StatusCode.NOT_FOUND, message))
        return self._response(request)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now and whenever it changes."""
        while not self._closed:
            change = self._change
            yield self._response(request)
            await change.wait()

    def _tell(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _response(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        states = health_pb2.HealthCheckResponse
        if request.service not in self._services:
            return states(status=states.SERVICE_UNKNOWN)
        serving = self._serving or request.service == LIVENESS
        return states(status=states.SERVING if serving else states.NOT_SERVING)
