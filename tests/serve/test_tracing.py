"""Traces from client to kernel, by the real SDK into a real OTLP collector on a port."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from tests.serve.conftest import Bundles, ask, molecule, running
from tests.serve.test_sessions import opening, stepping

from equipot.cli.telemetry import set_up
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

SERVER, CLIENT, INTERNAL, ERROR = 2, 3, 1, 2


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans it is sent, with the name of the service they came from."""

    spans: list[tuple[str, Any]] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            service = {item.key: item.value.string_value for item in resource.resource.attributes}[
                "service.name"
            ]
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, service: str, trace_id: bytes, count: int) -> dict[str, Any]:
        """The spans of one trace by name, once there are so many of them."""
        deadline = time.monotonic() + 20
        while True:
            found = [span for name, span in self.spans if name == service and span.trace_id == trace_id]
            if len(found) >= count:
                assert len({span.name for span in found}) == len(found) == count
                return {span.name: span for span in found}
            assert time.monotonic() < deadline, [span.name for span in found]
            time.sleep(0.05)


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, int]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    kept = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, port
    server.stop(0).wait()


def variables(port: int) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "100"}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traced") / "log"


@pytest.fixture(scope="module")
def address(bundles: Bundles, collector: tuple[Collector, int], log: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables(collector[1]).items():
            environment.setenv(name, value)
        words = ("--threads", 1, "--log-format", "json", "--log-structures")
        with running(bundles.tiny, *words, stderr=log) as process:
            yield process.address
    assert "Traceback" not in log.read_text()


PREDICT = "equipot.wire.v1.PotentialService/Predict"


def test_the_server_goes_on_with_the_callers_trace(address: str, collector: tuple[Collector, int]) -> None:
    trace_id, parent = os.urandom(16), os.urandom(8)
    systems = [molecule(1), molecule(2)]
    with grpc.insecure_channel(address) as channel:
        metadata = (("traceparent", f"00-{trace_id.hex()}-{parent.hex()}-01"), ("x-request-id", "traced-1"))
        began = time.time_ns()
        PotentialServiceStub(channel).Predict(ask(systems), timeout=20, metadata=metadata)
        ended = time.time_ns()
    spans = collector[0].of("equipot-serve", trace_id, 4)
    whole = spans[PREDICT]
    assert whole.parent_span_id == parent
    assert whole.kind == SERVER
    known = attributes(whole)
    assert known["rpc.method"] == "Predict"
    assert known["equipot.request_id"] == "traced-1"
    assert (known["equipot.model"], known["equipot.structures"], known["equipot.atoms"]) == ("tiny", 2, 12)
    assert known["equipot.edges"] > 0
    parts = [spans[name] for name in ("prepare", "queue", "compute")]
    for part in parts:
        assert part.parent_span_id == whole.span_id
        assert part.kind == INTERNAL
        assert whole.start_time_unix_nano <= part.start_time_unix_nano
        assert part.end_time_unix_nano <= whole.end_time_unix_nano
    # Clocks are those of one machine; what is prepared waits, and then is computed.
    assert began <= whole.start_time_unix_nano < whole.end_time_unix_nano <= ended
    for before, after in itertools.pairwise(parts):
        assert before.end_time_unix_nano <= after.end_time_unix_nano
    assert attributes(spans["compute"])["equipot.batch.structures"] == 2


def test_a_session_is_traced_from_its_opening_to_its_end(
    address: str, collector: tuple[Collector, int]
) -> None:
    trace_id, parent = os.urandom(16), os.urandom(8)
    with grpc.insecure_channel(address) as channel:
        metadata = (("traceparent", f"00-{trace_id.hex()}-{parent.hex()}-01"),)
        words = iter([opening([molecule(1)]), stepping([molecule(1)])])
        assert len(list(PotentialServiceStub(channel).Session(words, timeout=20, metadata=metadata))) == 1
    spans = collector[0].of("equipot-serve", trace_id, 4)
    known = attributes(spans["equipot.wire.v1.PotentialService/Session"])
    assert (known["equipot.model"], known["equipot.structures"], known["equipot.atoms"]) == ("tiny", 1, 6)
    assert known["equipot.edges"] > 0
    assert (known["equipot.steps"], known["equipot.outcome"]) == (1, "ok")
    assert known["equipot.compute_seconds"] > 0
    assert attributes(spans["compute"])["equipot.batch.structures"] == 1


def test_structures_in_the_log_are_json_whatever_they_hold(address: str, log: Path) -> None:
    systems = [replace(molecule(1), positions=np.full((6, 3), bad)) for bad in (np.nan, np.inf)]
    with grpc.insecure_channel(address) as channel:
        stub, metadata = PotentialServiceStub(channel), (("x-request-id", "not-finite"),)
        assert len(stub.Predict(ask(systems), timeout=20, metadata=metadata).failures) == 2
    deadline = time.monotonic() + 20
    while not (lines := [line for line in log.read_text().splitlines() if "not-finite" in line]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    told = json.loads(lines[0], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert [one["positions"] for one in told["contents"]] == 2 * [[3 * [None]] * 6]
    assert told["contents"][0]["n_atoms"] == 6


def test_a_refused_call_is_traced_too(address: str, collector: tuple[Collector, int]) -> None:
    trace_id = os.urandom(16)
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        PotentialServiceStub(channel).Predict(
            ask([molecule(1)], model="unheard-of"),
            timeout=20,
            metadata=(("traceparent", f"00-{trace_id.hex()}-{'ab' * 8}-01"),),
        )
    span = collector[0].of("equipot-serve", trace_id, 1)[PREDICT]
    assert attributes(span)["equipot.outcome"] == "not_served"
    assert span.status.code != ERROR


def test_what_the_caller_did_not_sample_is_not_sent(address: str, collector: tuple[Collector, int]) -> None:
    left_out, kept = os.urandom(16), os.urandom(16)
    with grpc.insecure_channel(address) as channel:
        for trace_id, flag in ((left_out, "00"), (kept, "01")):
            metadata = (("traceparent", f"00-{trace_id.hex()}-{'ab' * 8}-{flag}"),)
            PotentialServiceStub(channel).Predict(ask([molecule(1)]), timeout=20, metadata=metadata)
    collector[0].of("equipot-serve", kept, 4)
    assert not [span for _, span in collector[0].spans if span.trace_id == left_out]


CALLER = """
import asyncio, os, sys
from equipot.cli.telemetry import set_up
assert set_up(os.environ, "a-program") is None
from opentelemetry import trace
from equipot.client import AsyncClient, Client, Structure, ModelNotFound
structure = Structure([1, 1], [[0, 0, 0], [0.8, 0, 0]])

async def ask(address):
    async with AsyncClient(address) as client:
        await client.predict(structure)

tracer = trace.get_tracer("its own")
for name in ("blocking", "parts", "async", "failing"):
    with tracer.start_as_current_span(name) as span:
        print(name, format(span.get_span_context().trace_id, "032x"))
        with Client(sys.argv[1], atoms_per_request=2 if name == "parts" else 4096) as client:
            if name == "async":
                asyncio.run(ask(sys.argv[1]))
            elif name == "failing":
                try:
                    client.model("unheard-of")
                except ModelNotFound:
                    pass
            else:
                client.predict([structure] * (2 if name == "parts" else 1))
"""


@pytest.fixture(scope="module")
def traces(address: str, collector: tuple[Collector, int]) -> dict[str, bytes]:
    """A program that traces, in a process of its own; its traces by name."""
    done = subprocess.run(
        [sys.executable, "-c", CALLER, address],
        env={**os.environ, **variables(collector[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: bytes.fromhex(trace) for name, trace in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_clients_of_both_kinds(kind: str, traces: dict[str, bytes], collector: tuple[Collector, int]) -> None:
    model = "equipot.wire.v1.PotentialService/GetModel"
    asked = collector[0].of("a-program", traces[kind], 3)
    answered = collector[0].of("equipot-serve", traces[kind], 5)
    for name in (PREDICT, model):
        assert asked[name].kind == CLIENT
        assert asked[name].parent_span_id == asked[kind].span_id
        assert answered[name].parent_span_id == asked[name].span_id
    assert asked[PREDICT].start_time_unix_nano <= answered["compute"].start_time_unix_nano
    assert answered["compute"].end_time_unix_nano <= asked[PREDICT].end_time_unix_nano


def test_parts_that_are_under_way_together(
    traces: dict[str, bytes], collector: tuple[Collector, int]
) -> None:
    spans = [
        span for name, span in collector[0].spans if name == "a-program" and span.trace_id == traces["parts"]
    ]
    assert [span.name for span in spans].count(PREDICT) == 2


def test_a_call_that_failed(traces: dict[str, bytes], collector: tuple[Collector, int]) -> None:
    spans = collector[0].of("a-program", traces["failing"], 2)
    span = spans["equipot.wire.v1.PotentialService/GetModel"]
    assert span.status.code == ERROR
    assert attributes(span)["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]


def test_nothing_is_imported_unless_asked() -> None:
    off = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_SDK_DISABLED": "true"}
    none = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1", "OTEL_TRACES_EXPORTER": "none"}
    program = (
        "import sys; from equipot.cli.telemetry import set_up\n"
        f"for variables in ({{}}, {off}, {none}): assert set_up(variables, 'x') is None\n"
        "from equipot.client import Client; Client('localhost:1')._connected()\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_cannot_be_done_is_said() -> None:
    asked = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    assert "protocol is 'http/protobuf'" in str(set_up(asked, "x"))
