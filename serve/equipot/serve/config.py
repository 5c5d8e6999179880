"""What the operator decides: addresses, limits, device. Knows nothing of gRPC or torch."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from equipot.serve.batcher import Budget
from equipot.serve.errors import ServeError
from equipot.serve.foreign.spec import CalculatorSpec
from equipot.serve.foreign.spec import anchored as anchored_calculator
from equipot.serve.jobs.settings import JobSettings
from equipot.serve.logs import LogFormat, LogLevel
from equipot.serve.mapping import read
from equipot.serve.repository.settings import RepositorySettings, anchored

MAX_PORT = 65535
MOST_RANKS = 64
LARGEST_MESSAGE_MB = 2047
"""protobuf's own limit is 2 GiB."""

SHORTEST_AGE, LONGEST_AGE = 10, 604_800
"""Seconds of a connection's age: each new one costs a handshake."""

DEFAULT_AGE, DEFAULT_KEEPALIVE = 1_800.0, 60.0
SHORTEST_KEEPALIVE = 10
"""Seconds between two questions whether the other side is there."""


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
class SessionLimits:
    """What sessions may hold, and how long who reads nothing is waited for.

    Attributes:
        most: sessions open at once.
        idle_seconds: without a step, after which one is ended; its caller may open it again.
        memory_bytes: most that all of them keep together, with the neighbour lists of motions: structures,
            and lists up to three quarters of it. Those without room for their lists go on without, those
            without any stay out.
    """

    most: int = 1_000
    idle_seconds: float = 600.0
    memory_bytes: int = 2**30

    @property
    def unread_seconds(self) -> float:
        """How long a reply of any call waits to be read, before the call is ended.

        Twice `idle_seconds`: what moves stops after once that, and what it found may be read as long again.
        """
        return 2 * self.idle_seconds


