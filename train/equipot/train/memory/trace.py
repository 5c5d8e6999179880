"""Follows every tensor that a piece of torch code makes and drops: how many bytes live, when, and what for.

The code may run on torch's meta device, where tensors have shapes and no numbers: then a step of any size is
followed in a second and without its memory. What is followed are storages, so views count once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """How a step goes on: row k is the state after change k of what lives."""

    live: Mapping[str, NDArray[np.int64]]
    """bytes by what they are for"""
    phase: NDArray[np.str_]
    flops: NDArray[np.float64]
    """of matrix products, since the beginning"""
    touched: NDArray[np.float64]
    """bytes read and written by everything else, since the beginning"""
    calls: NDArray[np.int64]
    """operators called, since the beginning"""

    @property
    def total(self) -> NDArray[np.int64]:
        """Bytes alive."""
        total: NDArray[np.int64] = np.sum(list(self.live.values()), axis=0)
        return total

    def peak(self, phase: str | None = None) -> dict[str, int]:
        """Bytes by what they are for, at the moment when most are alive, of a phase or of all."""
        total = self.total if phase is None else np.where(self.phase == phase, self.total, -1)
        at = int(total.argmax())
        return {kind: int(values[at]) for kind, values in self.live.items() if values[at]}


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, follows what the thread computes on one kind of device."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._kind = "other"
        self._phase = ""
        self._held: dict[int, tuple[int, str, weakref.ref[Any]]] = {}
        self._rows: list[tuple[str, int, str, float, float, int]] = []
        self._flops = self._touched = 0.0
        self._calls = 0

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made inside the block is for this."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside the block belongs to this part of a step."""
        before, self._phase = self._phase, name
        self._note(self._kind, 0)  # so that it is there even if it makes nothing
        try:
            yield
        finally:
            self._phase = before

    def add_work(self, flops: float, touched: float) -> None:
        """Count work that no operator shows."""
        self._flops += flops
        self._touched += touched

    def ignore_all(self, tensors: Iterable[Tensor]) -> None:
        """See :meth:`ignore`."""
        for tensor in tensors:
            self.ignore(tensor)

    def ignore(self, tensor: Tensor) -> None:
        """A tensor that is there anyhow, and counted elsewhere or not at all."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._held[key] = 0, self._kind, weakref.ref(storage, lambda _: self._drop(key))

    def call_it(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor is for by now."""
        key = tensor.untyped_storage()._cdata
        if key in self._held and self._held[key][1] != kind:
            size, before, reference = self._held[key]
            self._held[key] = size, kind, reference
            self._note(before, -size)
            self._note(kind, size)

    def timeline(self) -> Timeline:
        """What was followed until now."""
        kinds = sorted({row[0] for row in self._rows})
        changes = np.array([row[1] for row in self._rows], dtype=np.int64)
        of = np.array([row[0] for row in self._rows])
        return Timeline(
            live={kind: np.cumsum(np.where(of == kind, changes, 0)) for kind in kinds},
            phase=np.array([row[2] for row in self._rows]),
            flops=np.array([row[3] for row in self._rows]),
            touched=np.array([row[4] for row in self._rows]),
            calls=np.array([row[5] for row in self._rows]),
        )

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        out = _on_meta(func, args, kwargs)
        self._calls += 1
        packet = func._overloadpacket
        if packet in flop_registry:
            self._flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif not func.is_view:
            self._touched += sum(tensor.nbytes for tensor in _tensors((args, kwargs, out)))
        for tensor in _tensors(out):
            if tensor.device.type == self._device:
                self._hold(tensor)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._held:
            return
        reference = weakref.ref(storage, lambda _: self._drop(key))
        self._held[key] = size, self._kind, reference
        self._note(self._kind, size)

    def _drop(self, key: int) -> None:
        size, kind, _ = self._held.pop(key)
        self._note(kind, -size)

    def _note(self, kind: str, change: int) -> None:
        self._rows.append((kind, change, self._phase, self._flops, self._touched, self._calls))


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _on_meta(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    # The one operator of a step whose result's shape may depend on numbers, and in ours does not.
    if func is torch.ops.aten.bincount.default and args[0].is_meta:
        return args[0].new_empty(kwargs.get("minlength", args[2] if len(args) > 2 else 0))
    return func(*args, **kwargs)
