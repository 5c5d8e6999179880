"""Reads pickled arrays and records without executing anything: the table of what a pickle may hold.

The few containers that data sets are written with are built here as plain values: tensors and numpy arrays as
numpy arrays, torch_geometric's objects as `Record`s. Any other name is refused, and the refusal says which.
Knows nothing of energies or files.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.sources.pickle_machine import Machine, Name, PickleDamaged, PickleRefused, Record, StandIn

__all__ = ["PickleDamaged", "PickleRefused", "Record", "loads"]

MAX_EXPANDED = 2**20
"""Numbers at most in a tensor that shows a storage's numbers more than once: a stride of 0 would make any
number of them out of one byte."""

_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
    "UntypedStorage": "|u1",
}
_TORCH_MAGIC, _TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_RECORDS = (
    "torch_geometric.data.data.Data",
    "torch_geometric.data.data.DataEdgeAttr",
    "torch_geometric.data.data.DataTensorAttr",
    "torch_geometric.data.storage.GlobalStorage",
    "torch_geometric.data.storage.BaseStorage",
    "torch_geometric.data.storage.NodeStorage",
    "torch_geometric.data.storage.EdgeStorage",
)


def _arguments(arguments: tuple[Any, ...], *kinds: type | tuple[type, ...]) -> tuple[Any, ...]:
    """The first arguments, if they are of these kinds."""
    if len(arguments) < len(kinds) or not all(map(isinstance, arguments, kinds)):
        raise PickleRefused(f"arguments of an array are malformed ({len(arguments)} of them)")
    return arguments[: len(kinds)]


@dataclass(slots=True, eq=False)
class _Dtype(StandIn):
    """A numpy dtype, whose byte order comes with the state."""

    text: str

    def complete(self, state: tuple[Any, ...]) -> "_Dtype":
        """With its byte order."""
        _, order = _arguments(state, int, str)
        if order not in ("<", ">", "|", "=") or (len(state) > 3 and state[2] is not None):
            raise PickleRefused("an array of a compound type")
        return _Dtype(order + self.text)


class _Array(StandIn):
    """A numpy array before its shape and numbers are known."""

    def complete(self, state: tuple[Any, ...]) -> NDArray[Any]:
        """The array."""
        _, shape, dtype, fortran, data = _arguments(state, int, tuple, _Dtype, int, bytes)
        return _numbers(dtype, data, shape, fortran=bool(fortran))


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise PickleRefused("an OrderedDict with arguments")
    return {}


def _empty_bytes(arguments: tuple[Any, ...]) -> bytes:
    if arguments:
        raise PickleRefused("bytes with arguments")
    return b""


def _latin_bytes(arguments: tuple[Any, ...]) -> bytes:
    text, encoding = _arguments(arguments, str, str)
    if encoding != "latin1":
        raise PickleRefused(f"bytes encoded as {encoding!r:.20}")
    return str(text).encode("latin1")


def _tensor(arguments: tuple[Any, ...]) -> NDArray[Any]:
    storage, offset, size, stride = _arguments(arguments, np.ndarray, int, tuple, tuple)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise PickleRefused(f"a tensor of size {size!r:.60} and stride {stride!r:.60}")
    items = 1
    for n in size:
        items *= n
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if items > max(storage.size, MAX_EXPANDED) or (items and last >= storage.size):
        raise PickleRefused(f"a tensor of size {size!r:.60} on a storage of {storage.size} numbers")
    if not items:
        return np.empty(size, storage.dtype)
    step = storage.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], size, [n * step for n in stride], writeable=False
    )
    return np.array(view)


def _parameter(arguments: tuple[Any, ...]) -> object:
    return _arguments(arguments, np.ndarray)[0]


def _empty_array(arguments: tuple[Any, ...]) -> _Array:
    return _Array()


def _dtype(arguments: tuple[Any, ...]) -> _Dtype:
    (text,) = _arguments(arguments, str)
    if text[:1] not in "biuf" or not text[1:].isdigit() or int(text[1:]) > 8:
        raise PickleRefused(f"an array of type {text!r:.40}: only numbers are read")
    return _Dtype(text)


def _scalar(arguments: tuple[Any, ...]) -> float:
    dtype, data = _arguments(arguments, _Dtype, bytes)
    return _numbers(dtype, data, ()).item()  # type: ignore[no-any-return]


def _from_buffer(arguments: tuple[Any, ...]) -> NDArray[Any]:
    data, dtype, shape, order = _arguments(arguments, (bytes, bytearray), _Dtype, tuple, str)
    return _numbers(dtype, bytes(data), shape, fortran=order == "F")


def _numbers(dtype: _Dtype, data: bytes, shape: object, *, fortran: bool = False) -> NDArray[Any]:
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise PickleRefused(f"an array of shape {shape!r:.60}")
    try:
        return np.array(
            np.frombuffer(data, np.dtype(dtype.text)).reshape(shape, order="F" if fortran else "C")
        )
    except (ValueError, TypeError) as error:
        raise PickleRefused(f"an array of {len(data)} bytes: {error}") from None


_INSIDE_STORAGE: Mapping[str, Name] = {f"torch.{kind}": Name(f"torch.{kind}") for kind in _STORAGES}


def _storage_type(identity: object) -> np.dtype[Any]:
    """Type of a storage inside `torch.save`'s format: ("storage", type, key, device, count, view)."""
    if not isinstance(identity, tuple) or len(identity) < 2 or not isinstance(identity[1], Name):
        raise PickleRefused("a tensor storage that is malformed")
    if identity[0] != "storage" or (len(identity) > 5 and identity[5] is not None):
        raise PickleRefused("a tensor storage that is a view of another")
    return np.dtype(_STORAGES[identity[1].text.removeprefix("torch.")])


