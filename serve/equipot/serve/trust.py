"""Puts together what the operator asks of callers: certificates, tokens, limits, manners of connections."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence

import grpc

from equipot.serve.call import Call
from equipot.serve.config import ServeConfig
from equipot.serve.door import Door
from equipot.serve.intake import Intake
from equipot.serve.metrics import NO_MODEL, Metrics
from equipot.serve.patience import Patience
from equipot.serve.quota_file import read_allowances
from equipot.serve.quotas import Allowances, Quotas
from equipot.serve.reread import Refreshable, Reread
from equipot.serve.tls import Certificates, TlsFiles
from equipot.serve.tokens import Tokens

AGE_GRACE = 300.0
"""Seconds that calls on a connection of full age still have."""

KEEPALIVE_ANSWER = 20.0
"""Seconds in which a silent caller must answer before its connection is given up."""

SHORTEST_PING = 10.0
"""Seconds between pings that a caller may send; more of them cost it the connection."""

HANDSHAKE = 20.0
"""Seconds for the start of a connection: who opens one and says nothing is not waited for."""

STREAMS = 1_024
"""Calls under way on one connection; the next ones wait at the caller."""

PENDING = 4_096
"""Calls that have come and that nobody has looked at yet, on all connections; far beyond it gRPC ends some of
them as CANCELLED, which is the one word it has for that."""

LARGEST_HEADERS = 16 * 1024
"""Bytes of a call's headers; a larger one is refused."""


class Trust:
    """What callers must show and may ask for, kept current with the files that say so.

    Attributes:
        door: every call's way in.
        intake: reads the requests of those who were let in; behind a port of our own alone.
        quotas: what each identity may ask for.

    Raises:
        ServeError: a file cannot be read or used.
    """

    def __init__(
        self,
        config: ServeConfig,
        metrics: Metrics,
        *,
        open_to_all: Sequence[str],
        on_done: Callable[[Call], None] | None,
    ) -> None:
        self._certificates: Certificates | None = None
        if config.tls_cert is not None and config.tls_key is not None:
            self._certificates = Certificates(TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca))
            metrics.watch_certificate(lambda: self._certificates.expires if self._certificates else 0.0)
        tokens = limits = None
        if (tokens_path := config.tokens) is not None:
            tokens = Reread("tokens", [tokens_path], lambda: Tokens.read(tokens_path))
        if (limits_path := config.identity_limits) is not None:
            limits = Reread("identity limits", [limits_path], lambda: read_allowances(limits_path))
        self._tokens, self._limits = tokens, limits
        self.quotas = Quotas(Allowances() if limits is None else limits.value)

        def refused(outcome: str) -> None:
            metrics.of(NO_MODEL).request_ended(outcome)

        def stream_ended(call: Call) -> None:
            method = call.method.rpartition("/")[2].lower()
            metrics.of(call.model, call.version).stream_ended(method, call.outcome, call.seconds)

        self.intake = Intake(config.limits.message_bytes, open_to_all=open_to_all, on_refusal=refused)
        metrics.watch_intake(lambda: self.intake.held)
        self.door = Door(
            tokens=tokens,
            quotas=self.quotas,
            open_to_all=open_to_all,
            certificates_name=config.tls_client_ca is not None,
            on_refusal=refused,
            on_stream=stream_ended,
            on_done=on_done,
            under_way=metrics.calls,
            patience=Patience(config.sessions.unread_seconds),
        )

    @property
    def changing(self) -> Sequence[Refreshable]:
        """What must be looked at now and then."""
        return [part for part in (self._certificates, self) if part is not None]

    def refresh(self) -> bool:
        """Reads tokens and limits again if their files have changed; streams of withdrawn tokens end."""
        new_tokens = self._tokens is not None and self._tokens.refresh()
        if new_tokens:
            self.door.withdraw()
        if self._limits is None or not self._limits.refresh():
            return new_tokens
        self.quotas.change(self._limits.value, now=time.monotonic())
        return True

    def web_context(self) -> ssl.SSLContext | None:
        """With which HTTPS is spoken; None if there is no certificate."""
        return None if self._certificates is None else self._certificates.web_context()

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Opens the port, with TLS if there is a certificate; returns it."""
        if self._certificates is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._certificates.credentials())


def server_options(config: ServeConfig) -> list[tuple[str, int]]:
    """gRPC's options of a server that strangers can reach."""
    age: list[tuple[str, int]] = []
    if config.max_connection_age:
        age = [
            ("grpc.max_connection_age_ms", _ms(config.max_connection_age)),
            ("grpc.max_connection_age_grace_ms", _ms(AGE_GRACE)),
        ]
    return [
        # Else two servers on one port would share its connections, and neither would know.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.limits.message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", LARGEST_HEADERS),
        ("grpc.absolute_max_metadata_size", LARGEST_HEADERS),
        ("grpc.max_concurrent_streams", STREAMS),
        # It counts calls that were answered and are not yet forgotten here, too: who keeps to the limit and
        # asks again at once would be refused, though nothing is overloaded.
        ("grpc.http.overload_protection", 0),
        ("grpc.server.max_pending_requests", PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * PENDING),
        # Else a connection sends megabytes ahead of what is read. What is read has its window opened anyway.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.server_handshake_timeout_ms", _ms(HANDSHAKE)),
        ("grpc.keepalive_time_ms", _ms(config.keepalive)),
        ("grpc.keepalive_timeout_ms", _ms(KEEPALIVE_ANSWER)),
        # A caller of long trajectories may keep an idle connection alive by pings.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(SHORTEST_PING)),
        *age,
    ]


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
