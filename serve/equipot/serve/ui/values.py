"""Single values of the page's JSON, checked as they come and made fit for JSON as they go."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from equipot.serve.errors import InvalidRequest

Json = dict[str, Any]


def text_of(body: Mapping[str, Any], name: str) -> str:
    """A word; empty if it is not there.

    Raises:
        InvalidRequest: it is no text.
    """
    value = body.get(name, "")
    # Half of a surrogate pair is a string to Python and JSON, and text to nobody.
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InvalidRequest(f"{name} is no text", field=name)
    return value


def one_of(body: Mapping[str, Any], name: str, known: Mapping[str, Any], *, usual: str) -> Any:  # noqa: ANN401
    """What a word stands for.

    Raises:
        InvalidRequest: it stands for nothing.
    """
    word = text_of(body, name) or usual
    if word not in known:
        raise InvalidRequest(f"{name} is {word[:100]!r}: give one of {', '.join(known)}", field=name)
    return known[word]


def number_of(body: Mapping[str, Any], name: str, *, usual: float, what: str, least: float = 0.0) -> float:
    """A finite number above `least`.

    Raises:
        InvalidRequest: it is none; `what` says what it should be.
    """
    value = body.get(name, usual)
    good = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared as it is: an integer may be beyond all floats.
    if not good or not least < value <= sys.float_info.max:
        raise InvalidRequest(f"{name} is no {what}", field=name)
    return float(value)


def steps_of(body: Mapping[str, Any], name: str, *, usual: int, most: int) -> int:
    """A number of steps, from 1 to `most`.

    Raises:
        InvalidRequest: it is none.
    """
    value = body.get(name, usual)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequest(f"{name} is no number of steps", field=name)
    if value > most:
        raise InvalidRequest(
            f"{name} is {value}, and the page runs at most {most}: leave longer work to `equipot relax` and"
            " `equipot md`",
            field=name,
        )
    return value


def finite(value: float) -> float | None:
    """What is not finite, as after an explosion, is no JSON."""
    return value if math.isfinite(value) else None


def matrix(raw: bytes) -> list[list[float | None]] | None:
    """(n, 3) float64; None for nothing."""
    if not raw:
        return None
    rows = np.frombuffer(raw, dtype="<f8").reshape(-1, 3)
    if np.isfinite(rows).all():
        return rows.tolist()
    return [[finite(value) for value in row] for row in rows.tolist()]
