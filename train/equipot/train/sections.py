"""What settings files have in common: strict sections, and mistakes told by key, value and remedy."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Section(BaseModel):
    """A table of a settings file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def parse_bytes(text: str) -> int:
    """A number of bytes from "120 GB", "1.5TiB" or the like.

    Raises:
        ValueError: not such a text, or less than one byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]+)\s*", text)
    value = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if not 1 <= value < 2**63:
        raise ValueError(f'{text!r} is no number of bytes, as "120 GB" or "1.5 TiB"')
    return int(value)


def read_toml(path: Path, what: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A file's plain values after ``section.key=value`` overrides; `what` is how messages call the file.

    Raises:
        ValueError: no such file, not TOML, or an override that is not written so.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such {what}; give the path of a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({error}); give the path of a TOML file") from error
    for override in overrides:
        apply_override(values, override)
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set what ``--set section.key=value`` names, in a file's plain values.

    Raises:
        ValueError: it is not written so, or names a value as if it were a section.
    """
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"--set {override}: write it as section.key=value, e.g. optimizer.epochs=10")
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string: --set precision=bf16
    section = values
    for name in names[:-1]:
        inner = section.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override}: {name} is a value, not a section")
        section = inner
    section[names[-1]] = value


def explain(
    error: ValidationError, model: type[BaseModel], what: str, elsewhere: Mapping[str, str] | None = None
) -> str:
    """A validation's problems on one line: key, value, what is wrong, the remedy.

    Args:
        error: of `model.model_validate`.
        model: of the whole file.
        what: how the file is called, as "recipe".
        elsewhere: keys that people look for and that are deliberately absent, with the answer.
    """
    problems = (_explain(dict(item), model, what, elsewhere or {}) for item in error.errors())
    return "; ".join(dict.fromkeys(problems))


def _explain(problem: dict[str, Any], model: type[BaseModel], what: str, elsewhere: Mapping[str, str]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or what
    if problem["type"] == "extra_forbidden":
        return _explain_unknown(location, model, elsewhere)
    if problem["type"] == "value_error":
        return f"{key}: " + str(problem["msg"]).removeprefix("Value error, ")
    meaning = _describe(location, model)
    hint = f" ({meaning})" if meaning else ""
    if problem["type"] == "missing":
        return f"{key} is missing{hint}; add it to the {what}"
    return f"{key} = {_show(problem.get('input'))}: {str(problem['msg']).lower()}{hint}"


def _explain_unknown(location: Sequence[str], model: type[BaseModel], elsewhere: Mapping[str, str]) -> str:
    key = ".".join(location)
    for prefix, answer in elsewhere.items():
        if key == prefix or key.startswith(prefix):
            return f"unknown key {key}: {answer}"
    section = _section_model(location[:-1], model)
    names = list(section.model_fields) if section else []
    close = difflib.get_close_matches(location[-1], names, n=1)
    if close:
        return f"unknown key {key}: did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"unknown key {key}: remove it, or use one of {', '.join(names)}"


def _section_model(location: Sequence[str], model: type[BaseModel]) -> type[BaseModel] | None:
    inner: Any = model
    for name in location:
        if get_origin(inner) is dict:
            inner = get_args(inner)[1]
            continue
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        field = inner.model_fields.get(name)
        inner = _without_none(field.annotation) if field else None
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _without_none(annotation: Any) -> Any:  # noqa: ANN401 - a type, or what typing makes of several
    others = [part for part in get_args(annotation) if part is not type(None)]
    return others[0] if isinstance(annotation, UnionType) and len(others) == 1 else annotation


def _describe(location: Sequence[str], model: type[BaseModel]) -> str | None:
    for depth in range(len(location), 0, -1):
        section = _section_model(location[: depth - 1], model)
        if section and location[depth - 1] in section.model_fields:
            return section.model_fields[location[depth - 1]].description
    return None


def _show(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
