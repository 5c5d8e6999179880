"""Files that a calculator's arguments name: those that it reads, as weights, and those that it writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

Stamp = tuple[int, int, int]
"""Inode, bytes, and nanoseconds of the last change."""


def stamps(arguments: Mapping[str, Any]) -> dict[str, Stamp]:
    """Of the files that arguments name, by argument, so far as there are such files."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, str) and os.path.isfile(value):  # noqa: PTH113  # any text may be an argument
            now = Path(value).stat()
            found[name] = (now.st_ino, now.st_size, now.st_mtime_ns)
    return found


def written(arguments: Mapping[str, Any], before: Mapping[str, Stamp]) -> Set[str]:
    """Arguments whose files have changed since, or have come or gone."""
    now = stamps(arguments)
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}


def sha256(path: str) -> str:
    """Of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
