"""What the operator decides about replicas under Ray. Knows nothing of Ray itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from equipot.serve.config import ServeConfig
from equipot.serve.errors import ServeError
from equipot.serve.mapping import read

TABLE = "ray"
"""The table of a configuration that holds these settings."""

MOST_REPLICAS = 1_000

STOP_MARGIN = 60.0
"""Seconds beyond `drain_seconds` that a replica has to leave: proxies must hear of it first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    """How a Ray Serve application is spread.

    Attributes:
        name: of the application.
        replicas: how many servers; with `max_replicas`, how many at least.
        max_replicas: up to how many there may be while there is work; None keeps their number.
        open_edges: edges let in and not answered that a replica should have: more make more replicas.
        upscale_seconds: how long that must last before replicas are added.
        downscale_seconds: how long replicas must be too many before some are taken away.
        cpus: cores that each rank of a replica reserves; None is `threads`, or 1.
        gpus: that each rank of a replica reserves; None is 1 if the device is one, else 0.

    Raises:
        ServeError: a value out of range, with its bounds.
    """

    name: str = "equipot"
    replicas: int = 1
    max_replicas: int | None = None
    open_edges: int = 65_536
    upscale_seconds: float = 5.0
    downscale_seconds: float = 300.0
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        # HAProxy's configuration is written with it, and callers say it in a header.
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name):
            raise ServeError(f"ray.name is {self.name!r}; it takes letters from A to Z, digits, and . _ -")
        if not 1 <= self.replicas <= MOST_REPLICAS:
            raise ServeError(f"replicas is {self.replicas}, allowed are 1 to {MOST_REPLICAS}")
        if self.max_replicas is not None and not self.replicas <= self.max_replicas <= MOST_REPLICAS:
            raise ServeError(
                f"max-replicas is {self.max_replicas}, allowed are {self.replicas} (replicas) to"
                f" {MOST_REPLICAS}"
            )
        if self.open_edges < 1:
            raise ServeError(f"ray.open_edges is {self.open_edges}, allowed are 1 or more")
        for name in ("upscale_seconds", "downscale_seconds", "cpus", "gpus"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 86_400:
                raise ServeError(f"ray.{name} is {value:g}, allowed are 0 to 86400")


def split(mapping: Mapping[str, object], *, base: Path) -> tuple[ServeConfig, RaySettings]:
    """A file's contents as what each replica is told, and how replicas are spread.

    Raises:
        ServeError: something is unknown, of the wrong type, or cannot be had under Ray.
    """
    rest = {key: value for key, value in mapping.items() if key != TABLE}
    table = mapping.get(TABLE, {})
    if not isinstance(table, Mapping):
        raise ServeError(f"{TABLE} is {table!r}; it takes a table")
    settings = read(RaySettings, table, base=base, within=TABLE)
    config = ServeConfig.from_mapping(rest, base=base)
    if config.tls_cert is not None:
        raise ServeError(
            "Ray's proxy listens without TLS: leave out --tls-cert and let what stands before it encrypt"
            " (a gateway, a mesh), or serve without --ray"
        )
    if config.ui:
        raise ServeError(
            "--ui is a page of one server, and Ray's replicas have no port of their own for it: leave it out,"
            " or serve without --ray"
        )
    if config.jobs is not None:
        raise ServeError(
            "--jobs needs one server that has its folder for itself, and Ray starts the next replica before"
            " the last has ended: leave it out, or serve without --ray"
        )
    if config.admins and max(settings.replicas, settings.max_replicas or 0) > 1:
        raise ServeError(
            "--admin would reach one of several replicas, and the others would differ from it: leave it out"
            " and write labels.toml in the repository, which all of them read"
        )
    return config, settings
