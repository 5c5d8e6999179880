"""Arrays to bytes and back, checking their length: what all messages with arrays share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_FEW = 1024
"""Defaults of no more rows are arrays of zeros; of more, one zero seen from everywhere."""

_WIRE_DTYPES: Mapping[type[np.generic], np.dtype[Any]] = MappingProxyType(
    {np.float64: np.dtype("<f8"), np.int32: np.dtype("<i4"), np.uint8: np.dtype("u1")}
)


class CodecError(ValueError):
    """Arrays that do not fit together: names the field, what was expected and what came.

    Attributes:
        field: the field at fault, as named in the .proto.
        message: what is wrong, with the values.
        remedy: what the caller can do about it.
    """

    def __init__(self, field: str, message: str, remedy: str) -> None:
        super().__init__(f"{field}: {message}; {remedy}")
        self.field = field
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[CodecError], tuple[str, str, str]]:
        return type(self), (self.field, self.message, self.remedy)


def check_array(field: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Checks shape and dtype; nothing is converted silently.

    Raises:
        CodecError: another shape or dtype.
    """
    if array.shape != shape:
        raise wrong_shape(field, array.shape, str(shape))
    if array.dtype != dtype:
        raise CodecError(field, f"is {array.dtype}", f"give it as {np.dtype(dtype)}")


def wrong_shape(field: str, shape: tuple[int, ...], expected: str) -> CodecError:
    """What is said of an array of another shape."""
    return CodecError(field, f"has shape {shape}, expected {expected}", "make it fit n_atoms")


def bytes_of(array: npt.NDArray[Any], dtype: type[np.generic]) -> bytes:
    """An array as it travels."""
    return array.astype(_WIRE_DTYPES[dtype], copy=False).tobytes()


def array_from(
    field: str, raw: bytes, dtype: type[np.generic], shape: tuple[int, ...], *, optional: bool = False
) -> npt.NDArray[Any]:
    """An array that travelled, read-only; zeros of one that may be left out and was.

    Raises:
        CodecError: bytes of another length.
    """
    if optional and not raw:
        return _zeros(dtype, shape)
    wire = _WIRE_DTYPES[dtype]
    expected = wire.itemsize
    for length in shape:
        expected *= length
    if len(raw) != expected:
        raise CodecError(
            field,
            f"has {len(raw)} bytes, expected {expected}: {wire.name} of shape {shape}",
            "make it fit n_atoms, little-endian and C-ordered",
        )
    array = np.frombuffer(raw, dtype=wire).reshape(shape)
    return array if wire.isnative else array.astype(dtype)


def _zeros(dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if shape[0] > _FEW:
        # A default must cost no memory, whatever the message claims.
        return np.broadcast_to(np.zeros((), dtype=dtype), shape)
    zeros = np.zeros(shape, dtype=dtype)
    zeros.setflags(write=False)
    return zeros
