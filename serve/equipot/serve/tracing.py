"""Spans of answered calls for OpenTelemetry, made when the answer has left.

Which of them are kept and where they go is settled before a server starts by whoever sets the tracer
provider: `equipot.cli.telemetry` does, from the OTEL_* variables. Where nobody has, nothing is imported or
noted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from equipot.serve.call import Call, Phase

SERVERS_FAULT = {"internal", "not_ready"}
"""Outcomes that a trace shows as errors of ours; by convention a server's span is no error for a caller's."""


def call_tracer() -> Callable[[Call], None] | None:
    """What makes the spans of a call that is done; None where tracing was not set up."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = trace.get_tracer("equipot.serve")
    propagator = TraceContextTextMapPropagator()

    def done(call: Call) -> None:
        # Spans want the time of day, and calls are timed by a clock that nobody sets.
        shift = time.time() - time.monotonic()
        service, _, method = call.method.strip("/").rpartition("/")
        span = tracer.start_span(
            call.method.strip("/"),
            context=propagator.extract({"traceparent": call.traceparent}),
            kind=trace.SpanKind.SERVER,
            start_time=_ns(call.started + shift),
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "enduser.id": call.identity,
                "equipot.request_id": call.request_id,
                "equipot.model": call.model,
                "equipot.structures": call.structures,
                "equipot.atoms": call.atoms,
                "equipot.edges": call.edges,
                "equipot.outcome": call.outcome,
                **_of_stream(call),
            },
        )
        if span.is_recording():
            if call.outcome in SERVERS_FAULT:
                span.set_status(trace.StatusCode.ERROR, call.outcome)
            inside = trace.set_span_in_context(span)
            for phase in call.phases or ():
                part = tracer.start_span(
                    phase.name,
                    context=inside,
                    start_time=_ns(phase.start + shift),
                    attributes=_attributes(phase),
                )
                part.end(_ns(phase.end + shift))
        span.end(_ns(call.started + call.seconds + shift))

    return done


def _of_stream(call: Call) -> dict[str, float]:
    """What is known of all steps of a stream, of which only the first ones have spans."""
    if not call.steps:
        return {}
    seconds = {f"equipot.{name}_seconds": spent for name, spent in (call.totals or {}).items()}
    return {"equipot.steps": call.steps, **seconds}


def _attributes(phase: Phase) -> dict[str, int]:
    return {
        f"equipot.batch.{name}": count
        for name, count in (("edges", phase.edges), ("structures", phase.structures))
        if count
    }


def _ns(seconds: float) -> int:
    return round(1e9 * seconds)
