"""Makes frames of the plain cases of extended xyz, which are nearly all, without ASE.

ASE's parser is several times slower than all the rest of an import. What this one is not certain to read as
ASE does it does not read at all, and what is wrong with a frame is for ASE's reading to say.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import System
from equipot.train.sources.base import Frame, FrameError, ReadOptions
from equipot.train.sources.extxyz_frame import parse_extxyz
from equipot.train.sources.keyed_frame import keyed_frame
from equipot.train.sources.labels import (
    CHARGE_KEYS,
    ENERGY_KEYS,
    FORCES_KEYS,
    SPIN_KEYS,
    STRESS_KEYS,
    UNIT_KEYS,
)
from equipot.train.sources.xyz_chunks import Chunk

_COMMENT = re.compile(r"""\s*(?:[A-Za-z_][\w.-]*=(?:"[^"\\]*"|[^\s"'{}\[\]\\,=]+)(?:\s+|$))+""", re.ASCII)
_KEY = re.compile(r"""(?:^|\s)([A-Za-z_][\w.-]*)=""", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"-?\d{1,15}", re.ASCII)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/^*+-]+", re.ASCII)
_NO_WORDS = ("true", "false", "nan", "inf", "infinity")
_SCALARS = frozenset((*ENERGY_KEYS, *CHARGE_KEYS, *SPIN_KEYS))
_INFO = frozenset((*_SCALARS, *STRESS_KEYS, *FORCES_KEYS, *UNIT_KEYS))
_MATRICES = ("stress", "virial")  # ASE refuses six numbers here, and takes one half of nine
_NOT_COLUMNS = _INFO - set(FORCES_KEYS) | {"Z", "numbers", "key_value_pairs"}


def plain_frame(chunk: Chunk, options: ReadOptions) -> Frame | None:
    """The frame, or None if it is not plain or not good."""
    if chunk.fault is not None or chunk.n_atoms == 0:
        return None
    start = chunk.text.find("\n") + 1
    comment = chunk.text[start : chunk.text.find("\n", start)]
    if _COMMENT.fullmatch(comment) is None or "Properties=" not in comment:
        return None
    try:
        parsed = parse_extxyz(chunk)
        info = _info(parsed.values, comment, options)
        if info is None or _NOT_COLUMNS & parsed.columns.keys() or info.keys() & parsed.columns.keys():
            return None
        group = _group(info, options.group_keys)
        if group is None and any(key in info or key in parsed.columns for key in options.group_keys):
            return None
        system = System(
            atomic_numbers=parsed.atomic_numbers,
            positions=parsed.positions,
            cell=parsed.cell,
            pbc=parsed.pbc,
        )
        if system.positions.shape != (chunk.n_atoms, 3) or system.positions.dtype != np.float64:
            return None
        return keyed_frame(chunk.index, system, {**parsed.columns, **info}, info, group, options)
    except FrameError:
        return None


def _info(values: Mapping[str, str], comment: str, options: ReadOptions) -> dict[str, Any] | None:
    """The values that matter, as ASE reads them; None if one of them is not plain, or a key comes twice."""
    if len(_KEY.findall(comment)) != len(values):
        return None
    named = (options.energy_key, options.forces_key, options.stress_key, *options.group_keys)
    found: dict[str, Any] = {}
    for key, text in values.items():
        if key not in _INFO and key not in named:
            continue
        value = _value(text)
        if value is None or (key in _MATRICES and not _is_symmetric(value)):
            return None
        found[key] = value
    return found


def _value(text: str) -> int | float | str | NDArray[np.float64] | None:
    """A number, six or nine numbers, or a word; None for anything else."""
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    if _WORD.fullmatch(text):
        return None if text.lower() in _NO_WORDS else text
    words = text.split()
    if len(words) in (6, 9) and all(_NUMBER.fullmatch(word) for word in words):
        return np.array(words, dtype=np.float64)
    return None


def _is_symmetric(value: object) -> bool:
    if not isinstance(value, np.ndarray) or value.size != 9:
        return False
    matrix = value.reshape(3, 3)
    return bool((matrix == matrix.T).all())


def _group(info: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, str] | None:
    for key in keys:
        if isinstance(info.get(key), str | int):
            return key, str(info[key])
        if key in info:
            return None
    return None
