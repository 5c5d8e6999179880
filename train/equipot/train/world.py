"""The ranks of a run and the few things they tell each other. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among the ranks. Methods are collective: all ranks call them, in one order."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The group they talk in; absent: everybody's."""

    def apart(self) -> World:
        """The same ranks in a group of its own, for a thread beside the training; collective itself."""
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        return replace(self, device=torch.device("cpu"), group=group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone prints and keeps the run's books."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return self._reduce([float(flag)], dist.ReduceOp.MAX)[0] > 0

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: object) -> list[object]:
        """Every rank's (small) value, in rank order, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        values: list[T] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=self.device, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def agree(self, problem: str | None) -> str | None:
        """None if all ranks are well, else the first rank's problem, on all ranks."""
        return next((str(found) for found in self.gather(problem) if found is not None), None)

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=operation, group=self.group)
        result: list[float] = tensor.tolist()
        return result
