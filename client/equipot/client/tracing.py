"""Spans of calls for OpenTelemetry, in programs that trace, and the caller's place in the trace on the wire.

A program that traces has OpenTelemetry's SDK imported when a client connects. In any other nothing is
imported, and calls take the same way as without this module.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import grpc.aio

if TYPE_CHECKING:
    from opentelemetry.trace import Span


class _Details(NamedTuple):
    """As gRPC hands it to interceptors; its own type has no name."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: Any
    compression: Any


class _Tracer:
    def __init__(self) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._tracer = trace.get_tracer("equipot.client")

    def start(self, method: str | bytes) -> tuple[Span, dict[str, str]]:
        """A span of a call, and the headers that tell the server of it."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = (method.decode() if isinstance(method, bytes) else method).strip("/")
        service, _, short = name.rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": short}
        span = self._tracer.start_span(name, kind=self._trace.SpanKind.CLIENT, attributes=attributes)
        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, context=self._trace.set_span_in_context(span))
        return span, headers

    def end(self, span: Span, code: grpc.StatusCode) -> None:
        """Ends the span of a call that ended so."""
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code is not grpc.StatusCode.OK:
            span.set_status(self._trace.StatusCode.ERROR, code.name)
        span.end()


class _Traced(grpc.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # at run time it takes none
    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer

    def intercept_unary_unary(
        self,
        continuation: Callable[[Any, Any], Any],
        client_call_details: Any,  # noqa: ANN401  # as gRPC has it
        request: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        span, headers = self._tracer.start(client_call_details.method)
        call = continuation(_with(client_call_details, headers), request)
        call.add_done_callback(lambda done: self._tracer.end(span, done.code()))
        return call


class _TracedAio(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # at run time it takes none
    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer

    async def intercept_unary_unary(
        self,
        continuation: Callable[[Any, Any], Any],
        client_call_details: Any,  # noqa: ANN401  # as gRPC has it
        request: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        span, headers = self._tracer.start(client_call_details.method)
        details = client_call_details
        metadata = [*(details.metadata or ()), *headers.items()]
        call = await continuation(details._replace(metadata=grpc.aio.Metadata(*metadata)), request)
        code = grpc.StatusCode.CANCELLED
        try:
            code = await call.code()
        except asyncio.CancelledError:
            call.cancel()
            raise
        finally:
            self._tracer.end(span, code)
        return call


def traced(channel: grpc.Channel) -> grpc.Channel:
    """The same channel, with a span for each call if this program traces."""
    if not _is_on():
        return channel
    return grpc.intercept_channel(channel, _Traced(_Tracer()))


def aio_interceptors() -> Sequence[grpc.aio.ClientInterceptor]:
    """The same for a channel of asyncio, which takes them when it is made."""
    # The stubs' base class hides that it is one.
    return [_TracedAio(_Tracer())] if _is_on() else []  # type: ignore[list-item]


def _is_on() -> bool:
    return "opentelemetry.sdk.trace" in sys.modules


def _with(details: Any, headers: dict[str, str]) -> _Details:  # noqa: ANN401  # gRPC's type has no name
    return _Details(
        details.method,
        details.timeout,
        [*(details.metadata or ()), *headers.items()],
        details.credentials,
        details.wait_for_ready,
        details.compression,
    )
