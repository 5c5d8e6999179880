"""Reads the file of what each identity may ask for. Knows no gRPC and no bookkeeping.

[default]
requests_per_second = 20

[identities.alice]
atoms_per_second = 100_000
weight = 2
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

from equipot.serve.errors import ServeError
from equipot.serve.quotas import Allowance, Allowances
from equipot.serve.reread import read_bytes

_RATES = ("atoms_per_second", "edges_per_second", "requests_per_second", "burst_seconds", "weight")
_COUNTS = ("concurrent_requests", "concurrent_streams", "request_atoms", "request_edges")
_PRIORITIES = ("low", "normal", "high")


def read_allowances(path: Path) -> Allowances:
    """What the file says.

    Raises:
        ServeError: it cannot be read or a value is wrong, with its place and what is allowed.
    """
    where = f"--identity-limits {path}"
    try:
        document = tomllib.loads(read_bytes(path, "--identity-limits").decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ServeError(f"{where} is not TOML: {error}") from error
    _known(document, ("default", "identities"), where)
    identities = _table(document.get("identities", {}), f"{where}, [identities]")
    return Allowances(
        default=_allowance(document.get("default", {}), f"{where}, [default]"),
        named={
            name: _allowance(entry, f"{where}, [identities.{name}]") for name, entry in identities.items()
        },
    )


def _allowance(entry: object, place: str) -> Allowance:
    table = _table(entry, place)
    _known(table, (*_RATES, *_COUNTS, "priority"), place)
    for name, value in table.items():
        if name in _RATES:
            right = _is_number(value) and value > 0
            wanted = "a positive number"
        elif name in _COUNTS:
            right = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            wanted = "a whole number, 0 or more"
        else:
            right = value in _PRIORITIES
            wanted = f"one of {', '.join(_PRIORITIES)}"
        if not right:
            raise ServeError(f"{place}: {name} is {value!r}, allowed is {wanted}")
    return Allowance(**table)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _table(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ServeError(f"{place} is {value!r}, and should be a table")
    return value


def _known(table: dict[str, Any], names: tuple[str, ...], place: str) -> None:
    for name in table:
        if name not in names:
            raise ServeError(f"{place}: {name!r} is not known; known are {', '.join(names)}")
