"""Finds ports, and sees whether one is free. Knows nothing of who uses them."""

from __future__ import annotations

import errno
import socket

from equipot.serve.errors import ServeError


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check_port(host: str, port: int) -> None:
    """Binds for a moment: the operating system names the reason, which gRPC keeps for its log.

    Raises:
        ServeError: somebody else has the port, or nobody may have it here.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServeError(f"port {port} is in use: stop the other server or choose --port") from error
        raise ServeError(f"cannot listen on {address(host, port)}: {error.strerror or error}") from error


def address(host: str, port: int) -> str:
    """Both as URLs and gRPC write them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
