"""labels.toml: which version is stable, canary, shadow, or whatever else an operator calls it. Text alone."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping

from equipot.serve.registry import CANARY, SHADOW, Label
from equipot.serve.repository.versions import LABEL, is_version

FILE = "labels.toml"

_WEIGHTED = (CANARY, SHADOW)


class LabelError(ValueError):
    """Labels that cannot be; the message says what and why."""


def parse(text: str) -> dict[str, Label]:
    """The labels of a labels.toml.

    Each is `label = "version"`, or a table `[label]` with `version` and, for canary and shadow, `weight`.

    Raises:
        LabelError: it is no TOML, or a label, version or weight cannot be.
    """
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise LabelError(f"{FILE} is no TOML: {error}") from None
    return {name: _label(name, value) for name, value in data.items()}


def check(name: str, version: str, weight: float) -> Label:
    """One label.

    Raises:
        LabelError: the label, the version or the weight cannot be.
    """
    if not LABEL.fullmatch(name):
        raise LabelError(
            f"label {name[:100]!r}: use small letters, digits, dashes and underscores; begin with a letter"
        )
    if not is_version(version):
        raise LabelError(f"label {name}: {version[:100]!r} is no version")
    if not 0 <= weight <= 1:
        raise LabelError(f"label {name}: weight is {weight}, allowed are 0 to 1")
    if weight != 1 and name not in _WEIGHTED:
        raise LabelError(f"label {name}: weight is {weight}, but only {' and '.join(_WEIGHTED)} have one")
    return Label(version, weight)


def _label(name: str, value: object) -> Label:
    table: Mapping[str, object] = value if isinstance(value, Mapping) else {"version": value}
    if unknown := sorted(set(table) - {"version", "weight"}):
        raise LabelError(f"label {name}: unknown key {unknown[0]!r}; known are version and weight")
    version, weight = table.get("version"), table.get("weight", 1.0)
    # Whoever counts versions writes `stable = 3`; 1.10 would lose its zero, so it has to be text.
    if isinstance(version, bool) or not isinstance(version, int | str):
        raise LabelError(f"label {name}: version is {version!r}; give it as text or as an integer")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise LabelError(f"label {name}: weight is {weight!r}; give a number from 0 to 1")
    return check(name, str(version), float(weight))
