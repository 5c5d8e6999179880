"""The whole state of a structure that an algorithm moves, and its form as bytes. Knows no ASE and no server.

A sealed state is opaque to whoever keeps it: a version, a SHA-256 over the rest, and the numbers as
safetensors, so that what comes back damaged is noticed and nothing in it is ever run. It is bound by `Origin`
to what it was computed with: going on with anything else would be another trajectory.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

FloatArray = npt.NDArray[np.float64]

_MAGIC = b"equipot motion"
_VERSION = 1
_DIGEST = hashlib.sha256().digest_size
_HEAD = len(_MAGIC) + 1 + _DIGEST
_WORDS = "/words"
_MOST_STEPS = 2**32 - 1
"""What messages hold."""

_NO_STATE = (
    *(SafetensorError, KeyError, TypeError, ValueError),
    *(AttributeError, OverflowError, RecursionError),
)


class BadState(ValueError):
    """Bytes that are no state, or not one of this structure, these settings and this model.

    Attributes:
        remedy: what the caller can do about it.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a state belongs to.

    Attributes:
        model: the digest of the bundle that computes.
        level_of_theory: by name.
        algorithm: what moves, by name.
        settings: a digest over all of its settings that decide where it goes.
        structure: a digest over what does not change of the structure.
    """

    model: str
    level_of_theory: str
    algorithm: str
    settings: str
    structure: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class State:
    """Everything that decides how a structure goes on.

    Attributes:
        step: how many were taken.
        words: what is no array, as JSON has it: counts, generators of random numbers.
        arrays: float64, by name.
    """

    step: int
    words: Mapping[str, Any]
    arrays: Mapping[str, FloatArray]


def digest_of(*parts: object) -> str:
    """A digest over arrays and over whatever else has one JSON form."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def seal(state: State, origin: Origin) -> bytes:
    """The state as bytes."""
    words = json.dumps({"step": state.step, "origin": asdict(origin), "words": state.words})
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.ascontiguousarray(array, dtype=np.float64) for name, array in state.arrays.items()
    }
    arrays[_WORDS] = np.frombuffer(words.encode(), dtype=np.uint8)
    body = save(arrays)
    return _MAGIC + bytes([_VERSION]) + hashlib.sha256(body).digest() + body


def unseal(raw: bytes, origin: Origin) -> State:
    """The state that these bytes hold.

    Raises:
        BadState: they are damaged, of another version, or of another origin.
    """
    body = raw[_HEAD:]
    again = "begin this structure without a token"
    if not raw.startswith(_MAGIC):
        raise BadState("is no restart token", again)
    if (version := raw[len(_MAGIC) : len(_MAGIC) + 1]) != bytes([_VERSION]):
        raise BadState(f"is of version {version.hex()}, known here is {_VERSION:02x}", again)
    if hashlib.sha256(body).digest() != raw[len(_MAGIC) + 1 : _HEAD]:
        raise BadState("is damaged: its checksum does not fit", f"take an earlier one, or {again}")
    try:
        arrays = load(body)
        told = json.loads(arrays.pop(_WORDS).tobytes())
        found = Origin(**told["origin"])
        state = State(step=int(told["step"]), words=dict(told["words"]), arrays=arrays)
        # Older ones hold the stress of what is not periodic, which is not known.
        if not np.isfinite(arrays.get("stress", np.zeros(0))).all():
            del arrays["stress"]
        if not 0 <= state.step <= _MOST_STEPS or any(
            array.dtype != np.float64 or not np.isfinite(array).all() for array in arrays.values()
        ):
            raise ValueError("numbers of another kind")
    except _NO_STATE as error:
        raise BadState(f"holds no state ({type(error).__name__})", again) from error
    for field in fields(Origin):
        there, here = getattr(found, field.name), getattr(origin, field.name)
        if there != here:
            what = field.name.replace("_", " ")
            raise BadState(
                f"was made with another {what}: {_short(there)}, here it is {_short(here)}",
                f"ask with the {what} that it was made with, or {again}",
            )
    return state


def array_of(state: State, name: str, shape: tuple[int, ...]) -> FloatArray:
    """A copy of one of its arrays.

    Raises:
        BadState: it has none of this name and shape.
    """
    array = state.arrays.get(name)
    if array is None or array.shape != shape:
        raise _missing(name)
    return array.copy()


def number_of(state: State, name: str) -> float:
    """One of its numbers.

    Raises:
        BadState: it has none of this name that is finite.
    """
    value = state.words.get(name)
    # A count of hundreds of digits is none, either.
    if not isinstance(value, int | float) or not abs(value) < sys.float_info.max:
        raise _missing(name)
    return value


def capture(thing: object, paths: Sequence[str]) -> tuple[dict[str, Any], dict[str, FloatArray]]:
    """What an algorithm's object holds at these dotted paths: words, and arrays (lists of arrays, too).

    Raises:
        AttributeError: it has no such attribute.
    """
    words: dict[str, Any] = {}
    arrays: dict[str, FloatArray] = {}
    for path in paths:
        value = _at(thing, path)
        if isinstance(value, np.ndarray):
            arrays[path] = value.copy()
        elif isinstance(value, list):
            words[path] = len(value)
            if value:
                arrays[path] = np.stack([np.asarray(one, dtype=np.float64) for one in value])
        else:
            words[path] = None if value is None else value if isinstance(value, int | str) else float(value)
    return words, arrays


def restore(thing: object, paths: Sequence[str], state: State) -> None:
    """Puts what `capture` took back into an object that was made in the same way.

    Raises:
        BadState: something is missing.
    """
    for path in paths:
        owner, _, name = path.rpartition(".")
        there = _at(thing, path)
        if isinstance(there, list):
            count = state.words.get(path)
            array = state.arrays.get(path, np.zeros(0))
            if array.ndim == 0 or count != len(array):
                raise _missing(path)
            scalars = array.ndim == 1
            value: object = [float(one) if scalars else one.copy() for one in array]
        elif path in state.arrays:
            value = state.arrays[path].copy()
        elif path in state.words:
            value = state.words[path]
        else:
            raise _missing(path)
        setattr(_at(thing, owner) if owner else thing, name, value)


def _missing(path: str) -> BadState:
    return BadState(f"lacks {path}", "begin this structure without a token")


def _at(thing: Any, path: str) -> Any:  # noqa: ANN401  # whatever the library keeps there
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


def _short(text: str) -> str:
    return f"{text[:24]}…" if len(text) > 24 else text