def _torch_storage(arguments: tuple[Any, ...]) -> NDArray[Any]:
    """The numbers of a storage in `torch.save`'s first format (torch/serialization.py, `_legacy_save`).

    Five pickles (magic number, protocol, system, storage, keys), a count, and the numbers.
    """
    (data,) = _arguments(arguments, bytes)
    at = 0
    found = []
    for _ in range(5):
        machine = Machine(data, _INSIDE_STORAGE, at=at, persistent=_storage_type)
        found.append(machine.run())
        at = machine.at
    magic, protocol, _, dtype, keys = found
    if magic != _TORCH_MAGIC or protocol != _TORCH_PROTOCOL:
        raise PickleRefused("a tensor storage in a format other than torch's first")
    if not isinstance(dtype, np.dtype) or not isinstance(keys, list) or len(keys) != 1:
        raise PickleRefused("a tensor storage that is malformed")
    if at + 8 > len(data):
        raise PickleDamaged("a tensor storage that is cut short")
    (count,) = struct.unpack_from("<q", data, at)
    if count < 0 or at + 8 + count * dtype.itemsize > len(data):
        raise PickleDamaged(f"a tensor storage of {count} numbers that is cut short")
    return np.frombuffer(data, dtype, count, at + 8)


_KNOWN: Mapping[str, Name] = {
    name.text: name
    for name in (
        Name("collections.OrderedDict", _ordered_dict),
        Name("_codecs.encode", _latin_bytes),  # bytes in protocol 2
        Name("__builtin__.bytes", _empty_bytes),
        Name("torch.storage._load_from_bytes", _torch_storage),
        Name("torch._utils._rebuild_tensor_v2", _tensor),
        Name("torch._utils._rebuild_tensor", _tensor),
        Name("torch._utils._rebuild_parameter", _parameter),
        *(
            Name(f"numpy.{core}.{function}", build)
            for core in ("core", "_core")
            for function, build in (
                ("multiarray._reconstruct", _empty_array),
                ("multiarray.scalar", _scalar),
                ("numeric._frombuffer", _from_buffer),
            )
        ),
        Name("numpy.ndarray"),
        Name("numpy.dtype", _dtype),
        *(Name(record, is_record=True) for record in _RECORDS),
    )
}


def loads(data: bytes) -> object:
    """The value of a pickle: numbers, text, lists, dicts, numpy arrays (of tensors too), and `Record`s.

    Raises:
        PickleRefused: it refers to anything else, or is damaged. Nothing has been executed.
    """
    return Machine(data, _KNOWN).run()