DEFAULT_SESSIONS = SessionLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The other machines that a model is spread over.

    Attributes:
        hosts: how many, beside the one that leads.
        host: name or address on which the leader waits for them.
        port: on which it waits; 0 takes any free one.
        key: file with what both sides know.
    """

    hosts: int
    host: str
    port: int
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How one server runs.

    Attributes:
        bundles: directories to serve; the first is the default model.
        calculators: potentials that are no bundles, to serve after these.
        repository: versioned bundles to serve besides; None serves none.
        admins: identities that may load, unload and label the models of the repository; "*" lets anyone who
            reaches the port, nobody closes the service.
        host: name or address to listen on.
        port: 0 takes any free one.
        metrics_port: of the Prometheus endpoint; 0 takes any free one, None serves none.
        dtype: what the network computes in; None is what the bundle was stored in.
        device: as torch names it.
        threads: that compute; None lets each batch have as many as its work keeps busy.
        deterministic: whether a structure must get the same bits whatever shares its batch.
        tensor_parallel: over how many processes each model's weights are spread.
        worker_hosts: how many other machines take their share of each model's ranks.
        worker_port: on which they are waited for.
        worker_key: file with what they and this server know.
        drain_seconds: how long accepted requests may take to finish once the server is told to stop.
        linger_seconds: how long before that new calls are still taken, while health already says NOT_SERVING:
            so long callers and load balancers may take to look elsewhere.
        budget: of the batcher.
        calibrate: whether each model's batches are settled by measuring it when it is loaded; the budget's
            numbers then hold only where that cannot be done.
        limits: of requests.
        sessions: what may be open at once, and for how long idle.
        jobs: that outlive their callers' connections; None keeps none.
        tls_cert: PEM file of the server's certificate and those that lead to its CA; None serves plaintext.
        tls_key: PEM file of its private key.
        tls_client_ca: PEM file of CAs; callers must show a certificate of one of them (mTLS). None asks for
            none.
        tokens: file of bearer tokens; callers must show one. None asks for none.
        allow_plaintext_tokens: whether tokens may come without TLS from other machines, for where something
            else encrypts.
        identity_limits: TOML file of what each identity may ask for; None limits nobody.
        reflection: whether callers may ask which services there are.
        metrics_host: where the Prometheus endpoint listens; None is `host`.
        max_connection_age: seconds after which callers are told to connect anew, so that they see new servers
            and certificates; 0 is never.
        keepalive: seconds of silence after which a caller is asked whether it is still there.
        ui: whether the page at /ui is offered where /metrics is; None offers it to this machine alone, and
            only if it is no way round what callers must show.
        log_format: of the log on stderr.
        log_level: from which on there are lines; each call has one of "info".
        log_structures: whether the log may hold what callers ask about.

    Raises:
        ServeError: a value out of range, with its bounds.
    """

    bundles: tuple[Path, ...] = ()
    calculators: tuple[CalculatorSpec, ...] = ()
    repository: RepositorySettings | None = None
    admins: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int | None = 9090
    dtype: Literal["float32", "float64"] | None = None
    device: str = "cpu"
    threads: int | None = None
    deterministic: bool = False
    tensor_parallel: int = 1
    worker_hosts: int = 0
    worker_port: int = 50052
    worker_key: Path | None = None
    drain_seconds: float = 30.0
    linger_seconds: float = 0.0
    budget: Budget = CPU_BUDGET
    calibrate: bool = False
    limits: RequestLimits = DEFAULT_LIMITS
    sessions: SessionLimits = DEFAULT_SESSIONS
    jobs: JobSettings | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tokens: Path | None = None
    allow_plaintext_tokens: bool = False
    identity_limits: Path | None = None
    reflection: bool = True
    metrics_host: str | None = None
    max_connection_age: float = DEFAULT_AGE
    keepalive: float = DEFAULT_KEEPALIVE
    ui: bool | None = None
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    log_structures: bool = False

    def __post_init__(self) -> None:
        if not self.bundles and not self.calculators and self.repository is None:
            raise ServeError(
                "no bundle to serve: name at least one directory written by `equipot export`, a --repository,"
                " or a --calculator"
            )
        if self.admins and self.repository is None:
            raise ServeError("--admin is about the models of a repository: give --repository")
        if not self.host:
            raise ServeError("host is empty: give a name or an address, such as 127.0.0.1 or 0.0.0.0")
        _check("port", self.port, 0, MAX_PORT)
        if self.metrics_port is not None:
            _check("metrics-port", self.metrics_port, 0, MAX_PORT)
        if self.threads is not None:
            _check("threads", self.threads, 1, 4096)
        _check("tensor-parallel", self.tensor_parallel, 1, MOST_RANKS)
        self._check_workers()
        if not 0 <= self.drain_seconds <= 86_400:
            raise ServeError(f"drain-seconds is {self.drain_seconds}, allowed are 0 to 86400")
        if not 0 <= self.linger_seconds <= 3_600:
            raise ServeError(f"linger-seconds is {self.linger_seconds}, allowed are 0 to 3600")
        _check("max-batch-edges", self.budget.batch_edges, 1, None)
        _check("max-batch-atoms", self.budget.batch_atoms, 1, None)
        _check("max-queue-edges", self.budget.queue_edges, 1, None)
        if not 0 < self.budget.ageing_seconds <= 86_400:
            raise ServeError(
                f"ageing-seconds is {self.budget.ageing_seconds:g}, allowed are seconds above 0 up to 86400"
            )
        _check("max-atoms", self.limits.structure_atoms, 1, None)
        _check("max-edges", self.limits.structure_edges, 1, None)
        _check("max-request-structures", self.limits.request_structures, 1, None)
        _check("max-request-atoms", self.limits.request_atoms, 1, None)
        _check("max-sessions", self.sessions.most, 0, None)
        if not 0 < self.sessions.idle_seconds <= 86_400:
            raise ServeError(
                f"session-idle is {self.sessions.idle_seconds:g}, allowed are seconds above 0 up to 86400"
            )
        _check("max-session-mb", self.sessions.memory_bytes // 2**20, 1, None)
        _check("max-message-mb", self.limits.message_bytes // 2**20, 1, LARGEST_MESSAGE_MB)
        if self.max_connection_age and not SHORTEST_AGE <= self.max_connection_age <= LONGEST_AGE:
            raise ServeError(
                f"max-connection-age is {self.max_connection_age:g}, allowed are {SHORTEST_AGE} to"
                f" {LONGEST_AGE} seconds, and 0 for never"
            )
        if not SHORTEST_KEEPALIVE <= self.keepalive <= 86_400:
            raise ServeError(
                f"keepalive is {self.keepalive:g}, allowed are {SHORTEST_KEEPALIVE} to 86400 seconds"
            )
        for name, allowed in (("log-format", get_args(LogFormat)), ("log-level", get_args(LogLevel))):
            if (value := getattr(self, name.replace("-", "_"))) not in allowed:
                raise ServeError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
        self._check_trust()

    @property
    def http_host(self) -> str:
        """Where /metrics and the page are."""
        return self.metrics_host or self.host

    @property
    def offers_page(self) -> bool:
        """Whether there is a page."""
        if self.ui is None:
            return self._against_page() is None and is_loopback(self.http_host)
        return self.ui

    def _against_page(self) -> str | None:
        """Why there cannot be a page."""
        if self.metrics_port is None:
            return "there is no HTTP port without metrics: give --metrics-port"
        if self.tls_client_ca is not None:
            return "callers must show certificates (--tls-client-ca), and HTTP asks for none"
        here = is_loopback(self.http_host)
        if is_loopback(self.host) and not here:
            return f"{self.http_host} is open to other machines, and the service at {self.host} is not"
        return None

    @property
    def encrypts_http(self) -> bool:
        """Whether /metrics and the page speak TLS, by the same certificate: where the page is asked for."""
        return bool(self.ui) and self.tls_cert is not None

    @property
    def workers(self) -> Workers | None:
        """The other machines, if there are any."""
        if not self.worker_hosts:
            return None
        assert self.worker_key is not None
        return Workers(hosts=self.worker_hosts, host=self.host, port=self.worker_port, key=self.worker_key)

    def _check_workers(self) -> None:
        _check("worker-hosts", self.worker_hosts, 0, MOST_RANKS - 1)
        _check("worker-port", self.worker_port, 0, MAX_PORT)
        if not self.worker_hosts:
            if self.worker_key is not None:
                raise ServeError("worker-key is what other machines must know: say how many by worker-hosts")
            return
        if self.worker_key is None:
            raise ServeError("worker-hosts needs worker-key: a file with random text that all of them have")
        if self.tensor_parallel % (self.worker_hosts + 1):
            raise ServeError(
                f"tensor-parallel is {self.tensor_parallel}, which {self.worker_hosts + 1} machines"
                " (worker-hosts and this one) cannot share evenly: give a multiple"
            )
        if len(self.bundles) != 1:
            raise ServeError(
                f"worker-hosts is for one model, {len(self.bundles)} bundles are given: start as many servers"
            )
        if self.repository is not None:
            raise ServeError(
                "worker-hosts is for one model, and a repository may hold any number: give it a server of its"
                " own"
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], *, base: Path) -> ServeConfig:
        """A configuration as a file has it: the attributes by name, `budget` and `limits` as tables.

        What is missing of the budget is what suits the device; batches are calibrated unless their edges are
        given or `calibrate` says otherwise.

        Args:
            mapping: the file's contents.
            base: the folder that relative paths start from.

        Raises:
            ServeError: a name is unknown, or a value of the wrong type or out of range.
        """
        device, budget = mapping.get("device", "cpu"), mapping.get("budget", {})
        filled = dict(mapping)
        if isinstance(device, str) and isinstance(budget, Mapping):
            filled["budget"] = {**asdict(default_budget(device)), **budget}
            filled.setdefault("calibrate", "batch_edges" not in budget)
        filled.setdefault("bundles", [])
        foreign = filled.get("calculators")
        if isinstance(foreign, list | tuple):
            filled["calculators"] = [
                anchored_calculator(one, base) if isinstance(one, Mapping) else one for one in foreign
            ]
        repository = filled.get("repository")
        if isinstance(repository, Mapping) and isinstance(url := repository.get("url"), str):
            filled["repository"] = {**repository, "url": anchored(url, base)}
        return read(cls, filled, base=base)

    def _check_trust(self) -> None:
        """What is asked of callers must fit together."""
        if self.ui and (reason := self._against_page()):
            raise ServeError(f"--ui: {reason}")
        if self.admins and "*" not in self.admins and self.tokens is None and self.tls_client_ca is None:
            raise ServeError(
                f"--admin {self.admins[0]} names callers that nothing here tells apart: give --tokens or"
                " --tls-client-ca, or --admin '*' to let anyone who reaches the port"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = (
                ("--tls-cert", "--tls-key") if self.tls_key is None else ("--tls-key", "--tls-cert")
            )
            raise ServeError(f"{given} is given and {missing} is not: a certificate and its key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ServeError(
                "--tls-client-ca asks callers for certificates, which takes --tls-cert and --tls-key"
            )
        plaintext = self.tls_cert is None and not is_loopback(self.host)
        if self.tokens is not None and plaintext and not self.allow_plaintext_tokens:
            raise ServeError(
                f"tokens would travel to {self.host} unencrypted: give --tls-cert and --tls-key, listen on"
                " 127.0.0.1, or say --allow-plaintext-tokens if something else encrypts (a mesh, a proxy)"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise ServeError(f"{name} is {value}, allowed are {allowed}")
