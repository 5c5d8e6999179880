"""Which of this machine's network interfaces leads to another machine. Knows no ranks."""

from __future__ import annotations

import socket

import psutil  # type: ignore[import-untyped]


def address_towards(host: str) -> str | None:
    """This machine's own address on the way to a host; None if there is no way or no such name."""
    try:
        found = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing: UDP only looks up the way
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return None


def interface_towards(host: str, *, beyond: bool) -> str | None:
    """The interface that leads to a host; None if that cannot be said.

    Args:
        host: by name or address; it may be this machine.
        beyond: other machines have to reach it, too: where a machine's own name means its loopback, the
            first interface that is up and leads elsewhere is meant.
    """
    address = address_towards(host)
    state, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    name: str
    for name, entries in addresses.items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            if beyond and _is_loopback(name):
                break
            return name
    if not beyond:
        return None
    elsewhere = [
        name
        for name, entries in addresses.items()
        if not _is_loopback(name)
        and name in state
        and state[name].isup
        and any(entry.family == socket.AF_INET for entry in entries)
    ]
    return next(iter(elsewhere), None)


def _is_loopback(name: str) -> bool:
    return any(
        entry.family == socket.AF_INET and entry.address.startswith("127.")
        for entry in psutil.net_if_addrs().get(name, [])
    )
