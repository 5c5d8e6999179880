"""How the client connects: address, channel options, and the health protocol's one call."""

from __future__ import annotations

import json
import re
from enum import StrEnum

from equipot.client.errors import ClientError

HEALTH_METHOD = "/grpc.health.v1.Health/Check"

SPREAD = re.compile(r"(dns|ipv4|ipv6):")
"""Addresses that stand for as many servers as they lead to."""

SPREAD_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        # Servers that load, drain or have lost a rank are left out without a call being refused first.
        "healthCheckConfig": {"serviceName": "equipot.wire.v1.PotentialService"},
    }
)
"""gRPC's service config for these: calls go round over all servers that say SERVING."""

RESOLVE_SECONDS = 5
"""A name is looked up again when a connection ends, but not more often; gRPC's own default is 30."""


class Health(StrEnum):
    """What the server says of itself, as in grpc.health.v1."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"


def check_address(address: str) -> str:
    """The address itself, if gRPC can make something of it.

    Raises:
        ClientError: no port, or a URL's scheme.
    """
    if re.match(r"(?i)(https?|grpcs?)://", address):
        raise ClientError(f"address {address!r} is a URL; give HOST:PORT, for example localhost:50051")
    if re.match(r"(unix|unix-abstract|dns|ipv4|ipv6|xds):", address):
        return address
    port = re.fullmatch(r"(?:[^:\s/\[\]]+|\[[0-9a-fA-F:.%\w]+\]):(\d{1,5})", address)
    if port is None or not 0 < int(port[1]) < 65536:
        raise ClientError(f"address {address!r} is not HOST:PORT, for example localhost:50051")
    return address


def channel_options(address: str, max_message_bytes: int) -> list[tuple[str, int | str]]:
    """gRPC channel options, the same for both clients.

    An address with the scheme dns, ipv4 or ipv6 is all servers it leads to, and HOST:PORT one of them.
    """
    spread: list[tuple[str, int | str]] = [
        ("grpc.service_config", SPREAD_CONFIG),
        ("grpc.dns_min_time_between_resolutions_ms", 1000 * RESOLVE_SECONDS),
    ]
    return [
        *(spread if SPREAD.match(address) else []),
        ("grpc.max_send_message_length", max_message_bytes),
        # An answer is smaller than its request, unless most structures fail, each with its words.
        ("grpc.max_receive_message_length", 2 * max_message_bytes),
        # gRPC's default would let a client wait up to two minutes for a server that has long been back.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Servers with default settings end connections that ping more often than every five minutes; the
        # timeout also bounds how long unacknowledged data may hang on a dead link.
        ("grpc.keepalive_time_ms", 301_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def decode_health(raw: bytes) -> Health:
    """The status in a grpc.health.v1.HealthCheckResponse, whose one field is an enum.

    Read by hand: two bytes are not worth the dependency on a package of stubs.
    """
    statuses = {b"\x08\x01": Health.SERVING, b"\x08\x02": Health.NOT_SERVING}
    return statuses.get(raw, Health.UNKNOWN)
