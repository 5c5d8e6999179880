"""Reads frozen dataclasses from plain mappings, as TOML and YAML give them. Knows none of them.

Types come from the dataclass: what does not fit is refused by name, and so is what no field is called.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from equipot.serve.errors import ServeError

T = TypeVar("T")

_WORDS: Mapping[type, str] = types.MappingProxyType(
    {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path"}
)


class _Unfit(Exception):
    """A value is not of the wanted type, whose name it carries."""


def read(kind: type[T], mapping: Mapping[str, object], *, base: Path, within: str = "") -> T:
    """A dataclass from a mapping of its fields.

    Args:
        kind: the dataclass.
        mapping: values by field; tables for fields that are dataclasses. `false` and null are None where a
            field may be None.
        base: the folder that relative paths start from.
        within: the table's own name, for messages.

    Raises:
        ServeError: a key is unknown, one is missing, or a value is of the wrong type.
    """
    assert dataclasses.is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in fields:
            raise ServeError(f"{_dotted(within, key)} is no setting{_nearest(key, list(fields))}")
        try:
            values[key] = _fit(value, hints[key], base, _dotted(within, key))
        except _Unfit as error:
            raise ServeError(f"{_dotted(within, key)} is {value!r}; it takes {error}") from None
    for name, field in fields.items():
        missing = dataclasses.MISSING
        if name not in values and field.default is missing and field.default_factory is missing:
            raise ServeError(f"{_dotted(within, name)} is missing")
    return cast("T", kind(**values))


def _fit(value: object, wanted: Any, base: Path, name: str) -> object:  # noqa: ANN401  # a type, of any kind
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return _fit_any(value, arguments, base, name)
    if origin is Literal:
        if value in arguments:
            return value
        raise _Unfit(" or ".join(map(repr, arguments)))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _Unfit("a list")
        return tuple(_fit(item, arguments[0], base, name) for item in value)
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, Mapping):
            raise _Unfit("a table")
        return read(cast("type[object]", wanted), value, base=base, within=name)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _Unfit("a table")
        return dict(value)
    if issubclass(wanted, enum.Enum):
        return _fit_enum(value, wanted)
    return _fit_plain(value, wanted, base)


def _fit_any(value: object, kinds: tuple[Any, ...], base: Path, name: str) -> object:
    if type(None) in kinds and (value is None or (value is False and bool not in kinds)):
        return None
    refusals = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _fit(value, kind, base, name)
        except _Unfit as error:
            refusals.append(str(error))
    off = [] if type(None) not in kinds or bool in kinds else ["false"]
    raise _Unfit(" or ".join([*refusals, *off]))


def _fit_enum(value: object, wanted: type[enum.Enum]) -> enum.Enum:
    for member in wanted:
        if value in (member, member.value):
            return member
    raise _Unfit(" or ".join(repr(member.value) for member in wanted))


def _fit_plain(value: object, wanted: type, base: Path) -> object:
    if wanted is Path and isinstance(value, str | Path) and str(value):
        return base / Path(value).expanduser()
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if wanted is not Path and isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool):
        return value
    raise _Unfit(_WORDS.get(wanted, wanted.__name__))


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.6)
    return f"; do you mean {near[0]}?" if near else f"; settings here are {', '.join(known)}"


def _dotted(within: str, key: str) -> str:
    return f"{within}.{key}" if within else key
