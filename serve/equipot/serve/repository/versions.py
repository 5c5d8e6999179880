"""Names of models and versions, and which version is newer. Text alone."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a model may be called, as in a bundle."""

VERSION = re.compile(
    r"v?(\d{1,18}(?:\.\d{1,18})*)(?:-([0-9A-Za-z]+(?:[.-][0-9A-Za-z]+)*))?(?:\+[0-9A-Za-z.-]+)?"
)
"""An integer, or numbers with dots between them; then, as in semver, "-rc.1" for what comes before it."""

LABEL = re.compile(r"(?!v?\d|sha256$)[a-z][a-z0-9_-]{0,63}")
"""Begins with a letter and can be no version."""

MOST_LETTERS = 64

Key = tuple[tuple[int, ...], bool, tuple[tuple[bool, int, str], ...], str]


def is_version(text: str) -> bool:
    """Whether a folder of this name is a version."""
    return len(text) <= MOST_LETTERS and VERSION.fullmatch(text) is not None


def order(version: str) -> Key:
    """Sorts versions, the oldest first: 1 < 1.9-rc.1 < 1.9 < 1.10 < 2.

    Different names for one version, as "1" and "v1.0", go by their text.
    """
    found = VERSION.fullmatch(version)
    assert found is not None
    numbers = [int(number) for number in found[1].split(".")]
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    before = found[2]
    # In semver's order numbers come before words, and what has more parts after what has fewer.
    parts = tuple(
        (not part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in (before or "").split(".")
        if part
    )
    return tuple(numbers), before is None, parts, version
