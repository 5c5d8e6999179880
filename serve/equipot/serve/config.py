"""What the operator decides: addresses, limits, device. Knows nothing of gRPC or torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from equipot.serve.batcher import Budget
from equipot.serve.errors import ServeError

MAX_PORT = 65535
MOST_RANKS = 64
LARGEST_MESSAGE_MB = 2047
"""protobuf's own limit is 2 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one structure and one request may hold.

    Attributes:
        structure_atoms: most atoms in one structure.
        structure_edges: most edges (pairs within the cutoff, both ways) in one structure.
        request_structures: most structures in one request.
        request_atoms: most atoms in one request.
        message_bytes: most bytes in one message, either way.
    """

    structure_atoms: int = 20_000
    structure_edges: int = 1_000_000
    request_structures: int = 20_000
    request_atoms: int = 1_000_000
    message_bytes: int = 64 * 2**20


BATCH_ATOMS = 16_384
"""Far more atoms than edges would let in, unless the atoms are isolated."""

DEFAULT_QUEUE_EDGES = 8_000_000
DEFAULT_LIMITS = RequestLimits()


def default_budget(device: str) -> Budget:
    """A processor computes no more edges a second from 4,000 on, and larger batches only make others wait."""
    batch_edges = 8_192 if device == "cpu" else 131_072
    return Budget(batch_edges=batch_edges, batch_atoms=BATCH_ATOMS, queue_edges=DEFAULT_QUEUE_EDGES)


CPU_BUDGET = default_budget("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How one server runs.

    Attributes:
        bundles: directories to serve; the first is the default model.
        host: name or address to listen on.
        port: 0 takes any free one.
        metrics_port: of the Prometheus endpoint; 0 takes any free one, None serves none.
        dtype: what the network computes in; None is what the bundle was stored in.
        device: as torch names it.
        threads: that compute; None lets each batch have as many as its work keeps busy.
        deterministic: whether a structure must get the same bits whatever shares its batch.
        tensor_parallel: over how many processes each model's weights are spread.
        drain_seconds: how long accepted requests may take to finish once the server is told to stop.
        linger_seconds: how long before that new calls are still taken, while health already says NOT_SERVING:
            so long callers and load balancers may take to look elsewhere.
        budget: of the batcher.
        limits: of requests.

    Raises:
        ServeError: a value out of range, with its bounds.
    """

    bundles: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int | None = 9090
    dtype: Literal["float32", "float64"] | None = None
    device: str = "cpu"
    threads: int | None = None
    deterministic: bool = False
    tensor_parallel: int = 1
    drain_seconds: float = 30.0
    linger_seconds: float = 0.0
    budget: Budget = CPU_BUDGET
    limits: RequestLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if not self.bundles:
            raise ServeError("no bundle to serve: name at least one directory written by `equipot export`")
        if not self.host:
            raise ServeError("host is empty: give a name or an address, such as 127.0.0.1 or 0.0.0.0")
        _check("port", self.port, 0, MAX_PORT)
        if self.metrics_port is not None:
            _check("metrics-port", self.metrics_port, 0, MAX_PORT)
        if self.threads is not None:
            _check("threads", self.threads, 1, 4096)
        _check("tensor-parallel", self.tensor_parallel, 1, MOST_RANKS)
        if not 0 <= self.drain_seconds <= 86_400:
            raise ServeError(f"drain-seconds is {self.drain_seconds}, allowed are 0 to 86400")
        if not 0 <= self.linger_seconds <= 3_600:
            raise ServeError(f"linger-seconds is {self.linger_seconds}, allowed are 0 to 3600")
        _check("max-batch-edges", self.budget.batch_edges, 1, None)
        _check("max-batch-atoms", self.budget.batch_atoms, 1, None)
        _check("max-queue-edges", self.budget.queue_edges, 1, None)
        _check("max-atoms", self.limits.structure_atoms, 1, None)
        _check("max-edges", self.limits.structure_edges, 1, None)
        _check("max-request-structures", self.limits.request_structures, 1, None)
        _check("max-request-atoms", self.limits.request_atoms, 1, None)
        _check("max-message-mb", self.limits.message_bytes // 2**20, 1, LARGEST_MESSAGE_MB)


def _check(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise ServeError(f"{name} is {value}, allowed are {allowed}")
