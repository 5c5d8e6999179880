"""Sets up OpenTelemetry's traces for a command, as the standard OTEL_* variables of the environment ask.

This is the one place that knows the SDK and its exporter; client and server know the API alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER = "OTEL_TRACES_EXPORTER"


def set_up(environment: Mapping[str, str], service: str) -> str | None:
    """Traces from now on, if the environment asks for it.

    Args:
        environment: with OTEL_* variables; the SDK itself reads further ones, as of sampling and headers.
        service: name of the service where OTEL_SERVICE_NAME has none.

    Returns:
        Why it was asked for and is not done; None if all is well.
    """
    if not _is_wanted(environment):
        return None
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), "grpc")
    if protocol != "grpc":
        return f"no traces are sent: the OTLP protocol is {protocol!r}, and grpc is what is here"
    if importlib.util.find_spec("opentelemetry") is None:
        return "no traces are sent: OTEL_* variables ask for them, and that takes pip install 'equipot[otel]'"
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        return f"no traces are sent: {error.name} is missing; pip install 'equipot[otel]'"
    named = {} if environment.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: service}
    # Ends with the process, and sends what it still has.
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return None


def _is_wanted(environment: Mapping[str, str]) -> bool:
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporters = {name.strip() for name in environment.get(EXPORTER, "").split(",") if name.strip()}
    if exporters:
        return "otlp" in exporters
    return any(environment.get(name) for name in ENDPOINTS)
