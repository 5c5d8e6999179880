"""`equipot doctor`: what this machine and this installation have, and how to get what is missing.

The light part is here; each heavier part asks its own package, which is imported only if it is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from equipot.cli.main import EXTRAS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Import names of packages whose distribution is called otherwise.
_DISTRIBUTIONS = {
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "prometheus_client": "prometheus-client",
}
_SMALL_SHARED_MEMORY = 1 << 30  # NCCL and torch's loaders fail with containers' usual 64 MiB
_PORT = 50051


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    section: str
    name: str
    value: str
    remedy: str | None
    """What to do about it; None if all is well."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks a heavier package: a function of (build: bool) that yields (name, value, remedy or None)."""

    section: str
    extra: str
    module: str
    function: str


PROBES = (
    Probe("computing", "model", "equipot.model.doctor", "findings"),
    Probe("training", "train", "equipot.train.doctor", "findings"),
)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    build: Annotated[
        bool, typer.Option("--build", help="Build the optional compiled kernel now, and say if that fails.")
    ] = False,
) -> None:
    """Say what this machine and this installation have, and how to get what is missing."""
    findings = list(examine(build=build))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for overflow in ("ignore", "ignore", "fold"):
        table.add_column(overflow=overflow)
    section = ""
    for finding in findings:
        title = f"[bold]{finding.section}[/]" if finding.section != section else ""
        section = finding.section
        remedy = "" if finding.remedy is None else f"\n[yellow]→ {escape(finding.remedy)}[/]"
        table.add_row(title, escape(finding.name), escape(finding.value) + remedy)
    Console().print(table)


def examine(*, build: bool) -> Iterator[Finding]:
    """All findings, section by section; a part that is absent or broken is a finding, never an error."""
    for section, findings in (("installation", _installation()), ("machine", _machine())):
        yield from (Finding(section, *finding) for finding in findings)
    for probe in PROBES:
        if not missing_from(probe.extra):
            yield from _ask(probe, build=build)


def missing_from(extra: str) -> list[str]:
    """Packages of an extra that are not installed, by import name."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


Line = tuple[str, str, str | None]


def _ask(probe: Probe, *, build: bool) -> Iterator[Finding]:
    try:
        found: Iterable[Line] = getattr(importlib.import_module(probe.module), probe.function)(build=build)
        yield from (Finding(probe.section, *line) for line in found)
    except Exception as error:
        # A package that is installed and cannot be imported is just what a doctor is called for.
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        remedy = f"install it anew: pip install --force-reinstall 'equipot[{probe.extra}]'"
        yield Finding(probe.section, probe.module, f"broken: {type(error).__name__}: {reason}", remedy)


def _installation() -> Iterator[Line]:
    yield "equipot", _version("equipot"), None
    yield "Python", f"{platform.python_version()} ({sys.executable})", None
    base = ("numpy", "grpcio", "protobuf")
    yield "client", _versions(base), None
    for extra, packages in EXTRAS.items():
        if not extra:
            continue
        missing = missing_from(extra)
        name = f"[{extra}]"
        if missing:
            absent = f"not installed: {', '.join(missing)}"
            yield name, absent, f"pip install 'equipot[{extra}]'"
        else:
            yield name, _versions(_DISTRIBUTIONS.get(package, package) for package in packages), None


def _versions(distributions: Iterable[str]) -> str:
    return ", ".join(f"{name} {_version(name)}" for name in distributions)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _machine() -> Iterator[Line]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}", None
    threads = os.environ.get("OMP_NUM_THREADS")
    yield "cores", f"{cores} usable" + (f", OMP_NUM_THREADS={threads}" if threads else ""), None
    memory = _memory()
    if memory is not None:
        yield "memory", memory, None
    yield "disk", f"{_gib(shutil.disk_usage(Path.cwd()).free)} free in {Path.cwd()}", None
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        remedy = "in a container: --shm-size=2g, or an emptyDir of medium Memory at /dev/shm"
        yield "/dev/shm", _gib(size), remedy if size < _SMALL_SHARED_MEMORY else None
    compiler = os.environ.get("CXX", "c++")
    path = shutil.which(compiler)
    optional = "optional; for faster messages on the CPU: apt-get install g++"
    yield "C++ compiler", path or f"none ({compiler})", None if path else optional
    busy = _is_taken(_PORT)
    yield f"port {_PORT}", "in use" if busy else "free", "serve on another: --port" if busy else None


def _memory() -> str | None:
    lines = _read("/proc/meminfo")
    if lines is None:
        return None
    fields = dict(line.split(":", 1) for line in lines.splitlines() if ":" in line)
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = (_read("/sys/fs/cgroup/memory.max") or "max").strip()
    capped = f", limited to {_gib(int(limit))} here" if limit.isdigit() and int(limit) < total else ""
    return f"{_gib(total)}, {_gib(free)} available{capped}"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return None


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
