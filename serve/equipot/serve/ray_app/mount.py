"""Registers our services with the gRPC server that Ray runs in each replica. Knows nothing of models.

Ray would hand every call to a method of the deployment: without its deadline, without the bytes of a message
that is none, and with a copy of the answer. A service that it lets pass is answered by our own handlers
instead, so that calls are the same as without Ray.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import grpc
from grpc_health.v1 import health_pb2_grpc

from equipot.serve import health
from equipot.serve.door import Door, Metadata
from equipot.serve.errors import RETRY_STARTING, NotReady
from equipot.serve.inference_protocol import SERVICE as INFERENCE
from equipot.serve.servicer import SERVICE
from equipot.serve.status import Context, refuse
from equipot.wire.inference import open_inference_pb2 as oip
from equipot.wire.v1 import potential_pb2 as pb

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class RayServer(Protocol):
    """What is asked here of Ray's gRPC server."""

    def add_passthrough_service(self, service_name: str) -> None:
        """Lets a service's handlers answer calls themselves."""

    def add_generic_rpc_handlers(self, generic_rpc_handlers: tuple[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """Registers handlers."""


@dataclass(frozen=True, slots=True)
class _Details:
    """What a call is known by before its handler is."""

    method: str
    invocation_metadata: Metadata


class Collector:
    """Stands in for a gRPC server while services are registered, and passes them on to Ray's.

    Args:
        door: what every call passes.
    """

    def __init__(self, door: Door) -> None:
        self._door = door
        self._handlers: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """As of grpc.aio.Server."""
        for handler in handlers:
            # What grpc makes of generated services and of ours; there is no other way to list its methods.
            self._handlers.update(handler._method_handlers)  # type: ignore[attr-defined]

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        """As of grpc.aio.Server: the same methods once more."""

    async def stop(self, grace: float | None) -> None:
        """Ray stops its server itself."""

    def mount(self, server: RayServer) -> None:
        """Lets Ray's server answer by these handlers."""
        _register(server, {name: _behind(self._door, name, each) for name, each in self._handlers.items()})


def mount_refusals(server: RayServer) -> None:
    """Answers every call with UNAVAILABLE: this process has no model, but another one soon will."""

    async def answer(requests: AsyncIterator[object], context: Context) -> None:
        await refuse(context, NotReady("no replica is ready yet", retry_after=RETRY_STARTING))

    refusal = grpc.stream_unary_rpc_method_handler(answer)
    _register(server, dict.fromkeys(_methods(), refusal))
    server.add_passthrough_service(health.SERVICE)
    health_pb2_grpc.add_HealthServicer_to_server(health.Health([SERVICE]), server)


def _methods() -> Iterator[str]:
    for file, service in ((pb, SERVICE), (oip, INFERENCE)):
        for method in file.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods:
            yield f"/{service}/{method.name}"


def _register(server: RayServer, handlers: dict[str, Handler]) -> None:
    by_service: dict[str, dict[str, Handler]] = {}
    for path, handler in handlers.items():
        _, service, method = path.split("/")
        by_service.setdefault(service, {})[method] = handler
    for service, methods in by_service.items():
        server.add_passthrough_service(service)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))


def _behind(door: Door, method: str, handler: Handler) -> Handler:
    """The handler behind the door, as an interceptor of a server of our own would have it."""

    async def continuation(details: grpc.HandlerCallDetails) -> Handler:
        return handler

    async def let_in(context: Context) -> Handler:
        details = cast("grpc.HandlerCallDetails", _Details(method, context.invocation_metadata() or ()))
        entered = await door.intercept_service(continuation, details)
        assert entered is not None
        return entered

    # grpc's types are those of servers with threads; under asyncio a behaviour is a coroutine.
    async def answer(request: Any, context: Context) -> Any:  # noqa: ANN401  # as gRPC has it
        entered: Any = await let_in(context)
        return await (entered.unary_unary or entered.stream_unary)(request, context)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: ANN401  # as gRPC has it
        entered: Any = await let_in(context)
        if entered.response_streaming:
            async for response in (entered.stream_stream or entered.unary_stream)(request, context):
                yield response
        else:
            # Turned away.
            await entered.stream_unary(request, context)

    makers: dict[tuple[bool, bool], Any] = {
        (False, False): (grpc.unary_unary_rpc_method_handler, answer),
        (False, True): (grpc.unary_stream_rpc_method_handler, stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, answer),
        (True, True): (grpc.stream_stream_rpc_method_handler, stream),
    }
    make, behaviour = makers[handler.request_streaming, handler.response_streaming]
    return cast("Handler", make(behaviour, handler.request_deserializer, handler.response_serializer))
