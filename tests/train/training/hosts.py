"""Hosts made of network namespaces: addresses, names and links of their own, and one file system."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


def why_not() -> str | None:
    """What is needed for such hosts and is not there."""
    if shutil.which("ip") is None:
        return "needs `ip` (package iproute2)"
    name = f"equipot-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"needs the right to make network namespaces (CAP_SYS_ADMIN): {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None


@dataclass
class Host:
    """One of them."""

    name: str
    namespace: str
    address: str
    names: Path
    """What names mean there: a file as /etc/hosts."""
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[str]:
        """Run something there; what it says goes to a file."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-ec"]
        setup = f'hostname {self.name}; mount --bind {self.names} /etc/hosts; exec "$@"'
        inside += [setup, "sh", *command]
        with log.open("w") as out:
            process = subprocess.Popen(
                inside,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                env={**_clean(), **environment},
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Of all processes there."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    def lose(self) -> None:
        """As when its power fails: the link first, so that nobody hears of what is killed then."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")
        self.kill()

    def kill(self) -> None:
        """All processes there, at once."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait(30)


@contextmanager
def made_hosts(count: int, home: Path) -> Iterator[list[Host]]:
    """So many hosts on one switch, itself in a namespace: nothing of this machine's network changes."""
    tag = f"eq{os.getpid()}"
    switch = f"{tag}-switch"
    names = home / "hosts"
    hosts = [Host(f"node{k}", f"{tag}-{k}", f"10.77.0.{k}", names) for k in range(1, count + 1)]
    lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in hosts)]
    names.write_text("\n".join(lines) + "\n")
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for k, host in enumerate(hosts):
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            peer = f"port{k}"
            _ip(
                *("-n", switch, "link", "add", peer, "type", "veth", "peer", "name", "eth0"),
                *("netns", host.namespace),
            )
            _ip("-n", switch, "link", "set", peer, "master", "br0", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", switch], check=False, capture_output=True)


def wait_until(ready: object, seconds: float, what: str) -> None:
    """Until a function is true."""
    assert callable(ready)
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def _clean() -> dict[str, str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
    return {name: value for name, value in os.environ.items() if name not in ranks}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
