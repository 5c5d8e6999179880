"""Brings together what a file and what the command line say of a server. Knows no setting by itself."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from equipot.serve.errors import ServeError


def read_toml(path: Path) -> dict[str, object]:
    """The tables of a TOML file.

    Raises:
        ServeError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServeError(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ServeError(f"{path} is no TOML file: {error}") from error


def overlay(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Both mappings in one; where both have a value, `above` has the say, table by table."""
    merged = dict(below)
    for key, value in above.items():
        beneath = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(beneath, Mapping)
        merged[key] = overlay(beneath, value) if both else value  # type: ignore[arg-type]  # mypy sees no narrowing
    return merged
